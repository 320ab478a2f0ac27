"""Distances of sets of pictures: equal to torchmetrics on the same features, and to sets that can be counted."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mixmodal.evaluation import generation
from mixmodal.evaluation.generation import FEATURE_BATCH, embed, frechet_distance, kernel_distance, precision_recall


@pytest.fixture
def sets() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(60, 6, generator=generator)
    return real, 0.8 * torch.randn(50, 6, generator=generator) + 0.3


class Given(nn.Module):
    num_features = 6

    def forward(self, features: Tensor) -> Tensor:
        return features


def test_frechet_distance_is_the_formula_and_that_of_torchmetrics(sets: tuple[Tensor, Tensor]) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, drawn = (side.double().numpy() for side in sets)
    one, two = np.cov(real, rowvar=False), np.cov(drawn, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(one @ two).real).sum()
    formula = ((real.mean(0) - drawn.mean(0)) ** 2).sum() + np.trace(one) + np.trace(two) - 2 * roots
    found = frechet_distance(*sets)
    assert found == pytest.approx(formula, rel=1e-9)
    metric = FrechetInceptionDistance(feature=Given()).set_dtype(torch.float64)
    metric.update(sets[0].double(), real=True)
    metric.update(sets[1].double(), real=False)
    assert found == pytest.approx(float(metric.compute()), rel=1e-9)
    assert frechet_distance(sets[0], sets[0]) == pytest.approx(0, abs=1e-9)


def test_kernel_distance_is_that_of_torchmetrics_and_of_the_sums(sets: tuple[Tensor, Tensor]) -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    real, drawn = sets[0][:50], sets[1]
    found = kernel_distance(real, drawn, subset_size=50, num_subsets=2)  # of all: which subset does not matter
    with pytest.warns(UserWarning, match="will save all extracted features"):
        metric = KernelInceptionDistance(feature=Given(), subsets=2, subset_size=50)
    metric.update(real, real=True)
    metric.update(drawn, real=False)
    assert found.mean == pytest.approx(float(metric.compute()[0]), rel=1e-5)  # torchmetrics sums in float32
    x, y = real.double().numpy(), drawn.double().numpy()
    kernels = [(a @ b.T / 6 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    within = sum((k.sum() - np.trace(k)) / (50 * 49) for k in kernels[:2])
    assert found.mean == pytest.approx(within - 2 * kernels[2].mean(), rel=1e-9)
    assert found.deviation == pytest.approx(0, abs=1e-12)


def test_subsets_of_the_kernel_distance_depend_on_the_seed_alone(sets: tuple[Tensor, Tensor]) -> None:
    options = {"subset_size": 10, "num_subsets": 5}
    assert kernel_distance(*sets, **options, seed=1) == kernel_distance(*sets, **options, seed=1)
    assert kernel_distance(*sets, **options, seed=1) != kernel_distance(*sets, **options, seed=2)


def test_precision_and_recall_of_points_on_a_line() -> None:
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    drawn = torch.tensor([[0.5], [1.5], [40.0], [41.0]])  # within real: the first two; radii of real 1, 1, 1, 8
    assert precision_recall(real, drawn, 1) == (0.5, 0.75)  # radii of drawn 1, 1, 1, 1: 0, 1 and 2 lie within, 10 not
    assert precision_recall(real, real, 3) == (1.0, 1.0)


def test_rows_at_a_time_do_not_change_precision_and_recall(
    sets: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = precision_recall(*sets)
    assert 0 < whole.recall < 1
    monkeypatch.setattr(generation, "ROWS_AT_A_TIME", 7)
    assert precision_recall(*sets) == whole


def test_features_are_taken_in_batches_of_one_size() -> None:
    sizes: list[int] = []

    class Means(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            sizes.append(len(pixels))
            return pixels.float().mean((2, 3))

    pixels = [torch.full((3, 2, 2), value, dtype=torch.uint8) for value in range(FEATURE_BATCH + 3)]
    found = embed(Means(), iter(pixels))
    assert sizes == [FEATURE_BATCH, 3]
    assert found[:, 1].tolist() == list(range(FEATURE_BATCH + 3))


@pytest.mark.parametrize("measure", [frechet_distance, kernel_distance, precision_recall])
def test_too_few_pictures_are_refused(measure: object) -> None:
    with pytest.raises(ValueError, match="5 real and 1 drawn pictures; at least"):
        measure(torch.zeros(5, 2), torch.zeros(1, 2))  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"features of shapes \(5, 2\) and \(5, 3\) do not compare"):
        measure(torch.zeros(5, 2), torch.zeros(5, 3))  # type: ignore[operator]
    with pytest.raises(ValueError, match="there are no pictures"):
        embed(Given(), [])
