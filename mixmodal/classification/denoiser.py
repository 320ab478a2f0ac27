"""A trained denoiser as a plain folder, whose U-Net and scheduler diffusers loads.

denoiser.json  unet/  scheduler/  README.md
classes.txt                                                         where it is told classes
text_tokenizer.model (or .json)  text_encoder.json  text_encoder.safetensors   where it is told texts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixmodal.classification.datasets import NamedClass, read_classes
from mixmodal.files import read_object, write_whole
from mixmodal.models.denoiser import (
    Denoiser,
    TextEncoder,
    TextEncoderConfig,
    condition_inputs,
    import_diffusers,
)
from mixmodal.records import write_json
from mixmodal.tokenization.conditions import ClassNames, ConditionEncoder, TextTokens
from mixmodal.tokenization.preprocessing import Preprocess
from mixmodal.tokenization.text_files import PieceTokenizer, load_text_tokenizer

DESCRIPTION = "denoiser.json"
CLASSES = "classes.txt"
TEXT_TOKENIZERS = "text_tokenizer.model", "text_tokenizer.json"
TEXT_CONFIG = "text_encoder.json"
TEXT_WEIGHTS = "text_encoder.safetensors"
PREPROCESS: Preprocess = "meta"
"""How pictures are brought to size, for training and for whatever is done with the denoiser later."""


class LoadedDenoiser(NamedTuple):
    """A trained denoiser in evaluation mode, in pixel space: pictures `(B, 3, H, W)` in [-1, 1].

    Args:
        unet: `UNet2DModel` or `UNet2DConditionModel`, called as `unet(noisy, timesteps, **encode(...))`.
        scheduler: `DDPMScheduler`; its `alphas_cumprod` and `config.prediction_type` say what the U-Net predicts.
        image_size: side of the pictures in pixels.
        classes: that it is told, in the order of their numbers; none where it is told texts.
        conditions: strings to classes `(B,)` or tokens `(B, T)`.
        features: of tokens; None where classes are told.
    """

    unet: Any
    scheduler: Any
    image_size: int
    classes: tuple[NamedClass, ...]
    conditions: ConditionEncoder
    features: TextEncoder | None

    @torch.no_grad()
    def encode(self, conditions: Sequence[str]) -> dict[str, Tensor]:
        """What the U-Net is called with beside noisy pictures and times, on its device; the first dimension is B.

        Args:
            conditions: labels or captions of classes, or texts; the empty string is no condition.

        Raises:
            ValueError: naming what is no class.
        """
        return condition_inputs(self.conditions.encode(conditions).to(self.unet.device), self.features)


def save_denoiser(
    model: Denoiser,
    folder: Path,
    *,
    scheduler: Any,
    card: str,
    classes: Sequence[NamedClass] = (),
    tokenizer: PieceTokenizer | None = None,
) -> None:
    """Writes the folder; files of the same names are replaced.

    Args:
        model: on any device, whole.
        folder: created where needed.
        scheduler: that it was trained with.
        card: of the model, in Markdown.
        classes: where it is told classes.
        tokenizer: where it is told texts.
    """
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    model.unet.save_pretrained(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    told = "text" if model.text_encoder else "class"
    description = {"condition": told, "image_size": model.config.image_size, "preprocess": PREPROCESS}
    write_json(folder / DESCRIPTION, description)
    if model.text_encoder:
        assert tokenizer is not None
        for name in TEXT_TOKENIZERS:
            (folder / name).unlink(missing_ok=True)
        tokenizer.save(folder / f"text_tokenizer{tokenizer.suffix}")
        write_json(folder / TEXT_CONFIG, asdict(model.text_encoder.config))
        weights = {name: value.detach().cpu().contiguous() for name, value in model.text_encoder.state_dict().items()}
        write_whole(folder / TEXT_WEIGHTS, save(weights))
    else:
        lines = [f"{one.label}\n" if one.label == one.caption else f"{one.label}\t{one.caption}\n" for one in classes]
        write_whole(folder / CLASSES, "".join(lines).encode())
    write_whole(folder / "README.md", card.encode())


def load_denoiser(folder: Path | str, device: torch.device | str = "cpu") -> LoadedDenoiser:
    """Reads the folder that `mixmodal train-diffusion` exports.

    Args:
        folder: of the export.
        device: to compute on.

    Raises:
        ValueError: naming the folder or file that is missing or broken, or where diffusers is not installed.
    """
    folder = Path(folder)
    diffusers = import_diffusers()
    description = _read_json(folder / DESCRIPTION)
    told = description.get("condition")
    if told not in ("class", "text"):
        raise ValueError(f"{folder / DESCRIPTION}: condition is {told!r}; it must be 'class' or 'text'")
    kind = diffusers.UNet2DModel if told == "class" else diffusers.UNet2DConditionModel
    try:
        unet = kind.from_pretrained(folder / "unet", use_safetensors=True, low_cpu_mem_usage=False)
        scheduler = diffusers.DDPMScheduler.from_pretrained(folder / "scheduler")
    except (OSError, KeyError, RuntimeError) as error:
        raise ValueError(f"{folder}: the U-Net or the scheduler can not be read: {error}") from error
    classes: tuple[NamedClass, ...] = ()
    encoder = None
    if told == "class":
        classes = tuple(read_classes(folder / CLASSES))
        conditions: ConditionEncoder = ClassNames(classes)
    else:
        settings = TextEncoderConfig(**_read_json(folder / TEXT_CONFIG))
        found = [folder / name for name in TEXT_TOKENIZERS if (folder / name).is_file()]
        tokenizer = load_text_tokenizer(found[0] if found else folder / TEXT_TOKENIZERS[0])
        encoder = _load_text_encoder(settings, tokenizer.num_pieces, folder / TEXT_WEIGHTS).to(device).eval()
        conditions = TextTokens(tokenizer, settings.max_text_tokens)
    return LoadedDenoiser(
        unet=unet.to(device).eval(),
        scheduler=scheduler,
        image_size=int(description["image_size"]),
        classes=classes,
        conditions=conditions,
        features=encoder,
    )


def _load_text_encoder(config: TextEncoderConfig, num_pieces: int, path: Path) -> TextEncoder:
    from mixmodal.weights import read_weights

    encoder = TextEncoder(config, num_pieces)
    try:
        encoder.load_state_dict(dict(read_weights(path)))
    except RuntimeError as error:
        raise ValueError(f"{path} holds no text encoder of the sizes of {TEXT_CONFIG}: {error}") from error
    return encoder


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; `mixmodal train-diffusion` writes the folder of a denoiser")
    return read_object(path)
