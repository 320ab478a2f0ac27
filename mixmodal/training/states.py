"""What weights, gradients and optimizer states take on each GPU at DeepSpeed's ZeRO stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from mixmodal.training.config import HALF


class States(NamedTuple):
    """Bytes that a network takes on each GPU besides activations.

    Args:
        weights: of the network and its buffers.
        gradients: sums of them.
        optimizer: moments, and float32 masters where there are any.
        communication: for what goes between ranks.
        host: bytes that each process keeps in the host's memory instead (offload).
    """

    weights: int
    gradients: int
    optimizer: int
    communication: int
    host: int = 0


def state_bytes(network: nn.Module, precision: str, zero: Mapping[str, Any], gpus: int) -> States:
    """What weights, gradients and AdamW take, by what DeepSpeed 0.19 keeps at each ZeRO stage.

    N parameters on G GPUs, w bytes a weight (2 for `bfloat16`, else 4):

    | stage | weights | gradients | optimizer | communication |
    |---|---|---|---|---|
    | 0 | w N | 4 N | 8 N | - |
    | 1 | w N | 4 N, and 2 N for 16 bits | 12 N / G, with float32 masters | buckets; none for `bfloat16` |
    | 2 | w N | 4 N / G | 12 N / G | buckets |
    | 3 | w M / G + w min(M, stage3_max_live_parameters) | 4 N / G | 12 N / G | buckets |

    M counts frozen parameters, too, which the other stages keep whole on each GPU.

    A bucket is `reduce_bucket_size` weights, two of them with `overlap_comm` at stages 1 and 2. At stage 3 whole
    weights are gathered for a while, on one GPU too. Without buckets (stage 0, and 1 for `bfloat16`), up to 5e8
    gradients are copied side by side when activations are gone: `Stages` counts them in the place of these.

    `offload_optimizer` takes the optimizer to the host, from stage 2 on with the gradients; `offload_param` the shares
    of weights at stage 3. Nobody has measured offload on a GPU yet.
    """
    stage, width = zero.get("stage", 0), 2 if precision in HALF else 4
    kept = list(network.parameters() if stage == 3 else trained(network))
    size, count = (sum(tensor.numel() for tensor in tensors) for tensors in (kept, trained(network)))
    constant = module_bytes(network) - sum(parameter.nbytes for parameter in kept)
    if stage == 0:
        return States(width * count + constant, 4 * count, 8 * count, 0)
    share = -(-count // gpus)
    weights, weight_share = width * size, -(-size // gpus)
    if stage == 3:
        weights = width * (weight_share + min(size, int(zero.get("stage3_max_live_parameters", 10**9))))
    buckets = 2 if stage < 3 and zero.get("overlap_comm", False) else 1
    if (stage < 3 and not zero.get("contiguous_gradients", True)) or (stage == 1 and precision == "bfloat16"):
        buckets = 0
    bucket = width * int(zero.get("reduce_bucket_size", 5e8))
    gradients = 4 * share if stage > 1 else (6 if width == 2 else 4) * count
    optimizer, host = 12 * share, 0
    if offloads(zero, "offload_optimizer"):
        host, optimizer = optimizer, 0
        if stage > 1:
            host, gradients = host + gradients, 0
    if offloads(zero, "offload_param"):
        host, weights = host + width * weight_share, weights - width * weight_share
    return States(weights + constant, gradients, optimizer, buckets * bucket, host)


def offloads(zero: Mapping[str, Any], name: str) -> bool:
    """Whether a ZeRO section keeps states of the kind `name` on the host."""
    return (zero.get(name) or {}).get("device", "none") != "none"


def trained(network: nn.Module) -> Iterator[Tensor]:
    """Parameters that the optimizer changes."""
    return (parameter for parameter in network.parameters() if parameter.requires_grad)


def module_bytes(network: nn.Module) -> int:
    """Of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
