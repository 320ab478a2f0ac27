"""How projects of the VQGAN family name the weights that ours names otherwise: a table for each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from mixmodal.tokenization.autoencoder import AutoencoderConfig, depths

Half = Literal["encoder", "decoder"]
HALVES: tuple[Half, Half] = ("encoder", "decoder")

CODEBOOK = "quantize.embedding.weight"
"""Its name in all layouts."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one project names the weights; braces stand for numbers.

    Args:
        name: of the project.
        stages: the stages of each half.
        coarsest_first: whether the decoder's stage 0 is that of the code grid, as in ours.
        res: the ResBlocks of a stage.
        attention: its attention blocks.
        resamplers: the convolution between stages, in each half.
        mid_res: the two ResBlocks on the code grid.
        mid_attention: the attention block between them.
        norm_out: the last norm of a half.
        shortcut: the 1x1 convolution of a ResBlock that changes the width.
        attention_parts: our names of an attention block's layers to theirs.
        quantizer_kind: ours that chooses codes as theirs does.
        skipped: beginnings of names that are known and not needed: losses, discriminators, counters.
    """

    name: str
    stages: dict[Half, str]
    coarsest_first: bool
    res: str
    attention: str
    resamplers: dict[Half, str] = field(
        default_factory=lambda: {"encoder": "downsample.conv", "decoder": "upsample.conv"}
    )
    mid_res: tuple[str, str] = ("mid.block_1", "mid.block_2")
    mid_attention: str = "mid.attn_1"
    norm_out: str = "norm_out"
    shortcut: str = "nin_shortcut"
    attention_parts: dict[str, str] = field(
        default_factory=lambda: {"norm": "norm", "q": "q", "k": "k", "v": "v", "out": "proj_out"}
    )
    quantizer_kind: Literal["vq", "vq_cosine"] = "vq"
    skipped: tuple[str, ...] = ()

    def stage(self, half: Half, stage: int, num_stages: int) -> str:
        """Beginning of the names of a stage; 0 is the finest."""
        number = num_stages - 1 - stage if half == "decoder" and self.coarsest_first else stage
        return self.stages[half].format(number)


TAMING = Layout(
    name="taming",
    stages={"encoder": "encoder.down.{}", "decoder": "decoder.up.{}"},
    coarsest_first=False,
    res="block.{}",
    attention="attn.{}",
    skipped=("loss.", "model_ema.", "quantize.embedding.cluster_size", "quantize.embedding.embed_avg"),
)
LLAMAGEN = Layout(
    name="llamagen",
    stages={"encoder": "encoder.conv_blocks.{}", "decoder": "decoder.conv_blocks.{}"},
    coarsest_first=True,
    res="res.{}",
    attention="attn.{}",
    mid_res=("mid.0", "mid.2"),
    mid_attention="mid.1",
    quantizer_kind="vq_cosine",
    skipped=("quantize.codebook_used",),
)
DIFFUSERS = Layout(
    name="diffusers",
    stages={"encoder": "encoder.down_blocks.{}", "decoder": "decoder.up_blocks.{}"},
    coarsest_first=True,
    res="resnets.{}",
    attention="attentions.{}",
    resamplers={"encoder": "downsamplers.0.conv", "decoder": "upsamplers.0.conv"},
    mid_res=("mid_block.resnets.0", "mid_block.resnets.1"),
    mid_attention="mid_block.attentions.0",
    norm_out="conv_norm_out",
    shortcut="conv_shortcut",
    attention_parts={"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"},
)
DIFFUSERS_BEFORE_0_17 = replace(
    DIFFUSERS,
    attention_parts={"norm": "group_norm", "q": "query", "k": "key", "v": "value", "out": "proj_attn"},
)


def names(layout: Layout, config: AutoencoderConfig) -> Iterator[tuple[str, str]]:
    """Our name of every module with weights, and theirs."""
    num_stages = len(config.channel_multipliers)
    num_blocks: dict[Half, tuple[int, ...]] = {
        "encoder": depths(config.num_res_blocks, num_stages),
        "decoder": depths(config.num_decoder_res_blocks, num_stages),
    }
    for half, depth in num_blocks.items():
        yield f"{half}.conv_in", f"{half}.conv_in"
        yield f"{half}.conv_out", f"{half}.conv_out"
        yield f"{half}.norm_out", f"{half}.{layout.norm_out}"
        mid = list(layout.mid_res)
        if "attention" in config.mid_blocks:
            mid.insert(1, layout.mid_attention)
        for place, (kind, theirs) in enumerate(zip(config.mid_blocks, mid, strict=True)):
            yield from block_names(f"{half}.mid.{place}", f"{half}.{theirs}", kind == "attention", layout)
        for stage in range(num_stages):
            own = f"{half}.stages.{stage if half == 'encoder' else num_stages - 1 - stage}"
            theirs = layout.stage(half, stage, num_stages)
            step = 2 if stage in config.attention_stages else 1
            for number in range(depth[stage]):
                place = number * step
                yield from block_names(f"{own}.{place}", f"{theirs}.{layout.res.format(number)}", False, layout)
                if step == 2:
                    attention = f"{theirs}.{layout.attention.format(number)}"
                    yield from block_names(f"{own}.{place + 1}", attention, True, layout)
            yield f"{own}.{depth[stage] * step}.conv", f"{theirs}.{layout.resamplers[half]}"
    yield "encoder.to_latents", "quant_conv"
    yield "decoder.from_latents", "post_quant_conv"
    yield "quantizer.embedding", CODEBOOK.removesuffix(".weight")


def block_names(own: str, theirs: str, is_attention: bool, layout: Layout) -> Iterator[tuple[str, str]]:
    """The layers of one block."""
    parts = {part: part for part in ("norm1", "conv1", "norm2", "conv2")} | {"shortcut": layout.shortcut}
    for part, name in (layout.attention_parts if is_attention else parts).items():
        yield f"{own}.{part}", f"{theirs}.{name}"
