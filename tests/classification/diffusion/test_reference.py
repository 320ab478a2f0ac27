"""The published algorithm as a plain loop (`benchmarks/published_classifier.py`), replayed by the scorer."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from mixmodal.classification.adapters import build_adapter
from mixmodal.classification.denoising import Loss
from mixmodal.classification.diffusion import DiffusionConfig, DiffusionScorer
from mixmodal.classification.units import Unit, draw_noise, even_times

Build = Callable[[str], Any]


@pytest.mark.parametrize("loss", ["l2", "l1", "huber"])
def test_the_published_errors_are_the_scorers_costs(
    loss: Loss, build_pipeline: Build, load: Callable[[str], ModuleType]
) -> None:
    """Every (class, step) that the published schedule evaluates, with its noises, in one mixed batch after another."""
    pipe = build_pipeline("sd_epsilon")
    samples, keep = (5, 25), (2, 1)
    units = [Unit(j, time, j, 1, 0, 1.0) for j, time in enumerate(even_times(25, 1000).tolist())]
    of_step = {int(unit.time * 1000): unit for unit in units}
    assert list(of_step) == list(range(20, 1000, 40)), "the published grid"
    noises = {step: draw_noise(0, unit, (4, 16, 16)) for step, unit in of_step.items()}
    image = torch.rand((3, 32, 32), generator=torch.Generator().manual_seed(1)) * 2 - 1
    plain = load("published_classifier")
    classes, prompt = plain.CLASSES, plain.PROMPT
    texts = plain.encode(pipe, [prompt.replace("{}", one) for one in classes])
    replay = plain.classify(pipe, texts, image, noises.__getitem__, samples, keep, loss)
    assert len(replay.errors) == 4 * 5 + 2 * 20
    scorer = DiffusionScorer(
        build_adapter(pipe), classes, [prompt], DiffusionConfig(loss=loss, batch_size=16), free_text_encoders=False
    )
    scorer.set_pictures(image[None])
    pairs = list(replay.errors)
    found, steps = zip(*pairs)
    costs = scorer.cost([0] * len(pairs), found, [of_step[step] for step in steps])
    np.testing.assert_allclose(costs, list(replay.errors.values()), rtol=0, atol=1e-6)  # worst 2.4e-7
    assert np.ptp(costs) > 1e-2
    final = [costs[[k == one for k in found]].mean() for one in range(4)]
    evaluated = [found.count(one) for one in range(4)]
    assert sorted(evaluated) == [5, 5, 25, 25]
    assert np.argmin(np.where(np.array(evaluated) == 25, final, np.inf)) == replay.prediction


@pytest.mark.parametrize(("samples", "keep"), [((5, 25), (2, 1)), ((4, 8, 25), (3, 2, 1))])
def test_the_staged_policy_is_the_published_algorithm(
    samples: tuple[int, ...], keep: tuple[int, ...], build_pipeline: Build, load: Callable[[str], ModuleType]
) -> None:
    """Predictions, every error, means of those that stayed, and evaluations of each class, for several pictures."""
    images = torch.rand((2, 3, 32, 32), generator=torch.Generator().manual_seed(1)) * 2 - 1
    for compared in load("published_classifier").compare(build_pipeline("sd_epsilon"), images, samples, keep):
        outcome, replay = compared.outcome, compared.replay
        assert compared.difference < 1e-6  # worst seen 2.1e-7
        evaluated = [sum(k == one for k, _ in replay.errors) for one in range(4)]
        assert outcome.evaluations.tolist() == evaluated
        assert int(outcome.costs.argmin()) == replay.prediction
        for one in np.flatnonzero(outcome.evaluations == max(evaluated)):
            mean = np.mean([error for (k, _), error in replay.errors.items() if k == one])
            assert outcome.costs[one] == pytest.approx(mean, abs=1e-6)
