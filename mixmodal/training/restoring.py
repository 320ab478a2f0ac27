"""Saving a run and going on with it, on any number of ranks and at any ZeRO stage."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixmodal.training import checkpoint
from mixmodal.training.checkpoint import CheckpointError, Gather, describe, gather_objects
from mixmodal.training.engine import Engine
from mixmodal.training.fragments import read_fragments, read_rest, settle, write_fragments, write_rest
from mixmodal.training.randomness import set_random_state, set_seeds
from mixmodal.training.run import Run

logger = logging.getLogger(__name__)

EMA = "ema.pt"
ROWS = "rows_per_step"


def save(run: Run, *, wait: bool) -> None:
    """Saves the run as it stands.

    Args:
        run: at the end of a step.
        wait: whether to return only when the disk has it.

    Raises:
        CheckpointError: where it could not be written.
    """
    rank = run.place.rank
    if run.saved_step != run.step:
        checkpoint.check_plain(run.rank_state, "state of the rank")
        files: dict[str, Any] = {ranked("rank", rank): run.rank_state}
        for name, engine in run.engines.items():
            files[ranked(name, rank)] = {"fragments": read_fragments(engine)}
            if rank == 0:
                files[ranked(name, rank)] |= read_rest(engine)
        if run.ema and rank == 0:
            files[EMA] = run.ema.state_dict()
        layout = {"world_size": run.place.world_size, "zero_stage": run.engine.zero_stage, ROWS: run.rows_per_step}
        run.saver.save({"step": run.step, "seconds": run.seconds, **must_match(run), **layout}, files)
        run.saved_step = run.step
    if wait:
        run.saver.wait()


def ranked(name: str, rank: int) -> str:
    """File of a rank."""
    return f"{name}_{rank:05d}.pt"


def restore(run: Run, gather: Gather = gather_objects) -> None:
    """Goes on where the newest whole checkpoint of the run stands, if there is one.

    Raises:
        CheckpointError: where none is whole, or it was written under a config that can not go on from it; with several
            ranks, on all of them where one has any problem.
        ValueError: where data or their state do not fit.
    """
    folder = checkpoint.choose_checkpoint(run.saver.folder, run.place.rank, gather)
    if folder is None:
        return
    problem = None
    try:
        read(run, folder)
    except Exception as error:
        problem = error
    # before the next collective, in which ranks without a problem would wait for those with one
    everyone = gather(describe(problem) if problem else "")
    if problem and len(everyone) == 1:
        raise problem
    problems = [f"rank {rank}: {found}" for rank, found in enumerate(everyone) if found]
    if problems:
        raise CheckpointError(f"training can not go on from {folder}: {'; '.join(problems)}") from problem
    for engine in run.engines.values():
        settle(engine)


def read(run: Run, folder: Path) -> None:
    """Fills the run from a checkpoint, without a collective; networks are still to settle."""
    rank = run.place.rank
    state = checkpoint.read_json(folder / checkpoint.STATE)
    missing = [name for name in ("step", "seconds", "world_size") if not isinstance(state.get(name), (int, float))]
    missing += [name for name in must_match(run) if name not in state]
    if missing:
        raise CheckpointError(
            f"checkpoint file {folder / checkpoint.STATE} has no {', '.join(missing)}, so another version wrote it; "
            "start a new run folder"
        )
    for name, own in must_match(run).items():
        if state[name] != own:
            raise CheckpointError(
                f"checkpoint {folder} was written with {name} {state[name]}, not {own}; "
                "go on with what it was written with, or start a new run folder"
            )
    before = state.get(ROWS, run.rows_per_step)
    if before != run.rows_per_step and rank == 0:
        logger.warning(
            "%s was written at %d rows a step; from here on a step has %d, at the same learning rate. "
            "trainer.global_batch_size keeps them on any number of ranks",
            folder,
            before,
            run.rows_per_step,
        )
    for name, engine in run.engines.items():
        restore_network(engine, name, folder, int(state["world_size"]))
    run.loader.load_state_dict(checkpoint.load_tensors(folder / ranked("rank", 0))["loader"])  # the same on all ranks
    if rank < state["world_size"]:
        set_random_state(checkpoint.load_tensors(folder / ranked("rank", rank))["random"])
    else:  # a rank that was not there before: a stream of its own, other than that of the start
        set_seeds(run.config.seed, (rank + 1) + (int(state["step"]) << 32))
    if run.ema:
        run.ema.load_state_dict(checkpoint.load_tensors(folder / EMA))
    run.step = run.saved_step = int(state["step"])
    run.seconds = state["seconds"]


def restore_network(engine: Engine, name: str, folder: Path, world_size: int) -> None:
    """Reads what any number of ranks wrote at any ZeRO stage.

    Raises:
        CheckpointError: where it is of another network.
    """
    first = checkpoint.load_tensors(folder / ranked(name, 0), lazy=True)

    def sources() -> Iterator[dict[str, Any]]:
        order = sorted(range(world_size), key=lambda rank: rank != engine.place.rank)
        for rank in order:
            yield checkpoint.load_tensors(folder / ranked(name, rank), lazy=True)["fragments"]

    try:
        write_rest(engine, first)
        write_fragments(engine, sources())
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {folder} is of another {name}: {error}") from error


def must_match(run: Run) -> dict[str, Any]:
    """What can not change within a run."""
    own = {"ema": run.ema is not None, "networks": sorted(run.engines)}
    return {"precision": run.config.precision, **own}
