"""What weights, gradients and optimizer states take on each GPU at DeepSpeed's ZeRO stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn


class States(NamedTuple):
    """Bytes that a network takes on each GPU besides activations; `communication` is for what goes between ranks."""

    weights: int
    gradients: int
    optimizer: int
    communication: int


def state_bytes(network: nn.Module, precision: str, zero: Mapping[str, Any], gpus: int) -> States:
    """What weights, gradients and AdamW take, by what DeepSpeed 0.19 keeps at each ZeRO stage.

    N parameters on G GPUs, w bytes a weight (2 for `bfloat16`, else 4):

    | stage | weights | gradients | optimizer | communication |
    |---|---|---|---|---|
    | 0 | w N | 4 N | 8 N | - |
    | 1 | w N | 4 N, and 2 N for `bfloat16` | 12 N / G, with float32 masters | buckets; none for `bfloat16` |
    | 2 | w N | 4 N / G | 12 N / G | buckets |
    | 3 | w N / G + w min(N, stage3_max_live_parameters) | 4 N / G | 12 N / G | buckets |

    A bucket is `reduce_bucket_size` weights, two of them with `overlap_comm` at stages 1 and 2. At stage 3 whole
    weights are gathered for a while, on one GPU too. Without buckets (stage 0, and 1 for `bfloat16`), up to 5e8
    gradients are copied side by side when activations are gone: `build_plan` counts them in the place of these.
    """
    stage, width = zero.get("stage", 0), 2 if precision == "bfloat16" else 4
    parameters = list(trained(network))
    count = sum(parameter.numel() for parameter in parameters)
    constant = module_bytes(network) - sum(parameter.nbytes for parameter in parameters)
    if stage == 0:
        return States(width * count + constant, 4 * count, 8 * count, 0)
    share = -(-count // gpus)
    weights = width * count
    if stage == 3:
        weights = width * (share + min(count, int(zero.get("stage3_max_live_parameters", 10**9))))
    buckets = 2 if stage < 3 and zero.get("overlap_comm", False) else 1
    if (stage < 3 and not zero.get("contiguous_gradients", True)) or (stage == 1 and precision == "bfloat16"):
        buckets = 0
    bucket = width * int(zero.get("reduce_bucket_size", 5e8))
    gradients = 4 * share if stage > 1 else (6 if width == 2 else 4) * count
    return States(weights + constant, gradients, 12 * share, buckets * bucket)


def trained(network: nn.Module) -> Iterator[Tensor]:
    """Parameters that the optimizer changes."""
    return (parameter for parameter in network.parameters() if parameter.requires_grad)


def module_bytes(network: nn.Module) -> int:
    """Of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
