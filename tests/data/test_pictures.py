"""The stream of pictures: a pure function of the seed, however it is spread, cached or streamed, and resumed."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mixmodal.data.augment import AugmentConfig, augment, draw_changes, turn_hue
from mixmodal.data.pictures import (
    PictureBatch,
    PictureDataConfig,
    PictureLoader,
    StreamedPictures,
    decode_all,
    decode_first,
    to_images,
)
from mixmodal.data.shards import PictureFile, Sample, write_shards
from mixmodal.data.skipping import SampleLimits, SkipCounter, TooManySkipped
from mixmodal.tokenization.preprocessing import to_tensor

SIZE = 16

Draw = Callable[..., torch.Tensor]
WriteShards = Callable[..., None]


@pytest.fixture(params=[100, 0], ids=["cached", "streamed"])
def config(request: pytest.FixtureRequest, shape_shards: Path) -> PictureDataConfig:
    return PictureDataConfig(train=(shape_shards,), max_cached_pictures=request.param, shuffle_window=5)


def build_loader(config: PictureDataConfig, size: int = 4, **options: Any) -> PictureLoader:
    return PictureLoader(config, SIZE, micro_batch_size=size, **options)


def write_broken(folder: Path, num: int) -> None:
    picture = PictureFile(b"\x89PNG\r\n\x1a\n and nothing more", "png", "bad.png")
    write_shards([Sample(f"bad{index}", ("a shape", picture)) for index in range(num)], folder)


def is_broken(key: str) -> bool:
    return "/bad/" in key


def keys(loader: PictureLoader, batches: int) -> list[str]:
    return [key for batch in islice(loader, batches) for key in batch.keys]


def check_split(config: PictureDataConfig, steps: list[PictureBatch], size: int, accumulation: int, world: int) -> None:
    """Whether the ranks of a world have the pictures of these steps, with the same changes."""
    loaders = [
        build_loader(config, size, grad_accum_steps=accumulation, rank=rank, world_size=world) for rank in range(world)
    ]
    for step in steps:
        parts = [next(loader) for _ in range(accumulation) for loader in loaders]
        assert [key for part in parts for key in part.keys] == step.keys
        assert torch.equal(torch.cat([part.pixels for part in parts]), step.pixels)
        assert torch.equal(torch.cat([part.draws for part in parts]), step.draws)


def test_pixels_become_the_images_of_preprocessing(draw_shapes: Draw) -> None:
    pixels = draw_shapes(3, SIZE)
    expected = torch.stack([to_tensor(Image.fromarray(picture.permute(1, 2, 0).numpy())) for picture in pixels])
    assert torch.equal(to_images(pixels), expected)


def test_each_epoch_shows_every_picture_once_in_a_new_order(config: PictureDataConfig) -> None:
    seen = keys(build_loader(config, size=1), 33)
    epochs = [seen[:11], seen[11:22], seen[22:]]
    assert all(Counter(epoch) == Counter(epochs[0]) for epoch in epochs)
    assert len(set(epochs[0])) == 11
    assert epochs[0] != epochs[1] != epochs[2] != sorted(epochs[2])
    assert keys(build_loader(config, size=1), 33) == seen
    assert keys(build_loader(config, size=1, seed=1), 33) != seen


def test_a_step_has_the_same_pictures_however_it_is_spread(config: PictureDataConfig) -> None:
    whole = [next(loader) for loader in [build_loader(config, size=8)] for _ in range(4)]
    for size, accumulation, world in [(4, 2, 1), (4, 1, 2), (2, 2, 2)]:
        check_split(config, whole, size, accumulation, world)


@pytest.mark.parametrize("done", [1, 2, 5])
def test_a_resumed_loader_goes_on_with_the_next_batch(config: PictureDataConfig, done: int) -> None:
    loader = build_loader(config)
    list(islice(loader, done))
    state = loader.state_dict()
    expected = list(islice(loader, 4))
    resumed = build_loader(config)
    resumed.load_state_dict(state)
    for found, wanted in zip(islice(resumed, 4), expected, strict=True):
        assert found.keys == wanted.keys
        assert torch.equal(found.pixels, wanted.pixels)
        assert torch.equal(found.draws, wanted.draws)


@pytest.mark.parametrize("wrong", [{"rank": 1}, {"rank": -1}, {"size": 0}, {"grad_accum_steps": 0}, {"seed": -1}])
def test_a_split_that_can_not_be_is_refused_as_for_documents(config: PictureDataConfig, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"rows, .* micro-batches, seed .*: rows and micro-batches must be at least 1"):
        build_loader(config, **wrong)


def test_a_state_of_other_settings_is_refused(config: PictureDataConfig) -> None:
    state = build_loader(config).state_dict()
    with pytest.raises(ValueError, match="seed is 1, but the checkpoint was written with 0"):
        build_loader(config, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="rows_per_step is 8"):
        build_loader(config, size=8).load_state_dict(state)


def test_pictures_come_in_the_size_asked_for(tmp_path: Path, write_shape_shards: WriteShards) -> None:
    write_shape_shards(tmp_path, 2, size=40)
    _, pixels = decode_first([tmp_path], SIZE, SampleLimits(), 10)
    assert pixels.shape == (2, 3, SIZE, SIZE)
    assert pixels.dtype == torch.uint8


@pytest.mark.parametrize("cached", [100, 0])
def test_bad_pictures_are_left_out_up_to_a_share(tmp_path: Path, cached: int, write_shape_shards: WriteShards) -> None:
    write_shape_shards(tmp_path / "good", 9, size=SIZE)
    write_broken(tmp_path / "bad", 1)
    train = (tmp_path / "good", tmp_path / "bad")
    config = PictureDataConfig(
        train=train, max_cached_pictures=cached, limits=SampleLimits(max_skipped_share=0.2), shuffle_window=20
    )
    seen = keys(build_loader(config, size=5), 2 if not cached else 9)
    assert len(set(seen)) == 9
    assert not any(is_broken(key) for key in seen)
    with pytest.raises(TooManySkipped, match="bad"):
        decode_all(train, SIZE, SampleLimits(max_skipped_share=0.05), 100)


@pytest.fixture
def damaged(tmp_path: Path, write_shape_shards: WriteShards) -> PictureDataConfig:
    """A third of the pictures, 4 of 12, are bad."""
    write_shape_shards(tmp_path / "good", 8, size=SIZE)
    write_broken(tmp_path / "bad", 4)
    limits = SampleLimits(max_skipped_share=0.5)
    return PictureDataConfig(
        train=(tmp_path / "good", tmp_path / "bad"), max_cached_pictures=0, limits=limits, shuffle_window=12
    )


def test_another_picture_stands_in_for_a_bad_one(damaged: PictureDataConfig) -> None:
    loader = build_loader(damaged, size=1)
    batches = list(islice(loader, 36))
    assert all(len(batch.pixels) == len(batch.draws) == len(batch.keys) == 1 for batch in batches)
    seen = [batch.keys[0] for batch in batches]
    assert not any(is_broken(key) for key in seen)
    for epoch in (seen[:12], seen[12:24], seen[24:]):
        assert len(set(epoch)) == 8
    assert len({batch.draws.numpy().tobytes() for batch in batches}) == 36
    stream = [row.key for row in islice(StreamedPictures(damaged, SkipCounter(1.0), 0).rows(0), 48)]
    looked = next(end for end in range(36, 48) if not is_broken(stream[end - 1]))
    # each once, though some are neighbours; the search for the last row looks into the next epoch
    assert loader.counter.num_skipped == sum(map(is_broken, stream[:looked])) > 12


def test_bad_pictures_do_not_depend_on_how_a_step_is_spread(damaged: PictureDataConfig) -> None:
    whole = [next(loader) for loader in [build_loader(damaged, size=4)] for _ in range(9)]
    for size, accumulation, world in [(1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)]:
        check_split(damaged, whole, size, accumulation, world)


@pytest.mark.parametrize("size", [1, 3])
def test_a_loader_resumes_exactly_at_every_place_among_bad_pictures(damaged: PictureDataConfig, size: int) -> None:
    loader = build_loader(damaged, size)
    states, batches = [], []
    for _ in range(16):
        states.append(loader.state_dict())
        batches.append(next(loader))
    assert [state["place"] for state in states] == [size * step for step in range(16)]
    resumed = build_loader(damaged, size)
    for done, state in reversed(list(enumerate(states))):  # backwards: what a loader looked at before must not stay
        resumed.load_state_dict(state)
        for wanted, found in zip(batches[done:], resumed, strict=False):
            assert found.keys == wanted.keys
            assert torch.equal(found.pixels, wanted.pixels)
            assert torch.equal(found.draws, wanted.draws)


def test_too_many_bad_pictures_end_a_streamed_training(damaged: PictureDataConfig) -> None:
    loader = build_loader(replace(damaged, limits=SampleLimits(max_skipped_share=0.2)), size=1)
    with pytest.raises(TooManySkipped, match=r"of 1\d\d samples are bad .* more than max_skipped_share 0\.2"):
        list(islice(loader, 200))


def test_folders_without_pictures_are_named(tmp_path: Path) -> None:
    write_shards([Sample("t", ("text", "only"))], tmp_path)
    with pytest.raises(ValueError, match="hold no pictures"):
        build_loader(PictureDataConfig(train=(tmp_path,)))
    with pytest.raises(ValueError, match=r"data\.train is empty"):
        PictureDataConfig(train=())


# augmentation


def draws_of(count: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([draw_changes(0, seed) for seed in range(count)]))


def test_the_defaults_change_nothing(draw_shapes: Draw) -> None:
    images = to_images(draw_shapes(4, SIZE))
    assert torch.equal(augment(images, draws_of(4), AugmentConfig()), images)


def test_flips_take_their_share_of_the_pictures() -> None:
    images = to_images(torch.randint(256, (400, 3, 4, 4), dtype=torch.uint8))
    found = augment(images, draws_of(400), AugmentConfig(flip_share=0.25))
    flipped = [torch.equal(a, b.flip(-1)) and not torch.equal(a, b) for a, b in zip(found, images, strict=True)]
    assert all(flip or torch.equal(a, b) for flip, a, b in zip(flipped, found, images, strict=True))
    assert 0.18 < np.mean(flipped) < 0.32


def test_a_shift_moves_by_its_share_of_the_side() -> None:
    images = torch.full((1, 3, SIZE, SIZE), -1.0)
    images[:, :, 8, 8] = 1.0
    draws = torch.zeros(1, 7)
    draws[0, 1:5] = torch.tensor([0.0, 1.0, 0.5, 0.5])  # move; by the most along x, not along y; no scale
    moved = augment(images, draws, AugmentConfig(move_share=1.0, max_shift=2 / SIZE))
    assert moved[0, 0, 8].argmax() == 6
    assert moved[0, 0, :, 6].argmax() == 8


def test_a_scale_keeps_the_centre() -> None:
    rows = torch.linspace(-1, 1, SIZE).view(1, 1, 1, SIZE).expand(1, 3, SIZE, SIZE).clone()
    draws = torch.zeros(1, 7)
    draws[0, 1:5] = torch.tensor([0.0, 0.5, 0.5, 0.0])  # the smallest factor: a window of 0.8 of the side
    scaled = augment(rows, draws, AugmentConfig(move_share=1.0, max_scale=0.2))
    torch.testing.assert_close(scaled, rows * 0.8, rtol=0, atol=1e-5)  # measured worst difference: 1e-7


def test_a_third_of_a_turn_of_the_hue_permutes_the_channels(draw_shapes: Draw) -> None:
    images = to_images(draw_shapes(2, SIZE))
    turned = turn_hue(images, torch.tensor([2 * np.pi / 3, 0.0]))
    torch.testing.assert_close(turned[0], images[0].roll(1, dims=0), rtol=0, atol=1e-5)  # measured: 4e-7
    torch.testing.assert_close(turned[1], images[1], rtol=0, atol=1e-5)
    grey = torch.full((1, 3, 2, 2), 0.3)
    torch.testing.assert_close(turn_hue(grey, torch.tensor([1.0])), grey, rtol=0, atol=1e-5)


def test_a_picture_is_changed_alike_in_any_batch(draw_shapes: Draw) -> None:
    config = AugmentConfig(flip_share=0.5, move_share=0.5, hue_share=0.5)
    images, draws = to_images(draw_shapes(8, SIZE)), draws_of(8)
    whole = augment(images, draws, config)
    parts = torch.cat([augment(images[i : i + 1], draws[i : i + 1], config) for i in range(8)])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)  # measured worst difference: 5e-7
    assert not torch.equal(whole, images)


@pytest.mark.parametrize("fields", [{"flip_share": 1.5}, {"max_shift": -0.1}, {"max_scale": 1.0}, {"max_hue": 200.0}])
def test_augmentation_errors_name_the_key(fields: dict) -> None:
    with pytest.raises(ValueError, match=f"augment.{next(iter(fields))}"):
        AugmentConfig(**fields)


def test_what_was_written_is_what_is_decoded(shape_shards: Path, draw_shapes: Draw) -> None:
    names, pixels = decode_first([shape_shards], SIZE, SampleLimits(), 3)
    assert torch.equal(pixels, draw_shapes(3, SIZE))
    assert len(names) == 3


def test_all_pictures_are_decoded_or_none_is_kept(shape_shards: Path) -> None:
    names, pixels = decode_first([shape_shards], SIZE, SampleLimits(), 100)
    found = decode_all([shape_shards], SIZE, SampleLimits(), 11)
    assert found is not None
    assert [picture.key for picture in found] == names
    assert torch.equal(torch.stack([picture.pixels for picture in found]), pixels)
    assert len(names) == 11
    assert decode_all([shape_shards], SIZE, SampleLimits(), 10) is None
    assert decode_all([shape_shards], SIZE, SampleLimits(), 0) is None
