"""VGG16's features on random weights against the convolutions written out."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from mixmodal.models.vgg import STAGE_CHANNELS, load_lpips_weights, load_vgg16
from mixmodal.objectives.perceptual import shipped_lpips_weights

# torchvision's numbers of the convolutions of vgg16().features, a pooling between the groups
CONVS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))


def random_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict in torchvision's layout, with a tensor of the classifier."""
    generator = torch.Generator().manual_seed(seed)
    state, channels = {"classifier.0.bias": torch.zeros(4)}, 3
    for width, numbers in zip(STAGE_CHANNELS, CONVS, strict=True):
        for number in numbers:
            deviation = (2 / (9 * channels)) ** 0.5
            state[f"features.{number}.weight"] = deviation * torch.randn(width, channels, 3, 3, generator=generator)
            state[f"features.{number}.bias"] = 0.1 * torch.randn(width, generator=generator)
            channels = width
    return state


def test_features_are_the_convolutions_written_out(tmp_path: Path) -> None:
    state = random_state()
    torch.save(state, tmp_path / "vgg16.pth")
    images = torch.rand(2, 3, 32, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, deviation = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x = (images - mean.view(1, 3, 1, 1)) / deviation.view(1, 3, 1, 1)
    layers = load_vgg16(tmp_path / "vgg16.pth").layers(images)
    for stage, numbers in enumerate(CONVS):
        x = F.max_pool2d(x, 2) if stage else x
        for number in numbers:
            x = F.relu(F.conv2d(x, state[f"features.{number}.weight"], state[f"features.{number}.bias"], padding=1))
        assert torch.equal(layers[stage], x)


def test_both_kinds_of_file_load_alike(tmp_path: Path) -> None:
    state = random_state()
    torch.save(state, tmp_path / "vgg16.pth")
    save_file(state, tmp_path / "vgg16.safetensors")
    one, two = (load_vgg16(tmp_path / name).state_dict() for name in ("vgg16.pth", "vgg16.safetensors"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


class Trap:
    def __reduce__(self) -> tuple:
        return (Path("ran").touch, ())


def test_files_that_can_not_work_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "vgg16.pth"
    with pytest.raises(ValueError, match=r"vgg16\.pth does not exist"):
        load_vgg16(path)
    torch.save(Trap(), path)
    with pytest.raises(ValueError, match=r"vgg16\.pth can not be read without running code"):
        load_vgg16(path)
    assert not (tmp_path / "ran").exists()
    path.write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match=r"vgg16\.pth is not a whole file of torch.save"):
        load_vgg16(path)
    (tmp_path / "cut.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"cut\.safetensors is not a whole safetensors file"):
        load_vgg16(tmp_path / "cut.safetensors")
    torch.save([torch.zeros(1)], path)
    with pytest.raises(ValueError, match="holds no named tensors"):
        load_vgg16(path)
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, path)
    with pytest.raises(ValueError, match=r"25 of 26 tensors are missing .* first is features\.0\.bias"):
        load_vgg16(path)


def test_lpips_weights_are_read_and_those_of_another_network_refused(tmp_path: Path) -> None:
    weights = load_lpips_weights(shipped_lpips_weights())
    assert [len(weight) for weight in weights] == list(STAGE_CHANNELS)
    assert all(weight.min() >= 0 and weight.max() > 0 for weight in weights)  # LPIPS keeps them from being negative
    with pytest.raises(ValueError, match=r"alex\.pth is not for VGG16: lin1\.model\.1\.weight"):
        load_lpips_weights(shipped_lpips_weights().with_name("alex.pth"))


def test_pictures_below_sixteen_pixels_are_refused(tmp_path: Path) -> None:
    torch.save(random_state(), tmp_path / "vgg16.pth")
    network = load_vgg16(tmp_path / "vgg16.pth")
    assert network.layers(torch.zeros(1, 3, 16, 16))[-1].shape == (1, 512, 1, 1)
    with pytest.raises(ValueError, match="it needs 16 a side"):
        network.layers(torch.zeros(1, 3, 15, 16))
