"""Classes as a prompt names them: at least two, each in templates, which are texts around its caption."""

from __future__ import annotations

from collections.abc import Sequence

PLACE = "{}"
"""Where a template has the caption."""


def check_number(num_classes: int) -> None:
    """Whether there is something to tell apart.

    Raises:
        ValueError: for fewer than two classes.
    """
    if num_classes < 2:
        raise ValueError(f"classification needs at least two classes, not {num_classes}")


def check_places(templates: Sequence[str]) -> None:
    """Whether each text has a place for the caption, and there is one at all.

    Raises:
        ValueError: naming the first that has none.
    """
    if not templates:
        raise ValueError(f"templates: there is none; give at least one, as `a photo of {PLACE}`")
    for template in templates:
        if PLACE not in template:
            raise ValueError(f"template {template!r} has no {PLACE} for the class to stand in")


def fill(template: str, name: str | int) -> str:
    """The prompt of a class."""
    return template.replace(PLACE, str(name))


def fill_templates(templates: Sequence[str], captions: Sequence[str]) -> list[list[str]]:
    """Each caption in each template, `(K, M)`.

    Raises:
        ValueError: where there is no template, or one has no `{}`.
    """
    check_places(templates)
    return [[fill(template, caption) for template in templates] for caption in captions]
