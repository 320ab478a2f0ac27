"""The front matter of a model card, by which the Hugging Face hub lists a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

FRONT_MATTER: Mapping[str, Any] = {
    "library_name": "mixmodal",
    "pipeline_tag": "any-to-any",
    "tags": ["mixmodal", "text-to-image", "image-to-text"],
}
FENCE = "---"


def with_front_matter(card: str) -> str:
    """The card with the keys of `FRONT_MATTER` that it does not have; all that it says stays as it is.

    Raises:
        ValueError: where the front matter of the card is not a mapping in YAML.
    """
    own, body = split_front_matter(card)
    try:
        known = yaml.safe_load(own) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"model card: the front matter is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(known, Mapping):
        raise ValueError(f"model card: the front matter is {type(known).__name__}; it must map names to values")
    missing = {name: value for name, value in FRONT_MATTER.items() if name not in known}
    added = yaml.safe_dump(missing, sort_keys=False) if missing else ""
    return f"{FENCE}\n{own}{added}{FENCE}\n{body}"


def split_front_matter(card: str) -> tuple[str, str]:
    """Front matter and text of a card, each with its line ends; the former is empty where there is none."""
    lines = card.splitlines(keepends=True)
    if lines and lines[0].strip() == FENCE:
        for number, line in enumerate(lines[1:], 1):
            if line.strip() == FENCE:
                return "".join(lines[1:number]), "".join(lines[number + 1 :])
    return "", card if card.startswith("\n") else f"\n{card}"


def read_section(card: str, heading: str) -> str:
    """The text below `## heading` of a card, up to the next heading as high; empty where there is none."""
    lines = split_front_matter(card)[1].splitlines()
    starts = [number for number, line in enumerate(lines) if line.strip() == f"## {heading}"]
    if not starts:
        return ""
    rest = lines[starts[0] + 1 :]
    end = next((number for number, line in enumerate(rest) if line.startswith(("# ", "## "))), len(rest))
    return "\n".join(rest[:end]).strip()
