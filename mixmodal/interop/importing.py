"""Foreign checkpoints into folders of ours: the command `mixmodal import`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mixmodal.document import FormatName
from mixmodal.files import check_new_folder
from mixmodal.tokenization.preprocessing import Preprocess

if TYPE_CHECKING:
    from mixmodal.interop.chameleon.checkpoint import Checkpoint
    from mixmodal.interop.vqgan import ForeignImageTokenizer

LayoutChoice = Literal["auto", "meta", "anole", "transformers-4.43", "transformers", "llama"]


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """What to import, and where to: `mixmodal import SOURCE --out DIR`.

    SOURCE is a model of the Chameleon family (Chameleon, Anole, Lumina-mGPT) in any of their four layouts, a text model
    of Llama's kind, which gets rows for pictures, or an image tokenizer of the VQGAN family alone. Which it is, is read
    from names and shapes. Models are copied tensor by tensor, so that memory need not hold one.

    Args:
        source: a folder, or a file of weights; in Meta's download `models/7b`, or the folder above where there is one
            model. For an image tokenizer a file or folder of Chameleon's vqgan.ckpt, taming, LlamaGen, or diffusers'
            VQModel.
        out: folder for what is imported; it must be empty or new.
        image_tokenizer: the image tokenizer of a model: vqgan.ckpt, or a folder of ours; null looks beside the weights,
            and then among them. transformers keeps the encoder alone: pictures can be read then, and none drawn.
        text_tokenizer: its text tokenizer, a tokenizer.json; null looks beside the weights.
        layout: the layout of a model; `auto` finds it. A wrong one is refused.
        norm_placement: where the norms of a model stand, `pre` (7B) or `post_sublayer` (34B), where no params.json or
            config.json beside the weights says it.
        sequence_format: how the model spells documents: `chameleon` for Chameleon and Anole, `lumina` for Lumina-mGPT.
        image_size: height and width of the pictures, pixels; null reads it beside the weights. An image tokenizer
            alone needs it, and its weights fit any; Chameleon knows 512 only.
        preprocess: how pictures become images for the encoder: as Meta's code or as transformers' does it.
        seed: of the rows that a text model gets for pictures.
    """

    source: Path
    out: Path
    image_tokenizer: Path | None = None
    text_tokenizer: Path | None = None
    layout: LayoutChoice = "auto"
    norm_placement: Literal["pre", "post_sublayer"] | None = None
    sequence_format: FormatName = "chameleon"
    image_size: int | None = None
    preprocess: Preprocess = "meta"
    seed: int = 0

    def __post_init__(self) -> None:
        check_new_folder(self.out, "out")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size is {self.image_size}; pixels are needed, at least 1")

    @staticmethod
    def read_arguments(argv: list[str]) -> list[str]:
        """Lets the source stand alone, in the first place."""
        return ["--source", *argv] if argv and not argv[0].startswith("-") else argv


MODEL_OPTIONS = ("image_tokenizer", "text_tokenizer", "layout", "norm_placement", "sequence_format", "seed")


def import_checkpoint(config: ImportConfig) -> None:
    """Writes the folder that `MixedModal.from_pretrained` or `ImageTokenizer.load` reads, and says what was found.

    Raises:
        ValueError: naming the file that can not be read, or is of another architecture.
    """
    from mixmodal.interop.chameleon.checkpoint import open_checkpoint
    from mixmodal.interop.export import is_export
    from mixmodal.tokenization.image import is_saved

    if is_export(config.source) or is_saved(config.source):
        raise ValueError(f"{config.source} is a folder of mixmodal's own; use it as it is")
    layout = None if config.layout == "auto" else config.layout
    checkpoint = open_checkpoint(config.source, layout, config.norm_placement)
    if checkpoint is not None:
        found = import_model(config, checkpoint)
    else:
        idle = [name for name in MODEL_OPTIONS if getattr(config, name) != getattr(ImportConfig, name)]
        if idle:
            raise ValueError(
                f"{config.source} holds no transformer, for which alone {', '.join(idle)} can be given: there are "
                "neither tok_embeddings.weight nor model.embed_tokens.weight"
            )
        found = import_image_tokenizer(config)
    for name, value in found.items():
        print(f"{name:>15}  {value}")


def import_model(config: ImportConfig, checkpoint: Checkpoint) -> dict[str, str]:
    """Writes an exported model; what was found, in words."""
    from mixmodal.interop.chameleon.reading import describe_import, gather_parts, write_model

    parts = gather_parts(
        checkpoint,
        text_tokenizer=config.text_tokenizer,
        image_tokenizer=config.image_tokenizer,
        image_size=config.image_size,
        preprocess=config.preprocess,
        sequence_format=config.sequence_format,
    )
    if config.seed and not parts.base:
        raise ValueError(f"seed {config.seed} can not act: {config.source} is no text model that gets new rows")
    if parts.format is None and config.sequence_format != ImportConfig.sequence_format:
        raise ValueError(
            f"sequence_format {config.sequence_format} can not act: {config.source} lacks {'; '.join(parts.missing)}"
        )
    size = write_model(checkpoint, parts, config.out, config.seed)
    return describe_import(checkpoint, parts, size, config.out)


def import_image_tokenizer(config: ImportConfig) -> dict[str, str]:
    """Writes an image tokenizer; what was found, in words."""
    from mixmodal.interop.vqgan import inner_weights, load_vqgan
    from mixmodal.weights import read_weights

    if config.image_size is None:
        try:
            inner_weights(read_weights(config.source))
        except ValueError as error:
            raise error if str(config.source) in str(error) else ValueError(f"{config.source}: {error}") from error
        raise ValueError(f"{config.source} is an image tokenizer alone, whose weights fit any size; give --image_size")
    found = load_vqgan(config.source, config.image_size, preprocess=config.preprocess)
    found.tokenizer.save(config.out)
    return {**summary(found), "written to": str(config.out)}


def summary(found: ForeignImageTokenizer) -> dict[str, str]:
    """What was found of an image tokenizer, in words."""
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
