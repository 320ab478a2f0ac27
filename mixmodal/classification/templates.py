"""Prompt templates: texts around the caption of a class."""

from __future__ import annotations

from collections.abc import Sequence

PLACE = "{}"
"""Where a template has the caption."""


def fill_templates(templates: Sequence[str], captions: Sequence[str]) -> list[list[str]]:
    """Each caption in each template, `(K, M)`.

    Raises:
        ValueError: where there is no template, or one has no `{}`.
    """
    if not templates:
        raise ValueError(f"templates: there is none; give at least one text with {PLACE}, such as {PLACE!r}")
    for template in templates:
        if PLACE not in template:
            raise ValueError(f"template {template!r} has no {PLACE} for the class to stand in")
    return [[template.replace(PLACE, caption) for template in templates] for caption in captions]
