"""Small random checkpoints with the key names of taming and LlamaGen, and what their code computes from them.

Written from the projects' own model files and sharing nothing with mixmodal, so that a test can tell.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTHS = (32, 32, 64)
"""Of the stages, finest first."""
ENCODER_BLOCKS, DECODER_BLOCKS = 2, 3
LATENT_CHANNELS, CODES, DIM = 16, 40, 8
SIZE = 16
ATTENTION_STAGE = 2

State = dict[str, Tensor]


class Names(NamedTuple):
    """The parts of names that the projects spell differently."""

    down: str
    up: list[str]  # finest first
    res: str
    mid: tuple[str, str, str]


TAMING = Names("encoder.down.", [f"decoder.up.{i}" for i in (0, 1, 2)], "block", ("block_1", "attn_1", "block_2"))
LLAMAGEN = Names("encoder.conv_blocks.", [f"decoder.conv_blocks.{i}" for i in (2, 1, 0)], "res", ("0", "1", "2"))
NAMES = {"taming": TAMING, "llamagen": LLAMAGEN}


class Drawing:
    """Random weights under a project's names, layer by layer."""

    def __init__(self, project: str) -> None:
        self.names, self.state = NAMES[project], {}
        self._generator = torch.Generator().manual_seed(0)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)

    def conv(self, name: str, inner: int, outer: int, side: int) -> None:
        self.state[f"{name}.weight"] = self.draw(outer, inner, side, side) / (inner * side * side) ** 0.5
        self.state[f"{name}.bias"] = 0.1 * self.draw(outer)

    def norm(self, name: str, width: int) -> None:
        self.state[f"{name}.weight"], self.state[f"{name}.bias"] = 1 + 0.2 * self.draw(width), 0.2 * self.draw(width)

    def res(self, name: str, inner: int, outer: int) -> None:
        self.norm(f"{name}.norm1", inner)
        self.conv(f"{name}.conv1", inner, outer, 3)
        self.norm(f"{name}.norm2", outer)
        self.conv(f"{name}.conv2", outer, outer, 3)
        if inner != outer:
            self.conv(f"{name}.nin_shortcut", inner, outer, 1)

    def attention(self, name: str, width: int) -> None:
        self.norm(f"{name}.norm", width)
        for layer in ("q", "k", "v", "proj_out"):
            self.conv(f"{name}.{layer}", width, width, 1)

    def middle(self, half: str, width: int) -> None:
        self.res(f"{half}.mid.{self.names.mid[0]}", width, width)
        self.attention(f"{half}.mid.{self.names.mid[1]}", width)
        self.res(f"{half}.mid.{self.names.mid[2]}", width, width)

    def blocks(self, stage: str, count: int, inner: int, outer: int, *, attends: bool) -> None:
        for number in range(count):
            self.res(f"{stage}.{self.names.res}.{number}", outer if number else inner, outer)
            if attends:
                self.attention(f"{stage}.attn.{number}", outer)


def draw_state(project: str, with_decoder: bool = True) -> State:
    """Random weights under the project's names."""
    drawing = Drawing(project)
    names, width = drawing.names, WIDTHS[0]
    drawing.conv("encoder.conv_in", 3, width, 3)
    for stage, wide in enumerate(WIDTHS):
        drawing.blocks(f"{names.down}{stage}", ENCODER_BLOCKS, width, wide, attends=stage == ATTENTION_STAGE)
        width = wide
        if stage + 1 < len(WIDTHS):
            drawing.conv(f"{names.down}{stage}.downsample.conv", width, width, 3)
    drawing.middle("encoder", width)
    drawing.norm("encoder.norm_out", width)
    drawing.conv("encoder.conv_out", width, LATENT_CHANNELS, 3)
    drawing.conv("quant_conv", LATENT_CHANNELS, DIM, 1)
    drawing.conv("post_quant_conv", DIM, LATENT_CHANNELS, 1)
    drawing.state["quantize.embedding.weight"] = drawing.draw(CODES, DIM)
    if not with_decoder:
        return drawing.state
    drawing.conv("decoder.conv_in", LATENT_CHANNELS, width, 3)
    drawing.middle("decoder", width)
    for stage in reversed(range(len(WIDTHS))):
        drawing.blocks(names.up[stage], DECODER_BLOCKS, width, WIDTHS[stage], attends=stage == ATTENTION_STAGE)
        width = WIDTHS[stage]
        if stage:
            drawing.conv(f"{names.up[stage]}.upsample.conv", width, width, 3)
    drawing.norm("decoder.norm_out", width)
    drawing.conv("decoder.conv_out", width, 3, 3)
    return drawing.state


def _conv(state: State, name: str, x: Tensor, **options: int) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)


def _norm(state: State, name: str, x: Tensor) -> Tensor:
    return F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)


def _swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _res(state: State, name: str, x: Tensor) -> Tensor:
    y = _conv(state, f"{name}.conv1", _swish(_norm(state, f"{name}.norm1", x)), padding=1)
    y = _conv(state, f"{name}.conv2", _swish(_norm(state, f"{name}.norm2", y)), padding=1)
    return y + (_conv(state, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in state else x)


def _attention(state: State, name: str, x: Tensor) -> Tensor:
    y = _norm(state, f"{name}.norm", x)
    q, k, v = (_conv(state, f"{name}.{layer}", y).flatten(2) for layer in "qkv")
    weights = (torch.bmm(q.transpose(1, 2), k) * x.shape[1] ** -0.5).softmax(2)
    y = torch.bmm(v, weights.transpose(1, 2)).reshape(x.shape)
    return x + _conv(state, f"{name}.proj_out", y)


def _middle(state: State, half: str, names: Names, x: Tensor) -> Tensor:
    x = _res(state, f"{half}.mid.{names.mid[0]}", x)
    x = _attention(state, f"{half}.mid.{names.mid[1]}", x)
    return _res(state, f"{half}.mid.{names.mid[2]}", x)


def encode(project: str, state: State, images: Tensor) -> tuple[Tensor, Tensor]:
    """Latents before the codebook `(B, DIM, h, w)` and codes `(B, h, w)`."""
    names = NAMES[project]
    x = _conv(state, "encoder.conv_in", images, padding=1)
    for stage in range(len(WIDTHS)):
        for number in range(ENCODER_BLOCKS):
            x = _res(state, f"{names.down}{stage}.{names.res}.{number}", x)
            if stage == ATTENTION_STAGE:
                x = _attention(state, f"{names.down}{stage}.attn.{number}", x)
        if stage + 1 < len(WIDTHS):
            x = _conv(state, f"{names.down}{stage}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
    x = _middle(state, "encoder", names, x)
    x = _conv(state, "encoder.conv_out", _swish(_norm(state, "encoder.norm_out", x)), padding=1)
    latents = _conv(state, "quant_conv", x)
    vectors, codebook = latents.permute(0, 2, 3, 1), _codebook(project, state)
    if project == "llamagen":
        vectors = F.normalize(vectors, p=2, dim=-1)
    return latents, (vectors[..., None, :] - codebook).square().sum(-1).argmin(-1)


def decode(project: str, state: State, codes: Tensor) -> Tensor:
    """Pictures `(B, 3, H, W)`, not clamped."""
    names = NAMES[project]
    x = _conv(state, "post_quant_conv", _codebook(project, state)[codes].permute(0, 3, 1, 2))
    x = _middle(state, "decoder", names, _conv(state, "decoder.conv_in", x, padding=1))
    for stage in reversed(range(len(WIDTHS))):
        for number in range(DECODER_BLOCKS):
            x = _res(state, f"{names.up[stage]}.{names.res}.{number}", x)
            if stage == ATTENTION_STAGE:
                x = _attention(state, f"{names.up[stage]}.attn.{number}", x)
        if stage:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = _conv(state, f"{names.up[stage]}.upsample.conv", x, padding=1)
    return _conv(state, "decoder.conv_out", _swish(_norm(state, "decoder.norm_out", x)), padding=1)


def _codebook(project: str, state: State) -> Tensor:
    weight = state["quantize.embedding.weight"]
    return F.normalize(weight, p=2, dim=-1) if project == "llamagen" else weight
