"""How the rows of an optimizer step are spread over ranks and micro-batches."""

from __future__ import annotations


def check_split(*, micro_batch_size: int, grad_accum_steps: int, rank: int, world_size: int, seed: int) -> None:
    """Whether a stream of rows can be spread so.

    Raises:
        ValueError: naming all of the values and what is allowed.
    """
    if not 0 <= rank < world_size or micro_batch_size < 1 or grad_accum_steps < 1 or seed < 0:
        raise ValueError(
            f"data: rank {rank} of {world_size}, {micro_batch_size} rows, {grad_accum_steps} micro-batches, seed "
            f"{seed}: rows and micro-batches must be at least 1, rank and seed at least 0"
        )
