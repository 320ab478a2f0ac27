"""Model cards of what is trained beside the transformer: image tokenizers, encoders and denoisers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mixmodal.training.config import TrainerConfig


def build_card(
    title: str,
    about: str,
    data: Sequence[Path],
    scores: Mapping[str, str],
    example: Sequence[str],
    *,
    library: str | None = None,
    note: str = "",
) -> str:
    """A model card in Markdown.

    Args:
        title: of the card.
        about: a paragraph on what it is and how it was trained.
        data: folders that it was trained on, of which the names are told.
        scores: on held-out data, by name; a table where there are any.
        example: lines of Python that use it.
        library: that loads it, for the hub.
        note: a paragraph behind the table.
    """
    lines = ["---", f"library_name: {library}", "---", ""] if library else []
    lines += [
        f"# {title}",
        "",
        about,
        "",
        f"- trained on: {', '.join(f'`{path.name}`' for path in data)}",
        "- the licences of the pictures it was trained on apply to what it is used for",
    ]
    if scores:
        lines += ["", "| held out | |", "|---|---|", *(f"| {name} | {score} |" for name, score in scores.items())]
    if note:
        lines += ["", note]
    return "\n".join([*lines, "", "```python", *example, "```", ""])


def describe_batch(trainer: TrainerConfig, items: str) -> str:
    """What an optimizer step takes: `64 pictures`, or as many of a device."""
    if trainer.global_batch_size:
        return f"{trainer.global_batch_size} {items}"
    return f"{trainer.micro_batch_size * trainer.grad_accum_steps} {items} on each device"
