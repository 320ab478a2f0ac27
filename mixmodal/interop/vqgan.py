"""Foreign image tokenizers of the VQGAN family as ours: taming (Chameleon's vqgan.ckpt), LlamaGen, diffusers' VQModel.

All of them compute what `tokenization/autoencoder.py` computes and differ in the names of the weights. Widths, depths,
attention and codebook are read from names and shapes; nothing is assumed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mixmodal.files import read_object
from mixmodal.interop.vqgan_names import (
    CODEBOOK,
    DIFFUSERS,
    DIFFUSERS_BEFORE_0_17,
    HALVES,
    LLAMAGEN,
    TAMING,
    Half,
    Layout,
    names,
)
from mixmodal.tokenization.autoencoder import AutoencoderConfig
from mixmodal.tokenization.image import ImageTokenizer, ImageTokenizerConfig
from mixmodal.tokenization.preprocessing import Preprocess
from mixmodal.tokenization.quantizer_base import QuantizerConfig
from mixmodal.weights import list_names, read_weights

NORM_GROUPS = 32
"""Of every GroupNorm in taming's and LlamaGen's code, where it can not be chosen."""


class ForeignImageTokenizer(NamedTuple):
    """What was found in a checkpoint.

    Args:
        tokenizer: ours, in evaluation mode on the CPU, float32.
        layout: name of the layout.
        num_tensors: tensors taken over.
        skipped: how many tensors were known and left out, by the beginning of their names.
    """

    tokenizer: ImageTokenizer
    layout: str
    num_tensors: int
    skipped: dict[str, int]


def load_vqgan(
    source: Path, image_size: int, *, preprocess: Preprocess = "meta", encoder_only: bool = False
) -> ForeignImageTokenizer:
    """The image tokenizer in a checkpoint of the VQGAN family.

    Args:
        source: file or folder, see `read_weights`; diffusers' `config.json` stands beside the weights.
        image_size: height and width of the pictures, pixels: the weights fit any.
        preprocess: how pictures become images for the encoder.
        encoder_only: take a checkpoint without decoder, as transformers' Chameleon is; the tokenizer has none then.

    Raises:
        ValueError: naming the file: unreadable, another architecture (with the names that are missing and
            unexpected), or without the decoder.
    """
    weights = read_weights(source)
    beside = (source if source.is_dir() else source.parent) / "config.json"
    try:
        return build_vqgan(
            weights, image_size, preprocess=preprocess, encoder_only=encoder_only, diffusers_config=beside
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def build_vqgan(
    weights: Mapping[str, Tensor],
    image_size: int,
    *,
    preprocess: Preprocess = "meta",
    encoder_only: bool = False,
    diffusers_config: Path | None = None,
) -> ForeignImageTokenizer:
    """`load_vqgan` for weights by name."""
    weights, num_outside, prefix = inner_weights(weights)
    layout = find_layout(weights)
    has_decoder = any(name.startswith("decoder.") for name in weights)
    if not has_decoder and not encoder_only:
        raise ValueError(
            "the picture decoder is missing, there are no decoder.* weights: transformers keeps Chameleon's encoder "
            "only; give vqgan.ckpt of Meta's download, which holds both"
        )
    groups = read_norm_groups(diffusers_config) if layout.name == DIFFUSERS.name else NORM_GROUPS
    skipped = {start: sum(name.startswith(start) for name in weights) for start in layout.skipped}
    kept = {name: value for name, value in weights.items() if not name.startswith(layout.skipped or ("\0",))}
    shapes = {name: tuple(tensor.shape) for name, tensor in kept.items()}
    try:
        autoencoder = read_autoencoder(layout, shapes, groups, has_decoder)
        codebook_size, codebook_dim = shapes[CODEBOOK]
    except KeyError as error:
        raise ValueError(differences([str(error.args[0])], [], [])) from error
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise ValueError("weights of another architecture: the codebook or a convolution has no such shape") from error
    quantizer = QuantizerConfig(
        kind=layout.quantizer_kind, codebook_size=codebook_size, codebook_dim=codebook_dim, update="gradient"
    )
    tokenizer = ImageTokenizer(
        ImageTokenizerConfig(
            image_size=image_size, preprocess=preprocess, autoencoder=autoencoder, quantizer=quantizer
        ),
        encoder_only=not has_decoder,
    )
    taken = fill(tokenizer, kept, dict(names(layout, autoencoder)))
    counts = {f"{start}*": number for start, number in skipped.items() if number}
    if num_outside:
        counts[f"all outside {prefix}*"] = num_outside
    return ForeignImageTokenizer(tokenizer.eval(), layout.name, taken, counts)


def inner_weights(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int, str]:
    """The tokenizer's own weights without their common prefix, how many others there are, and the prefix.

    The codebook, which all layouts call alike, shows the prefix; the weights of a language model around it are
    not read.
    """
    codebooks = [name for name in weights if name == CODEBOOK or name.endswith("." + CODEBOOK)]
    if len(codebooks) != 1:
        found = differences([] if codebooks else [CODEBOOK], codebooks or list(weights), [])
        raise ValueError(f"no image tokenizer of the VQGAN family has {len(codebooks)} codebooks: {found}")
    prefix = codebooks[0].removesuffix(CODEBOOK)
    inner = {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)}
    return inner, len(weights) - len(inner), prefix


def find_layout(weights: Mapping[str, Tensor]) -> Layout:
    """The layout of the names.

    Raises:
        ValueError: where it is none of those known here.
    """
    for layout in (TAMING, LLAMAGEN, DIFFUSERS):
        if any(name.startswith(layout.stages["encoder"].format(0) + ".") for name in weights):
            old = layout is DIFFUSERS and any(".attentions.0.query." in name for name in weights)
            return DIFFUSERS_BEFORE_0_17 if old else layout
    wanted = [layout.stages["encoder"].format(0) for layout in (TAMING, LLAMAGEN, DIFFUSERS)]
    raise ValueError(f"an unknown layout: {differences([' or '.join(wanted)], list(weights), [])}")


def read_norm_groups(config: Path | None) -> int:
    """Groups of each norm of a diffusers model, which its weights do not show.

    Raises:
        ValueError: where the config is missing, or asks for what ours does not compute.
    """
    if config is None or not config.is_file():
        raise ValueError("diffusers' config.json must stand beside the weights: it says how many groups norms have")
    data = read_object(config)
    for key, wanted in {"_class_name": "VQModel", "act_fn": "silu", "norm_type": "group"}.items():
        if data.get(key, wanted) != wanted:
            raise ValueError(f"{config}: {key} is {data[key]!r}; only {wanted!r} can be imported")
    groups = data.get("norm_num_groups", NORM_GROUPS)
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"{config}: norm_num_groups is {groups!r}; a number above 0 is needed")
    return groups


def read_autoencoder(
    layout: Layout, shapes: Mapping[str, tuple[int, ...]], norm_groups: int, has_decoder: bool
) -> AutoencoderConfig:
    """Widths, depths and attention from names and shapes.

    Raises:
        KeyError: with the name of a weight that is missing.
    """
    first = layout.stages["encoder"] + f".{layout.res.format(0)}.conv1.weight"
    num_stages = counted(shapes, first)
    channels = shapes["encoder.conv_in.weight"][0]
    widths = [shapes[first.format(stage)][0] for stage in range(max(1, num_stages))]
    depth: dict[Half, list[int]] = {
        half: [
            max(1, counted(shapes, f"{layout.stage(half, stage, num_stages)}.{layout.res}.conv1.weight"))
            for stage in range(num_stages)
        ]
        for half in HALVES
    }
    query = layout.attention_parts["q"] + ".weight"
    attention = [
        stage
        for stage in range(num_stages)
        if f"{layout.stage('encoder', stage, num_stages)}.{layout.attention.format(0)}.{query}" in shapes
    ]
    decoder_channels = channels
    if has_decoder:
        decoder_width = shapes["decoder.conv_in.weight"][0]
        decoder_channels = decoder_width * channels // widths[-1]
    else:
        depth["decoder"] = [number + 1 for number in depth["encoder"]]
    has_attention = f"encoder.{layout.mid_attention}.{query}" in shapes
    return AutoencoderConfig(
        channels=channels,
        decoder_channels=0 if decoder_channels == channels else decoder_channels,
        channel_multipliers=tuple(width // channels if not width % channels else width / channels for width in widths),
        num_res_blocks=one_or_each(depth["encoder"]),
        num_decoder_res_blocks=one_or_each(depth["decoder"]),
        mid_blocks=("res", "attention", "res") if has_attention else ("res", "res"),
        attention_stages=tuple(attention),
        latent_channels=shapes["encoder.conv_out.weight"][0],
        norm_groups=norm_groups,
    )


def counted(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    """How many of `pattern` there are, numbered from 0."""
    return next(number for number in count() if pattern.format(number) not in shapes)


def one_or_each(numbers: list[int]) -> int | tuple[int, ...]:
    """As configs write it: one number where all stages have the same."""
    return numbers[0] if len(set(numbers)) == 1 else tuple(numbers)


def fill(tokenizer: ImageTokenizer, weights: Mapping[str, Tensor], modules: Mapping[str, str]) -> int:
    """Puts their weights into ours, in float32; the number of tensors.

    Raises:
        ValueError: where names or shapes differ, or a weight is no finite number.
    """
    missing, reshaped, state = [], [], {}
    unexpected = set(weights)
    if tokenizer.decoder is None:  # transformers keeps the layer before the decoder
        before = modules["decoder.from_latents"]
        unexpected -= {f"{before}.weight", f"{before}.bias"}
    for name, own in tokenizer.state_dict().items():
        module, _, part = name.rpartition(".")
        theirs = f"{modules[module]}.{part}"
        found = weights.get(theirs)
        if found is None:
            missing.append(theirs)
            continue
        unexpected.discard(theirs)
        if found.ndim == 2 and own.ndim == 4:  # a linear layer is a 1x1 convolution
            found = found[..., None, None]
        if found.shape != own.shape:
            reshaped.append(f"{theirs} {tuple(found.shape)} instead of {tuple(own.shape)}")
        elif not found.is_floating_point() or not torch.isfinite(found.float()).all():
            raise ValueError(f"{theirs} holds values that are no finite floating-point numbers")
        state[name] = found
    if missing or unexpected or reshaped:
        raise ValueError(differences(missing, sorted(unexpected), reshaped))
    tokenizer.load_state_dict(state)
    return len(state)


def differences(missing: Iterable[str], unexpected: Iterable[str], reshaped: Iterable[str]) -> str:
    """What an architecture of another kind lacks and has."""
    kinds = {"missing": [*missing], "unexpected": [*unexpected], "of another shape": [*reshaped]}
    return f"weights of another architecture: {list_names(kinds)}"
