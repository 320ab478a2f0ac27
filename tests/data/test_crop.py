"""Random resized crops, and that their draws leave the others as they were."""

import math

import numpy as np
import pytest
import torch

from mixmodal.data.augment import NUM_DRAWS, AugmentConfig, augment, crop, draw_changes

SIZE = 16


def draws_of(count: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([draw_changes(0, seed) for seed in range(count)]))


def crop_draws(area: float, aspect: float, across: float, down: float) -> torch.Tensor:
    draws = torch.zeros(1, NUM_DRAWS)
    draws[0, 7:12] = torch.tensor([0.0, area, aspect, across, down])
    return draws


def windows(draws: torch.Tensor, config: AugmentConfig) -> torch.Tensor:
    """Left, right, top and bottom of each cut part, in sides of the picture from 0 to 1: `(B, 4)`."""
    places = (torch.arange(64) + 0.5) / 64
    grid = torch.stack([places.expand(64, 64), places[:, None].expand(64, 64), torch.zeros(64, 64)])
    parts = crop(grid.expand(len(draws), 3, 64, 64), draws, config)
    across, down = parts[:, 0, 32], parts[:, 1, :, 32]
    ends = []
    for line in (across, down):
        step = (line[:, 40] - line[:, 24]) / 16  # inside, where no border is repeated
        ends += [line[:, 32] - 32.5 * step, line[:, 32] + 31.5 * step]
    return torch.stack(ends, dim=-1)


def test_draws_of_older_settings_stay_what_they_were() -> None:
    # what a golden curve hangs on: numpy's numbers, and that the first seven were all there were
    known = [0.55510962, 0.8817035, 0.29321599, 0.28917658, 0.55477369, 0.87103605, 0.93070495]
    assert draw_changes(0, 1, 2)[:7].tolist() == np.array(known, dtype=np.float32).tolist()
    assert np.array_equal(draw_changes(3, 1, 4)[:7], np.random.default_rng((3, 1, 4)).random(7, dtype=np.float32))
    config = AugmentConfig(flip_share=0.5, move_share=0.5, hue_share=0.5)
    images = torch.rand(8, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(augment(images, draws_of(8), config), augment(images, draws_of(8)[:, :7], config))


def test_a_crop_of_a_quarter_is_the_enlarged_quarter() -> None:
    blocks = torch.arange(4.0).view(1, 1, 2, 2).repeat_interleave(SIZE // 2, 2).repeat_interleave(SIZE // 2, 3) / 4
    config = AugmentConfig(crop_share=1.0, min_crop_area=0.25, max_crop_aspect=1.0)
    for place, (across, down) in enumerate(((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))):
        cut = augment(blocks.expand(1, 3, SIZE, SIZE), crop_draws(1.0, 0.5, across, down), config)
        inside = cut[:, :, 1:-1, 1:-1]  # the outermost row mixes half a pixel of the neighbour in
        torch.testing.assert_close(inside, torch.full_like(inside, place / 4), rtol=0, atol=1e-6)


def test_bilinear_weights_are_those_of_a_closed_form() -> None:
    ramp = torch.linspace(-1, 1, SIZE).expand(1, 3, SIZE, SIZE)
    config = AugmentConfig(crop_share=1.0, min_crop_area=0.25, max_crop_aspect=1.0)
    cut = augment(ramp, crop_draws(1.0, 0.5, 0.5, 0.5), config)  # the middle half of either side
    torch.testing.assert_close(cut, ramp / 2, rtol=0, atol=1e-6)  # measured worst difference: 6e-8


def test_parts_lie_inside_and_have_the_areas_and_aspects_asked_for() -> None:
    config = AugmentConfig(crop_share=1.0, min_crop_area=0.3, max_crop_aspect=1.5)
    left, right, top, bottom = windows(draws_of(400)[:, 7:12], config).T
    assert min(left.min(), top.min()) > -1e-3
    assert max(right.max(), bottom.max()) < 1 + 1e-3
    area, aspect = (right - left) * (bottom - top), (right - left) / (bottom - top)
    assert area.min() > 0.3 - 1e-3
    assert area.max() <= 1 + 1e-3
    assert float(area.mean()) == pytest.approx(0.65, abs=0.03)
    assert aspect.max() < 1.5 + 1e-2
    assert aspect.min() > 1 / 1.5 - 1e-2
    assert float(aspect.log().mean()) == pytest.approx(0.0, abs=0.03)
    assert aspect.log().abs().max() > 0.8 * math.log(1.5)


def test_crops_take_their_share_and_leave_the_others_alone() -> None:
    images = torch.rand(400, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = augment(images, draws_of(400), AugmentConfig(crop_share=0.25))
    kept = [torch.equal(one, two) for one, two in zip(found, images, strict=True)]
    assert 0.68 < np.mean(kept) < 0.82
    assert found.abs().max() <= 1


def test_a_picture_is_cropped_alike_in_any_batch() -> None:
    images = torch.rand(8, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    config, draws = AugmentConfig(crop_share=1.0), draws_of(8)
    parts = torch.cat([augment(images[i : i + 1], draws[i : i + 1], config) for i in range(8)])
    torch.testing.assert_close(augment(images, draws, config), parts, rtol=0, atol=1e-5)


def test_a_crop_counts_as_a_change() -> None:
    assert AugmentConfig(crop_share=0.1).changes_pictures
    assert not AugmentConfig(min_crop_area=0.1).changes_pictures


@pytest.mark.parametrize("fields", [{"crop_share": 1.5}, {"min_crop_area": 0.0}, {"max_crop_aspect": 0.9}])
def test_errors_name_the_key(fields: dict) -> None:
    with pytest.raises(ValueError, match=f"augment.{next(iter(fields))}"):
        AugmentConfig(**fields)
