"""Many prompts through one model: each sample as it ends, none changed by the others."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PIL

from mixmodal import MixedModal
from mixmodal.pipeline import queue
from mixmodal.pipeline.queue import Ask, Drawn, Failed

PROMPTS = ["a red apple", "pear", "a green apple, flat style"]


@pytest.fixture
def model(exported: Path) -> MixedModal:
    return MixedModal.from_pretrained(exported, "cpu", batch_size=2)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "WINDOW_BATCHES", 2)


def bytes_of(sample: Any) -> Any:
    return sample.tobytes() if isinstance(sample, PIL.Image) else sample


def same(first: Any, second: Any) -> bool:
    """Whether samples are the same but for rounding, since `generate` decodes several pictures together."""
    if isinstance(first, str):
        return first == second
    return np.abs(np.asarray(first).astype(int) - np.asarray(second).astype(int)).max() <= 1  # worst seen 1


def samples_by_name(found: list[Drawn | Failed]) -> dict[tuple[str, int], Any]:
    assert all(isinstance(one, Drawn) for one in found)
    return {(one.key, one.number): bytes_of(one.sample) for one in found if isinstance(one, Drawn)}


@pytest.mark.parametrize(
    ("output", "options"),
    [
        ("image", {"best_of": 3}),
        ("image", {"guidance_scale": 2.0}),
        ("image", {"unconditional": "drop"}),
        ("text", {"max_new_tokens": 6}),
    ],
)
def test_each_sample_is_the_one_that_is_drawn_alone(exported: Path, output: str, options: dict[str, Any]) -> None:
    small, large = (MixedModal.from_pretrained(exported, "cpu", batch_size=size) for size in (2, 64))
    asks = [Ask(prompt, prompt, num=2, seed=seed) for seed, prompt in enumerate(PROMPTS)]
    found = list(small.generate_each(asks, output, **options))
    assert samples_by_name(found) == samples_by_name(list(large.generate_each(asks[::-1], output, **options)))
    alone = {ask.key: large.generate([ask.prompt], output, num=2, seed=ask.seed, **options) for ask in asks}
    assert all(isinstance(one, Drawn) and same(one.sample, alone[one.key][one.number]) for one in found)


def test_prompts_are_taken_when_there_is_room(model: MixedModal) -> None:
    taken = []

    def asks() -> Iterator[Ask]:
        for number in range(20):
            taken.append(number)
            yield Ask(str(number), "pear", num=2)

    drawn = model.generate_each(asks())
    assert taken == []
    next(drawn)
    assert taken == [0, 1]  # a window of two batches of two samples
    assert len(list(drawn)) == 39


def test_a_prompt_that_can_not_be_drawn_leaves_the_others_alone(model: MixedModal) -> None:
    picture = PIL.fromarray(np.zeros((8, 8, 3), dtype=np.uint8))
    lost = Failed("lost", OSError("no such file"))
    long = Ask("long", "a red apple " * 40)
    asks = [Ask("a", "pear"), long, lost, Ask("bare", [picture]), Ask("none", "pear", num=0), Ask("b", "a red apple")]
    found = {one.key: one for one in model.generate_each(asks, best_of=2)}
    failed = {key: str(one.error) for key, one in found.items() if isinstance(one, Failed)}
    assert set(failed) == {"long", "lost", "bare", "none"}
    assert "raise max_new_tokens" in failed["long"]
    assert found["lost"] == lost
    assert "best_of compares images with the prompt's text" in failed["bare"]
    assert failed["none"] == "num is 0; it must be at least 1"
    (alone,) = model.generate("a red apple", best_of=2)
    assert bytes_of(found["b"].sample) == bytes_of(alone)


def test_prompts_of_one_name_are_not_mixed_up(model: MixedModal) -> None:
    found = [one.sample for one in model.generate_each([Ask("a", "pear"), Ask("a", "a red apple")], best_of=2)]
    expected = [model.generate(prompt, best_of=2)[0] for prompt in ("pear", "a red apple")]
    assert [bytes_of(one) for one in found] == [bytes_of(one) for one in expected]


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("sound", {}, "output 'sound' is unknown"),
        ("image", {"best_of": 0}, "best_of is 0"),
        ("text", {"best_of": 2}, "best_of chooses among images"),
        ("text", {"guidance_scale": 2.0}, "guidance acts on pictures alone"),
        ("image", {"topk": 3}, "there is no option 'topk'"),
    ],
)
def test_settings_that_no_prompt_could_use_are_refused_at_once(
    model: MixedModal, output: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate_each([], output, **options)
