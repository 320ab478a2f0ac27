"""Pictures to codes and back: autoencoder and quantizer as one tokenizer, and its folder on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mixmodal.files import read_object, write_whole
from mixmodal.tokenization.autoencoder import AutoencoderConfig, Decoder, Encoder, channels_last, check_autoencoder
from mixmodal.tokenization.preprocessing import Preprocess, check_preprocess, to_encoder_range
from mixmodal.tokenization.quantizer import build_quantizer, check_quantizer
from mixmodal.tokenization.quantizer_base import Quantized, QuantizerConfig

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
FORMAT_VERSION = 1

Config = TypeVar("Config")


@dataclass(frozen=True, kw_only=True)
class ImageTokenizerConfig:
    """An image tokenizer.

    Args:
        image_size: height and width of the pictures, pixels.
        preprocess: how pictures of other sizes and the range of their values are brought to the encoder: as Chameleon's
            own code does it (`meta`), or as `transformers` does, which gives other codes. Both decode alike.
        autoencoder: encoder and decoder.
        quantizer: how latents become codes.
    """

    image_size: int = 256
    preprocess: Preprocess = "meta"
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)

    @property
    def grid(self) -> tuple[int, int]:
        """Codes of a picture, `(h, w)`; a quantizer with several codes a place makes it that many times wider."""
        side = self.image_size // self.autoencoder.downsampling
        return side, side * self.quantizer.codes_per_place

    def size_of(self, grid: Sequence[int]) -> tuple[int, int]:
        """Width and height in pixels of a picture of a grid of codes `(h, w)`."""
        pixels = self.autoencoder.downsampling
        return grid[1] * pixels // self.quantizer.codes_per_place, grid[0] * pixels


class ImageTokenizer(nn.Module):
    """Images `(B, 3, H, W)` in [-1, 1] to codes `(B, h, w)` and back.

    They have the sides `image_size`, or where `takes_other_sizes` any that are multiples of the pixels of a code.

    Args:
        config: its sizes.
        encoder_only: there is no decoder, as in transformers' Chameleon: pictures can be read, and none drawn.

    Raises:
        ValueError: naming the key of a value that can not work.
    """

    def __init__(self, config: ImageTokenizerConfig, *, encoder_only: bool = False) -> None:
        super().__init__()
        check_autoencoder(config.autoencoder, config.image_size)
        check_quantizer(config.quantizer)
        check_preprocess(config.preprocess)
        self.config = config
        self.quantizer = build_quantizer(config.quantizer)
        self.encoder = Encoder(config.autoencoder, config.image_size, self.quantizer.codebook_dim)
        self.decoder = None
        if not encoder_only:
            self.decoder = Decoder(config.autoencoder, config.image_size, self.quantizer.codebook_dim)

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return self.quantizer.codebook_size

    @property
    def grid(self) -> tuple[int, int]:
        """Codes of a picture, `(h, w)`."""
        return self.config.grid

    @property
    def takes_other_sizes(self) -> bool:
        """Whether heights and widths need not be `image_size`: where nothing has learned positions of the grid."""
        return "transformer" not in self.config.autoencoder.mid_blocks

    def codes_along(self, pixels: int) -> int:
        """Codes along so many pixels of a side, for pictures of several sizes.

        Raises:
            ValueError: where the tokenizer takes one size only, or they are not whole codes, one for each place.
        """
        downsampling = self.config.autoencoder.downsampling
        if not self.takes_other_sizes:
            raise ValueError(
                "image tokenizer: it takes pictures of one size only, for its transformer blocks have learned "
                "positions; pictures of several sizes need one without (autoencoder.mid_blocks)"
            )
        if pixels % downsampling or self.config.quantizer.codes_per_place != 1:
            raise ValueError(
                f"image tokenizer: pictures of several sizes need one code for each place and whole codes in {pixels} "
                f"pixels; it has {self.config.quantizer.codes_per_place}, each of {downsampling} pixels"
            )
        return pixels // downsampling

    def forward(self, images: Tensor) -> tuple[Tensor, Quantized]:
        """Images to their reconstructions `(B, 3, H, W)`, float32 and not clamped, and what the quantizer did."""
        self._check_images(images)
        decoder = self.check_decoder()
        images = to_encoder_range(images, self.config.preprocess).to(self.dtype)
        quantized = self.quantizer(self.encoder(channels_last(images)))
        return decoder(quantized.latents.to(self.dtype)).float(), quantized

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` in [-1, 1] to codes, int64 `(B, h, w)`.

        In the precision of the weights whatever autocast says: the codes of a picture do not depend on the caller.
        """
        return self.quantizer.latents_to_codes(self.encode_to_latents(images))

    @torch.no_grad()
    def encode_to_latents(self, images: Tensor) -> Tensor:
        """What the quantizer codes of images `(B, 3, H, W)` in [-1, 1]: `(B, C, h', w')` in the weights' precision.

        `quantizer.latents_to_codes` of it is what `encode` gives.
        """
        self._check_images(images)
        with torch.autocast(images.device.type, enabled=False):
            images = to_encoder_range(images, self.config.preprocess).to(self.dtype)
            return self.encoder(channels_last(images))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes, int64 `(B, h, w)`, to images `(B, 3, H, W)` in [-1, 1], float32.

        Raises:
            ValueError: where there is no decoder.
        """
        self._check_codes(codes)
        decoder = self.check_decoder()
        with torch.autocast(codes.device.type, enabled=False):
            latents = self.quantizer.codes_to_latents(codes)
            return decoder(latents.to(self.dtype)).float().clamp(-1, 1)

    def check_decoder(self) -> Decoder:
        """The decoder.

        Raises:
            ValueError: where there is none.
        """
        if self.decoder is None:
            raise ValueError(
                "this image tokenizer has no decoder, since the checkpoint that it was imported from had none: it "
                "reads pictures and draws none. Import again with --image_tokenizer vqgan.ckpt of Meta's download"
            )
        return self.decoder

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.conv_in.weight.dtype

    def _check_images(self, images: Tensor) -> None:
        side, pixels = self.config.image_size, self.config.autoencoder.downsampling
        shape = tuple(images.shape)
        if images.ndim == 4 and shape[1:] == (3, side, side):
            return
        if not self.takes_other_sizes:
            raise ValueError(f"image tokenizer: images of shape {shape} instead of (B, 3, {side}, {side})")
        if images.ndim != 4 or shape[1] != 3 or not min(shape[2:]) or shape[2] % pixels or shape[3] % pixels:
            raise ValueError(
                f"image tokenizer: images of shape {shape} instead of (B, 3, H, W) with H and W multiples of {pixels}"
            )

    def _check_codes(self, codes: Tensor) -> None:
        shape = tuple(codes.shape)
        if codes.ndim != 3 or (shape[1:] != self.grid and not self.takes_other_sizes):
            raise ValueError(f"image tokenizer: codes of shape {shape} instead of (B, *{self.grid})")
        if not min(shape[1:]) or shape[2] % self.quantizer.codes_per_place:
            raise ValueError(
                f"image tokenizer: codes of shape {shape} are no (B, h, w) with {self.quantizer.codes_per_place} for "
                "each place"
            )
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codebook_size:
            raise ValueError(f"image tokenizer: codes must lie in 0 .. {self.codebook_size - 1}")

    def save(self, directory: Path | str) -> None:
        """Write `config.json` and `model.safetensors`; the folder is made where it is missing."""
        from safetensors.torch import save

        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        data = {"format_version": FORMAT_VERSION, "image_tokenizer": asdict(self.config)}
        if self.decoder is None:
            data["encoder_only"] = True
        write_whole(folder / WEIGHTS_NAME, save(state))
        write_whole(folder / CONFIG_NAME, (json.dumps(data, indent=2) + "\n").encode())

    @classmethod
    def load(cls, directory: Path | str) -> ImageTokenizer:
        """The tokenizer in a folder that `save` wrote, on the CPU and in evaluation mode.

        Raises:
            ValueError: naming the file, for a folder that is not one, or weights of another architecture or that are no
                numbers.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(directory)
        weights = folder / WEIGHTS_NAME
        tokenizer = cls(read_config(folder), encoder_only=is_encoder_only(folder))
        try:
            state = load_file(weights)
        except SafetensorError as error:
            raise ValueError(f"image tokenizer: {weights} is not a whole safetensors file: {error}") from error
        wanted = {name: tuple(tensor.shape) for name, tensor in tokenizer.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        differing = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
        if differing:
            name = differing[0]
            raise ValueError(
                f"image tokenizer: {weights} holds weights of another architecture than {folder / CONFIG_NAME}: "
                f"{len(differing)} tensors differ, the first is {name}, {found.get(name, 'missing')} in the file and "
                f"{wanted.get(name, 'not there')} in the config. Take both files from one training run"
            )
        for name, tensor in state.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(f"image tokenizer: {weights}: tensor {name} holds NaN or infinity; train it again")
        tokenizer.load_state_dict(state)
        return tokenizer.eval()

    @staticmethod
    def sha256(directory: Path | str) -> str:
        """Hex SHA-256 of a saved tokenizer: equal digests mean equal codes and pictures.

        Raises:
            ValueError: where the folder does not hold a tokenizer.
        """
        check_folder(Path(directory))
        digest = hashlib.sha256()
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            digest.update(hashlib.sha256((Path(directory) / name).read_bytes()).digest())
        return digest.hexdigest()


def is_saved(folder: Path) -> bool:
    """Whether a folder holds the files of an image tokenizer that `save` wrote."""
    config = folder / CONFIG_NAME
    return config.is_file() and b'"image_tokenizer"' in config.read_bytes() and (folder / WEIGHTS_NAME).is_file()


def check_folder(folder: Path) -> None:
    """Complain where a folder does not hold an image tokenizer."""
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise ValueError(
                f"image tokenizer: {folder / name} does not exist; give the folder of a trained image tokenizer "
                "(`mixmodal train-image-tokenizer` writes one to RUN/export)"
            )


def read_config(folder: Path) -> ImageTokenizerConfig:
    """The config of a saved tokenizer.

    Raises:
        ValueError: naming the file.
    """
    check_folder(folder)
    path = folder / CONFIG_NAME
    try:
        data = read_object(path)
        version, section = data["format_version"], data["image_tokenizer"]
        if version != FORMAT_VERSION:
            raise ValueError(f"format_version is {version}, this version reads {FORMAT_VERSION}")
        autoencoder = config_from_dict(AutoencoderConfig, section["autoencoder"])
        quantizer = config_from_dict(QuantizerConfig, section["quantizer"])
        preprocess = section.get("preprocess", "meta")  # older folders do not name it
        check_preprocess(preprocess)
        return ImageTokenizerConfig(
            image_size=section["image_size"], preprocess=preprocess, autoencoder=autoencoder, quantizer=quantizer
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"image tokenizer: {path} is not the config of an image tokenizer: {error}") from error


def is_encoder_only(folder: Path) -> bool:
    """Whether a saved tokenizer, whose config can be read, has no decoder."""
    return read_object(folder / CONFIG_NAME).get("encoder_only") is True


def config_from_dict(config_type: type[Config], data: dict[str, Any]) -> Config:
    """A flat config from JSON; lists become tuples again.

    Raises:
        ValueError: for a key that the config does not have.
    """
    unknown = set(data) - {entry.name for entry in fields(config_type)}  # type: ignore[arg-type]
    if unknown:
        raise ValueError(f"{config_type.__name__} has no key {', '.join(sorted(unknown))}")
    return config_type(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})
