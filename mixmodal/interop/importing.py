"""Foreign checkpoints into folders of ours: the command `mixmodal import`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mixmodal.tokenization.preprocessing import Preprocess

if TYPE_CHECKING:
    from mixmodal.interop.vqgan import ForeignImageTokenizer


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """What to import, and where to: `mixmodal import SOURCE --out DIR --image_size N`.

    Args:
        source: file or folder of an image tokenizer of the VQGAN family: Chameleon's vqgan.ckpt, taming, LlamaGen, or
            diffusers' VQModel.
        out: folder for the image tokenizer; it must be empty or new.
        image_size: height and width of the pictures that it shall code, pixels; 512 for Chameleon, which its model
            knows no others of.
        preprocess: how pictures become images for the encoder: as Meta's code or as transformers' does it.
    """

    source: Path
    out: Path
    image_size: int
    preprocess: Preprocess = "meta"

    def __post_init__(self) -> None:
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise ValueError(f"out: {self.out} is there and not empty; choose a new folder")

    @staticmethod
    def read_arguments(argv: list[str]) -> list[str]:
        """Lets the source stand alone, in the first place."""
        return ["--source", *argv] if argv and not argv[0].startswith("-") else argv


def import_checkpoint(config: ImportConfig) -> ForeignImageTokenizer:
    """Writes the folder that `ImageTokenizer.load` reads, and says what was found.

    Raises:
        ValueError: naming the file that can not be read, or is of another architecture.
    """
    from mixmodal.interop.vqgan import load_vqgan

    found = load_vqgan(config.source, config.image_size, preprocess=config.preprocess)
    found.tokenizer.save(config.out)
    for name, value in summary(found).items():
        print(f"{name:>15}  {value}")
    print(f"{'written to':>15}  {config.out}")
    return found


def summary(found: ForeignImageTokenizer) -> dict[str, str]:
    """What was found, in words."""
    config = found.tokenizer.config
    autoencoder, quantizer = config.autoencoder, config.quantizer
    stages = ", ".join(map(str, autoencoder.attention_stages)) or "none"
    height, width = found.tokenizer.grid
    skipped = ", ".join(f"{number} of {name}" for name, number in found.skipped.items()) or "none"
    return {
        "layout": found.layout,
        "tensors": f"{found.num_tensors} taken over, skipped: {skipped}",
        "channels": f"{autoencoder.channels} times {list(autoencoder.channel_multipliers)}",
        "ResBlocks": f"{autoencoder.num_res_blocks} a stage, {autoencoder.num_decoder_res_blocks} in the decoder",
        "attention": f"{'on the grid, ' if 'attention' in autoencoder.mid_blocks else ''}in stages: {stages}",
        "codes": f"{quantizer.codebook_size:,} of {quantizer.codebook_dim} dimensions ({quantizer.kind})",
        "pictures": f"{config.image_size} pixels, {height} x {width} codes, preprocess {config.preprocess}",
    }
