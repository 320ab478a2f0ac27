"""A trained two-tower encoder as a plain folder of transformers: `AutoModel` and `AutoProcessor` load it.

config.json  model.safetensors  tokenizer.json  tokenizer_config.json  processor_config.json  README.md
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmodal.files import write_whole
from mixmodal.models.two_tower import TwoTower, TwoTowerConfig, import_transformers
from mixmodal.tokenization.preprocessing import Preprocess

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PREPROCESS: Preprocess = "transformers"
"""How pictures are resized for encoders: as the image processor of the exported folder does it."""
LANCZOS = 1
"""PIL's number of the filter, which the JSON files of transformers hold."""


def save_two_tower(
    model: TwoTower,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    card: str,
    max_scale: float | None = None,
) -> None:
    """Writes the folder.

    Args:
        model: on any device, whole.
        tokenizer: that its texts were spelled with.
        folder: created where needed; files of the same names are replaced.
        card: of the model, in Markdown.
        max_scale: logits were never multiplied by more than this in training; the weight is brought down to it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu() for name, value in model.encoder.state_dict().items()}
    if model.config.kind == "clip":  # a scalar in files of CLIP
        weights["logit_scale"] = weights["logit_scale"].reshape(())
    if max_scale is not None:
        weights["logit_scale"] = weights["logit_scale"].clamp(max=math.log(max_scale))
    with quiet():
        model.encoder.save_pretrained(folder, state_dict=weights)
    build_processor(model.config, tokenizer).save_pretrained(folder)
    write_whole(folder / "README.md", card.encode())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bar of transformers, which shows the files of a folder as they are written."""
    logging = import_transformers().utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def build_processor(config: TwoTowerConfig, tokenizer: PreTrainedTokenizerFast) -> Any:
    """What makes inputs of texts and pictures.

    Pictures go through `open_picture` and `resize_and_crop` in the words of transformers, for both kinds: SigLIP's own
    image processor would press them into a square. Values are the same but for pictures longer than `MAX_ASPECT` short
    sides, which are resized whole here.
    """
    transformers = import_transformers()
    pictures = transformers.CLIPImageProcessorPil(**picture_settings(config.image_size))
    kind = transformers.CLIPProcessor if config.kind == "clip" else transformers.SiglipProcessor
    return kind(image_processor=pictures, tokenizer=tokenizer)


def picture_settings(image_size: int) -> Mapping[str, Any]:
    """Short side to `image_size` by Lanczos, the centre square, values in [-1, 1]."""
    return {
        "size": {"shortest_edge": image_size},
        "crop_size": {"height": image_size, "width": image_size},
        "resample": LANCZOS,
        "do_convert_rgb": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "rescale_factor": 1 / 255,
    }
