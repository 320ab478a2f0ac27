"""Pieces of report pages: everything inline, every text escaped, so that one file shows all of it offline."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import NamedTuple

from mixmodal.evaluation.concepts import Rate

YES, NO = "&#10003;", "&#10007;"


def page(title: str, body: Iterable[str]) -> str:
    """The whole HTML document around the sections of `body`."""
    template = resources.files("mixmodal.evaluation").joinpath("page.html").read_text(encoding="utf-8")
    return Template(template).substitute(title=escape(title), body="\n".join(body))


def section(title: str, introduction: str, *parts: str) -> str:
    """A heading, a paragraph that says what is shown, and HTML parts."""
    return "\n".join([f"<section>\n<h2>{escape(title)}</h2>", paragraph(introduction), *parts, "</section>"])


def paragraph(text: str, kind: str = "") -> str:
    return f"<p{_class(kind)}>{escape(text)}</p>"


def picture(path: Path, alternative: str) -> str:
    """A PNG file as an inline image."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(alternative)}">'


def percent(share: float) -> str:
    return "n/a" if share != share else f"{100 * share:.0f} %"


def figure_of(rate: Rate, name: str, note: str = "") -> str:
    """A card with a share, large, and the counts behind it."""
    return figure(percent(rate.share), name, f"{rate.hits} of {rate.trials}" + (f"; {note}" if note else ""))


def figure(value: str, name: str, note: str = "") -> str:
    small = f"<small>{escape(note)}</small>" if note else ""
    return f'<div class="figure"><b>{escape(value)}</b><span>{escape(name)}</span>{small}</div>'


def figures(cards: Iterable[str], first: bool = False) -> str:
    """A row of cards; `first` marks the ones that matter most."""
    return f'<div class="figures{" first" if first else ""}">{"".join(cards)}</div>'


def tile(pictures: Sequence[tuple[str, str]], caption: str) -> str:
    """Pictures side by side, each `(img, words below it)`, above a caption in HTML."""
    cells = "".join(f"<div>{image}<small>{escape(words)}</small></div>" for image, words in pictures)
    return f'<figure><div class="pair">{cells}</div><figcaption>{caption}</figcaption></figure>'


class Answer(NamedTuple):
    """A picture that was found, in HTML, with words below it, and whether it is what was sought."""

    image: str
    words: str
    right: bool


def findings(image: str, caption: str, answers: Mapping[str, Sequence[Answer]]) -> str:
    """A picture and its caption beside what was found for it, nearest first, in a strip for each way of asking.

    What is right has a border, and a sign for those who do not see its colour.
    """

    def cell(answer: Answer) -> str:
        sign = f'<b class="yes">{YES} right</b> ' if answer.right else ""
        words = f'<small title="{escape(answer.words)}">{sign}{escape(answer.words)}</small>'
        return f"<li{_class('right' if answer.right else '')}>{answer.image}{words}</li>"

    strips = "".join(
        f"<div><h4>{escape(name)}</h4><ol>{''.join(map(cell, found))}</ol></div>" for name, found in answers.items()
    )
    asked = f"<figcaption>{image}<span>{escape(caption)}</span></figcaption>"
    return f'<figure class="found">{asked}<div class="strips">{strips}</div></figure>'


def folded(items: Sequence[str], shown: int, rest: str) -> str:
    """Items below each other; those beyond `shown` are folded away under the words `rest`."""
    if len(items) <= shown:
        return "".join(items)
    hidden = f"<details><summary>{escape(rest)} ({len(items) - shown})</summary>{''.join(items[shown:])}</details>"
    return "".join(items[:shown]) + hidden


def tiles(items: Sequence[str], shown: int, rest: str, small: bool = False) -> str:
    """A grid of tiles; those beyond `shown` are folded away under the words `rest`."""
    kind = _class("tiles small" if small else "tiles")
    grid = f"<div{kind}>{''.join(items[:shown])}</div>"
    if len(items) <= shown:
        return grid
    folded = f"<div{kind}>{''.join(items[shown:])}</div>"
    return f"{grid}<details><summary>{escape(rest)} ({len(items) - shown})</summary>{folded}</details>"


def verdict(right: bool, words: str) -> str:
    """Words in the colour of success or failure, with a sign for those who do not see the colour."""
    return f'<span class="{"yes" if right else "no"}">{YES if right else NO} {escape(words)}</span>'


def table(header: Sequence[str], rows: Iterable[Sequence[object]], numbers: Sequence[int] = ()) -> str:
    """A table of texts; the columns `numbers` are set to the right."""

    def cell(tag: str, column: int, value: object) -> str:
        return f"<{tag}{_class('number' if column in numbers else '')}>{escape(str(value))}</{tag}>"

    head = "".join(cell("th", column, name) for column, name in enumerate(header))
    body = "".join(f"<tr>{''.join(cell('td', i, value) for i, value in enumerate(row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _class(kind: str) -> str:
    return f' class="{escape(kind)}"' if kind else ""
