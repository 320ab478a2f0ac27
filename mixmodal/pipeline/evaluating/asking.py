"""What a model writes about pictures: the prompts of each sample asked, its answers, and the picture for the page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixmodal.document import EndOfTurn
from mixmodal.pipeline.evaluating.task import SHOWN, Item, Setup, Shown, TaskOptions, open_first, save, skipped
from mixmodal.pipeline.options import sampling_options
from mixmodal.pipeline.queue import Ask, Failed
from mixmodal.sampling.rules import TokenSampling
from mixmodal.tokenization.codec import Content

GREEDY = TokenSampling(temperature=0.0)


@dataclass(frozen=True, kw_only=True)
class AskingOptions(TaskOptions):
    """What tasks have in common whose answers are texts.

    Args:
        sampling: how text is drawn.
        max_new_tokens: after which it is cut.
    """

    sampling: TokenSampling = GREEDY
    max_new_tokens: int = 64


def ask_each(
    setup: Setup,
    items: Iterable[Item],
    options: AskingOptions,
    prompts: Callable[[Item], Sequence[Sequence[Content]]],
    record: Callable[[Item, list[str]], dict[str, Any]],
) -> Iterator[tuple[Item, dict[str, Any]]]:
    """The record of each item, in whatever order they end; one of which a prompt has failed is skipped.

    Args:
        setup: the pictures of the first items are written into its folder, for the page.
        items: each with a picture.
        options: how texts are drawn.
        prompts: of an item, perhaps none; a ValueError skips it.
        record: of an item and the text behind each of its prompts.
    """
    model = setup.load()
    known: dict[str, tuple[Item, list[str | None]]] = {}
    silent: list[Item] = []

    def asks() -> Iterator[Ask | Failed]:
        for item in items:
            try:
                found = prompts(item)
                if item.place < SHOWN:
                    in_turns = any(isinstance(part, EndOfTurn) for prompt in found for part in prompt)
                    padded = in_turns and model.codec.conversations  # as the model sees it
                    save(setup, model.codec.fit(open_first(item, setup.limits), padded=padded), item.key)
            except ValueError as error:
                known[item.key] = item, []
                yield Failed(f"{item.key} 0", error)
                continue
            if not found:
                silent.append(item)
                continue
            known[item.key] = item, [None] * len(found)
            for number, prompt in enumerate(found):
                yield Ask(f"{item.key} {number}", prompt, seed=setup.seed_of(item))

    drawing: Any = {"max_new_tokens": options.max_new_tokens, **sampling_options({"text": options.sampling})}
    for one in model.generate_each(asks(), "text", **drawing):
        key, number = one.key.split()
        if key not in known:  # another prompt of the item has failed
            continue
        item, texts = known[key]
        if isinstance(one, Failed):
            del known[key]
            yield item, skipped(one.error)
            continue
        texts[int(number)] = str(one.sample).strip()
        whole = [text for text in texts if text is not None]
        if len(whole) == len(texts):
            del known[key]
            yield item, record(item, whole)
    yield from ((item, record(item, [])) for item in silent)


def show_first(
    setup: Setup, entries: Sequence[Mapping[str, Any]], tell: Callable[[Mapping[str, Any], dict[str, str]], Shown]
) -> list[Shown]:
    """What `tell` makes of the first records and their pictures."""
    found: list[Shown] = []
    for entry in entries[:SHOWN]:
        name = f"{entry['key']}.png"
        if (setup.folder / name).exists():  # where some were skipped, later ones come up of which none was saved
            found.append(tell(entry, {name: ""}))
    return found
