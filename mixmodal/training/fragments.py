"""What a rank keeps of a network, by names of parameters: the same data at every ZeRO stage and number of ranks.

A parameter is a flat row of numbers of which each rank keeps a range, its fragment, with the optimizer's states of that
range. At stage 0 the range is the whole row on every rank. At stages 1 and 2 the weights of a group stand one behind
the other in a row that is cut into equal parts; at stage 3 each parameter is cut by itself. Where fragments are known
by name and range, any cut can be read into any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mixmodal.training.checkpoint import CheckpointError

if TYPE_CHECKING:
    from mixmodal.training.engine import Engine

WEIGHT = "weight"
SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
COUNTERS = ("global_steps", "skipped_steps", "global_samples")
"""Of steps. That of micro-batches begins at 0 in every run: by it DeepSpeed knows the last one of a step, which may
have another number of them than before."""


class Fragment(NamedTuple):
    """A range of a parameter.

    Args:
        name: of the parameter.
        start: first entry of the range.
        weight: `(n,)`, a view of what the optimizer changes: float32, also where the network computes in less.
        owner: what the optimizer's state is kept for, in the same form; None where the parameter is frozen.
        offset: where the range begins in the flat owner.
    """

    name: str
    start: int
    weight: Tensor
    owner: Tensor | None
    offset: int


def check_savable(engine: Engine) -> None:
    """Makes sure that the network can be saved, before hours of training.

    Raises:
        ValueError: naming the key of the DeepSpeed file that does not allow it.
    """
    for key, attribute in (("offload_optimizer", "swap_optimizer"), ("offload_param", "params_in_nvme_and_cpu")):
        if getattr(engine.optimizer, attribute, False):
            raise ValueError(f"zero_optimization.{key}.device is nvme, from where no checkpoint is written; choose cpu")


# what is where


def fragments(engine: Engine) -> Iterator[Fragment]:
    """What this rank keeps; frozen parameters of stages 0 to 2 are whole on every rank."""
    optimizer: Any = engine.optimizer
    for name, parameter in engine.module.named_parameters():
        if engine.zero_stage == 3:
            yield partition(name, parameter, optimizer)
        elif not parameter.requires_grad or engine.zero_stage == 0:
            owner = parameter if parameter.requires_grad else None
            yield Fragment(name, 0, parameter.data.view(-1), owner, 0)
        elif (mapping := parameter._hp_mapping) is not None:  # pyright: ignore[reportAttributeAccessIssue]
            (owner,) = plain_optimizer(engine).param_groups[mapping.param_group_index]["params"]
            offset = mapping.hp_fragment_address.start
            yield Fragment(name, mapping.lp_fragment_address.start, mapping.hp_fragment.data, owner, offset)


def partition(name: str, parameter: Any, optimizer: Any) -> Fragment:
    """The range of a parameter that stage 3 leaves on this rank, without the padding at the end of the last one."""
    size = parameter.ds_tensor.numel()
    start = min(parameter.ds_numel, size * optimizer._get_param_partition_rank(parameter))
    count = min(size, parameter.ds_numel - start)
    if not parameter.requires_grad:
        return Fragment(name, start, parameter.ds_tensor.data.view(-1)[:count], None, 0)
    group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    owner = optimizer.fp32_partitioned_groups_flat[group]
    return Fragment(name, start, owner.data[offset : offset + count], owner, offset)


def shapes(network: nn.Module) -> dict[str, list[int]]:
    """Of all parameters in full."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in network.named_parameters()}


def plain_optimizer(engine: Engine) -> torch.optim.Optimizer:
    """The optimizer that DeepSpeed's ZeRO works with."""
    return engine.optimizer if engine.zero_stage == 0 else engine.optimizer.optimizer


# to data


def read_fragments(engine: Engine) -> dict[str, Any]:
    """The fragments of this rank as data: views, no copies. Nothing where another rank keeps the same."""
    if engine.zero_stage == 0 and engine.place.rank:
        return {}
    return {fragment.name: read_fragment(fragment, plain_optimizer(engine).state) for fragment in fragments(engine)}


def loss_scaler(engine: Engine) -> Any:
    """What raises the losses of float16 by a factor that changes; None in other precisions."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None


def read_fragment(fragment: Fragment, states: Mapping[Any, Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"start": fragment.start, WEIGHT: fragment.weight}
    for key, value in states.get(fragment.owner, {}).items():
        if isinstance(value, Tensor) and fragment.owner is not None and value.shape == fragment.owner.shape:
            found[key] = value.detach().view(-1)[fragment.offset : fragment.offset + fragment.weight.numel()]
        else:
            found[key] = float(value)
    return found


def read_rest(engine: Engine) -> dict[str, Any]:
    """What is the same on all ranks: shapes, buffers, counters and the loss scale, where there is one."""
    scaler = loss_scaler(engine)
    return {
        "shapes": shapes(engine.module),
        "buffers": {name: buffer.detach() for name, buffer in engine.module.named_buffers()},
        "counters": {name: int(getattr(engine.deepspeed_engine, name)) for name in COUNTERS},
        "scale": {name: getattr(scaler, name) for name in SCALE if hasattr(scaler, name)},
    }


# from data


@torch.no_grad()
def write_fragments(engine: Engine, sources: Iterator[Mapping[str, Any]]) -> None:
    """Fills the fragments of this rank from those of other ranks, until all are whole; `settle` is to follow.

    Args:
        engine: fresh; its optimizer has no states yet.
        sources: what `read_fragments` gave, rank by rank; those of this rank first, which often are enough.

    Raises:
        CheckpointError: where a part of a parameter is in none of them.
    """
    own = list(fragments(engine))
    missing = {fragment.name: fragment.weight.numel() for fragment in own}
    optimizer = plain_optimizer(engine)
    for source in sources:
        for fragment in own:
            if missing[fragment.name] and fragment.name in source:
                missing[fragment.name] -= write_fragment(fragment, source[fragment.name], optimizer)
        if not any(missing.values()):
            break
    for name, count in missing.items():
        if count:
            raise CheckpointError(f"{count} weights of {name} are missing")


def write_fragment(fragment: Fragment, source: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> int:
    """Copies the range that both have; its length."""
    first = max(fragment.start, source["start"])
    count = min(fragment.start + fragment.weight.numel(), source["start"] + source[WEIGHT].numel()) - first
    if count <= 0:
        return 0
    here, there = first - fragment.start, first - source["start"]
    fragment.weight[here : here + count].copy_(source[WEIGHT][there : there + count])
    if fragment.owner is None:
        return count
    state: dict[str, Any] = optimizer.state[fragment.owner]  # springs into being
    for key, value in source.items():
        if key in ("start", WEIGHT):
            continue
        if isinstance(value, Tensor):
            whole = state.setdefault(key, torch.zeros_like(fragment.owner)).view(-1)
            begin = fragment.offset + here
            whole[begin : begin + count].copy_(value[there : there + count])
        else:  # the count of steps; ZeRO has one for a group: that of the parameter which has had most
            steps = max(value, float(state.get(key, 0.0)))
            state[key] = torch.tensor(steps, device=fragment.owner.device if optimizer.defaults.get("fused") else "cpu")
    return count


def settle(engine: Engine) -> None:
    """Brings the weights that the network computes with in line with those that the optimizer changes; a collective."""
    optimizer: Any = engine.optimizer
    if engine.zero_stage in (1, 2):
        optimizer.update_lp_params()
    if engine.zero_stage == 3:
        optimizer.checkpoint_event_prologue()
        kept = zip(
            optimizer.fp16_partitioned_groups_flat,
            optimizer.fp32_partitioned_groups_flat,
            optimizer.fp16_partitioned_groups,
            strict=True,
        )
        for flat, master, group in kept:
            flat.data.copy_(master.data)
            for part, values in zip(group, optimizer.unflatten(flat, group), strict=True):
                part.data = values.data
        optimizer.checkpoint_event_epilogue()


def write_rest(engine: Engine, rest: Mapping[str, Any]) -> None:
    """The inverse of `read_rest`.

    Raises:
        CheckpointError: naming the parameter or buffer that the network or the checkpoint does not have.
    """
    expect_same(rest["shapes"], shapes(engine.module))
    buffers = dict(engine.module.named_buffers())
    expect_same(*({name: list(value.shape) for name, value in kept.items()} for kept in (rest["buffers"], buffers)))
    with torch.no_grad():
        for name, buffer in buffers.items():
            buffer.copy_(rest["buffers"][name])  # also those that no state dict holds
    engine.module.load_state_dict(rest["buffers"], strict=False)  # so that the hooks of modules are called
    for name in COUNTERS:
        setattr(engine.deepspeed_engine, name, rest["counters"][name])
    for name, value in rest["scale"].items():
        setattr(loss_scaler(engine), name, value)


def expect_same(saved: Mapping[str, list[int]], own: Mapping[str, list[int]]) -> None:
    for name in sorted({*saved, *own}):
        if saved.get(name) != own.get(name):
            sizes = [f"has the shape {kept[name]}" if name in kept else "is absent" for kept in (saved, own)]
            raise CheckpointError(f"{name} {sizes[0]} there and {sizes[1]} in the network")
