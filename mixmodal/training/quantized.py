"""Frozen linear layers in 4 bits, beside which an adapter is trained: QLoRA (arXiv 2305.14314)."""

from __future__ import annotations

from torch import nn

from mixmodal.extras import import_extra
from mixmodal.models.transformer import Transformer
from mixmodal.training.config import Precision
from mixmodal.training.precision import compute_dtype


def quantize(model: Transformer, precision: Precision) -> None:
    """Puts NF4 weights (section 3: blocks of 64, whose scales are quantized, too) into all linear layers of the blocks.

    They take 0.52 bytes a parameter. Embedding, output and norms stay as they are.

    Args:
        precision: of training, in which dequantized weights are multiplied.

    Raises:
        ValueError: without bitsandbytes, or for weights without data.
    """
    layers = {name: module for name, module in model.blocks.named_modules() if isinstance(module, nn.Linear)}
    if any(layer.weight.is_meta for layer in layers.values()):
        raise ValueError(
            "adapter.quantize needs weights, which a plan does not read: leave it out of the plan, and count 0.52 "
            "bytes in the place of 2 or 4 for each frozen weight of the blocks"
        )
    library = import_extra("bitsandbytes.nn", "qlora", "adapter.quantize needs")
    for name, layer in layers.items():
        path, _, own = name.rpartition(".")
        weight = layer.weight
        found = library.Linear4bit(
            weight.shape[1],
            weight.shape[0],
            bias=False,
            quant_type="nf4",
            compute_dtype=compute_dtype(precision),
        )
        # else its evaluation on the CPU leaves weights in a layout through which no gradient goes in training
        found.support_avx512bf16_for_cpu = False
        found.weight = library.Params4bit(weight.detach(), requires_grad=False, quant_type="nf4")
        setattr(model.blocks.get_submodule(path), own, found.to(weight.device))  # which quantizes
    vars(model)["is_loaded_in_4bit"] = True  # peft asks for it
