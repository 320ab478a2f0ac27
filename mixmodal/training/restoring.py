"""Saving a run and going on with it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmodal.training import checkpoint
from mixmodal.training.randomness import set_random_state
from mixmodal.training.task import MODEL

if TYPE_CHECKING:
    from mixmodal.training.trainer import Run


def save(run: Run) -> None:
    if run.saved_step == run.step:
        return
    state = {"step": run.step, "seconds": run.seconds, **must_match(run)}
    checkpoint.save_checkpoint(
        run.config.run_dir / "checkpoints",
        state,
        partial(save_engines, run),
        run.rank_state,
        {"ema.pt": run.ema.state_dict()} if run.ema else {},
        rank=run.place.rank,
        keep=run.config.keep_checkpoints,
    )
    run.saved_step = run.step


def save_engines(run: Run, folder: Path) -> None:
    for name, engine in run.engines.items():
        engine.save(folder if name == MODEL else folder / name)


def restore(run: Run, folder: Path | None) -> None:
    """Goes on where a checkpoint stands.

    Raises:
        CheckpointError: where it is damaged, or was written under a config that can not go on from it.
    """
    if folder is None:
        return
    state = checkpoint.read_state(folder)
    state.setdefault("networks", [MODEL])  # what checkpoints held before there were opponents
    for name, own in must_match(run).items():
        if state[name] != own:
            raise checkpoint.CheckpointError(
                f"checkpoint {folder} was written with {name} {state[name]}, not {own}; "
                "go on with what it was written with, or start a new run folder"
            )
    for name, engine in run.engines.items():
        engine.load(folder if name == MODEL else folder / name)
    ranked = folder / f"rank_{run.place.rank:05d}.pt"
    if not ranked.exists():  # more ranks than before: the data's place is the same on all, dropout's is not
        ranked = folder / "rank_00000.pt"
    rank_state = checkpoint.load_tensors(ranked)
    run.loader.load_state_dict(rank_state["loader"])
    set_random_state(rank_state["random"])
    if run.ema:
        run.ema.load_state_dict(checkpoint.load_tensors(folder / "ema.pt", run.place.device))
    run.step = run.saved_step = int(state["step"])
    run.seconds = state["seconds"]


def must_match(run: Run) -> dict[str, Any]:
    """What can not change within a run. ZeRO spreads the optimizer over ranks, so their number can not either."""
    stage = run.engine.zero_stage
    world = {"world_size": run.place.world_size} if stage else {}
    networks = sorted(run.engines)
    own = {"precision": run.config.precision, "ema": run.ema is not None, "networks": networks}
    return {"zero_stage": stage, **own, **world}
