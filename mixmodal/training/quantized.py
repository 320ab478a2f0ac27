"""Frozen linear layers in 4 bits, beside which an adapter is trained: QLoRA (arXiv 2305.14314)."""

from __future__ import annotations

import torch
from torch import nn

from mixmodal.models.transformer import Transformer

COMPUTE = {"float32": torch.float32, "float16": torch.float16}
"""What dequantized weights are multiplied in, by `trainer.precision`; bfloat16 for others."""


def quantize(model: Transformer, precision: str) -> None:
    """Puts NF4 weights (section 3: blocks of 64, whose scales are quantized, too) into all linear layers of the blocks.

    They take 0.52 bytes a parameter. Embedding, output and norms stay as they are.

    Args:
        precision: of training.

    Raises:
        ValueError: without bitsandbytes, or for weights without data.
    """
    layers = {name: module for name, module in model.blocks.named_modules() if isinstance(module, nn.Linear)}
    if any(layer.weight.is_meta for layer in layers.values()):
        raise ValueError(
            "adapter.quantize needs weights, which a plan does not read: leave it out of the plan, and count 0.52 "
            "bytes in the place of 2 or 4 for each frozen weight of the blocks"
        )
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"adapter.quantize needs bitsandbytes: pip install 'mixmodal[qlora]' ({error})") from error
    for name, layer in layers.items():
        path, _, own = name.rpartition(".")
        weight = layer.weight
        found = Linear4bit(
            weight.shape[1],
            weight.shape[0],
            bias=False,
            quant_type="nf4",
            compute_dtype=COMPUTE.get(precision, torch.bfloat16),
        )
        # else its evaluation on the CPU leaves weights in a layout through which no gradient goes in training
        found.support_avx512bf16_for_cpu = False
        found.weight = Params4bit(weight.detach(), requires_grad=False, quant_type="nf4")
        setattr(model.blocks.get_submodule(path), own, found.to(weight.device))  # which quantizes
    vars(model)["is_loaded_in_4bit"] = True  # peft asks for it
