"""Lines of published tasks of pictures and captions, as lines of ours (see `compositional`).

Winoground (arXiv 2204.03162): `examples.jsonl` with `id`, `image_0`, `image_1`, `caption_0`, `caption_1` and
`collapsed_tag`; pictures are `images/NAME.png`.

SugarCrepe (arXiv 2306.14610): `KIND.json`, an object of objects with `filename`, `caption` and `negative_caption`;
pictures are in a folder of COCO.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

WINOGROUND = ("id", "image_0", "image_1", "caption_0", "caption_1")
SUGARCREPE = ("filename", "caption", "negative_caption")


def is_winoground(data: Mapping[str, Any]) -> bool:
    """Whether a line is of Winoground's layout."""
    return "caption_0" in data


def from_winoground(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A grid; its kind is `collapsed_tag`. A picture's name without a suffix is of a PNG file.

    Raises:
        ValueError: naming a field that is missing.
    """
    check_fields(data, WINOGROUND, where)
    names = [str(data[name]) for name in ("image_0", "image_1")]
    return {
        "key": str(data["id"]),
        "kind": str(data.get("collapsed_tag", "all")),
        "images": [name if PurePath(name).suffix else f"{name}.png" for name in names],
        "captions": [data["caption_0"], data["caption_1"]],
        "true": [0, 1],
    }


def from_sugarcrepe(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A choice of two captions, of which the first is true.

    Raises:
        ValueError: naming a field that is missing.
    """
    check_fields(data, SUGARCREPE, where)
    captions = [data["caption"], data["negative_caption"]]
    return {"key": data["key"], "images": [data["filename"]], "captions": captions, "true": [0]}


def check_fields(data: Mapping[str, Any], names: tuple[str, ...], where: str) -> None:
    """Complains about a field that is missing."""
    for name in names:
        if name not in data:
            raise ValueError(f"{where}: there is no field {name!r}; it needs {', '.join(names)}")
