"""Turns as HTML: every text escaped, every picture inline, so that no file of a visitor lies on the server's disk."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL.Image import Image as Picture

from mixmodal.serve.conversation import Content, Conversation, Read, Turn

LITTLE = 128
"""Side in pixels up to which pictures are shown as squares of pixels, and kept without loss."""

EMPTY = """<div class="empty"><span class="tiles"><i></i><i></i><i></i><i></i></span>
<b>Nothing here yet</b><p>Say what to draw, add a picture to ask about, or both.</p></div>"""
WAITING = """<article class="turn waits"><p class="meta">waiting for its turn &hellip;</p></article>"""


def data_uri(picture: Picture) -> str:
    """A picture as the source of an `<img>`: PNG where it is little, else JPEG."""
    buffer = io.BytesIO()
    if max(picture.size) <= LITTLE:
        picture.save(buffer, "PNG")
        kind = "png"
    else:
        picture.convert("RGB").save(buffer, "JPEG", quality=90)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def image(picture: Picture, words: str, kind: str = "") -> str:
    """A picture with words for those who do not see it."""
    names = " ".join(filter(None, ["crisp" if max(picture.size) <= LITTLE else "", kind]))
    return f'<img class="{names}" src="{data_uri(picture)}" alt="{escape(words)}">'


def conversation_html(conversation: Conversation) -> str:
    """The closed turns, oldest first; each is written once."""
    for turn in conversation.turns:
        turn.html = turn.html or turn_html(turn)
    return "".join(turn.html for turn in conversation.turns) or ("" if conversation.open else EMPTY)


def turn_html(turn: Turn) -> str:
    """One prompt and what there is of its answer."""
    asked = "".join(_content(part, "a picture of the prompt") for part in turn.prompt)
    return _article(turn, f'<div class="asked">{asked}</div>' if asked else "")


def edit_html(turn: Turn) -> str:
    """What there is of an edit until its pictures are in the gallery; of one that was refused, why."""
    if turn.state == "done" or not turn.samples:
        return problem(turn.error)
    return _article(turn)


def _article(turn: Turn, above: str = "") -> str:
    samples = "" if turn.error and not any(turn.samples) else _samples(turn)
    parts = [above, samples, _documents(turn.documents), problem(turn.error), f'<p class="meta">{_meta(turn)}</p>']
    return f'<article class="turn {turn.state}">{"".join(parts)}</article>'


def problem(message: str) -> str:
    """A message of its own; nothing where it is empty."""
    return f'<p class="problem" role="alert">{escape(message)}</p>' if message else ""


def _samples(turn: Turn) -> str:
    """A card for each sample, also for those of which there is nothing yet."""
    samples = turn.samples or [[] for _ in range(turn.settings.num)]
    kind = "words" if turn.settings.output == "text" else "pictures"
    cards = []
    for number, parts in enumerate(samples):
        waiting = f'<div class="waiting {kind}"></div>' if turn.state == "drawing" else "<p><em>nothing</em></p>"
        body = [_part(turn, number, place, part) for place, part in enumerate(parts)]
        cards.append(f'<div class="sample">{"".join(body) or waiting}</div>')
    return f'<div class="samples {kind}" aria-busy="{str(turn.state == "drawing").lower()}">{"".join(cards)}</div>'


def _part(turn: Turn, sample: int, place: int, part: Content) -> str:
    kind = "" if turn.is_whole(sample, place) or turn.state != "drawing" else "growing"
    if isinstance(part, Picture):
        return image(part, "a picture that is being drawn" if kind else "a drawn picture", kind)
    return f'<p class="said {kind}">{escape(part)}</p>'


def _content(part: Content, words: str) -> str:
    return image(part, words) if isinstance(part, Picture) else f"<p>{escape(part)}</p>"


def _documents(documents: Sequence[Read]) -> str:
    """What was read first, the nearest first."""
    if not documents:
        return ""
    cells = []
    for one in reversed(documents):
        shown = "".join(image(part, "a picture of the memory") for part in one.parts if isinstance(part, Picture))
        words = "".join(f"<p>{escape(part)}</p>" for part in one.parts if isinstance(part, str))
        cells.append(
            f'<li title="{escape(one.key)}"><div>{shown}</div><div>{words}<small>{one.score:.2f}</small></div></li>'
        )
    count = f"{len(documents)} document{'s' if len(documents) > 1 else ''}"
    return f'<details class="read" open><summary>Read {count} first</summary><ol>{"".join(cells)}</ol></details>'


def _meta(turn: Turn) -> str:
    words = [turn.settings.describe(turn.prompt), *turn.notes]
    if turn.state != "done":
        words.append({"drawing": "drawing \N{HORIZONTAL ELLIPSIS}", "stopped": "stopped"}[turn.state])
    return escape(" \N{MIDDLE DOT} ".join(words))
