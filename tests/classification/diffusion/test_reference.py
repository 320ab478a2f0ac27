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
from mixmodal.classification.elimination import Elimination, EliminationConfig
from mixmodal.classification.policies import Staged
from mixmodal.classification.units import Unit, draw_noise, even_times

Build = Callable[[str], Any]
CLASSES = ["cat", "dog", "red apple", "blue pear"]
PROMPT = "a photo of a {}."


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
    texts = plain.encode(pipe, [PROMPT.replace("{}", one) for one in CLASSES])
    replay = plain.classify(pipe, texts, image, noises.__getitem__, samples, keep, loss)
    assert len(replay.errors) == 4 * 5 + 2 * 20
    scorer = DiffusionScorer(
        build_adapter(pipe), CLASSES, [PROMPT], DiffusionConfig(loss=loss, batch_size=16), free_text_encoders=False
    )
    scorer.set_pictures(image[None])
    classes, steps = zip(*replay.errors)
    costs = scorer.cost([0] * len(classes), classes, [of_step[step] for step in steps])
    np.testing.assert_allclose(costs, list(replay.errors.values()), rtol=0, atol=1e-6)  # worst 2.4e-7
    assert np.ptp(costs) > 1e-2
    final = [costs[[k == one for k in classes]].mean() for one in range(4)]
    evaluated = [classes.count(one) for one in range(4)]
    assert sorted(evaluated) == [5, 5, 25, 25]
    assert np.argmin(np.where(np.array(evaluated) == 25, final, np.inf)) == replay.prediction


@pytest.mark.parametrize(("samples", "keep"), [((5, 25), (2, 1)), ((4, 8, 25), (3, 2, 1))])
def test_the_staged_policy_is_the_published_algorithm(
    samples: tuple[int, ...], keep: tuple[int, ...], build_pipeline: Build, load: Callable[[str], ModuleType]
) -> None:
    """Predictions, mean errors of the classes that stayed, and evaluations of each class, for several pictures."""
    pipe, plain = build_pipeline("sd_epsilon"), load("published_classifier")
    images = torch.rand((2, 3, 32, 32), generator=torch.Generator().manual_seed(1)) * 2 - 1
    policy = Staged(samples=samples, keep=keep)
    of_step = {int(unit.time * 1000): unit for unit in policy.build_units(seed=0)}
    texts = plain.encode(pipe, [PROMPT.replace("{}", one) for one in CLASSES])
    scorer = DiffusionScorer(build_adapter(pipe), CLASSES, [PROMPT], free_text_encoders=False)
    scorer.set_pictures(images)
    outcomes = Elimination(scorer, len(CLASSES), policy, EliminationConfig(batch_size=16)).score(range(2))
    for image, outcome in zip(images, outcomes):
        replay = plain.classify(
            pipe, texts, image, lambda step: draw_noise(0, of_step[step], (4, 16, 16)), samples, keep
        )
        evaluated = [sum(k == one for k, _ in replay.errors) for one in range(4)]
        assert outcome.evaluations.tolist() == evaluated
        assert int(outcome.costs.argmin()) == replay.prediction
        for one in np.flatnonzero(outcome.evaluations == max(evaluated)):
            mean = np.mean([error for (k, _), error in replay.errors.items() if k == one])
            assert outcome.costs[one] == pytest.approx(mean, abs=1e-6)
