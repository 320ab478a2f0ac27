"""What a model answers to records of the demo tasks, and whether that is right."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from mixmodal.data.tasks import TaskTemplates
from mixmodal.document import EndOfTurn
from mixmodal.evaluation.concepts import Rate, nearest_pictures, rate, redraw
from mixmodal.pipeline import MixedModal
from mixmodal.pipeline.options import sampling_options
from mixmodal.quickstart.demo import Demo, choose, save_picture
from mixmodal.quickstart.demo_tasks import GROUPS, Record
from mixmodal.quickstart.samples import judge
from mixmodal.sampling.rules import TokenSampling
from mixmodal.tokenization.preprocessing import to_tensor


@dataclass(frozen=True, kw_only=True)
class AnswersConfig:
    """What a tuned model is asked and how it answers.

    Args:
        per_task: records of each task and split, drawn by the seed where there are more.
        image: how codes are drawn.
        text: how text is drawn.
        guidance_scale: of codes towards what is asked; 1 is none.
        max_new_tokens: after which an answer is cut.
        batch_size: answers drawn at a time.
        seed: of the records and the answers.
    """

    per_task: int = 100
    image: TokenSampling = field(default_factory=lambda: TokenSampling(temperature=0.0))
    text: TokenSampling = field(default_factory=lambda: TokenSampling(temperature=0.0))
    guidance_scale: float = 1.0
    max_new_tokens: int = 56
    batch_size: int = 32
    seed: int = 0


class Asked(NamedTuple):
    """A record with its prompt and the kind of its answer: `text`, `image` or `mixed`."""

    record: Record
    prompt: list[Any]
    output: str


class Answered(NamedTuple):
    """What a model said and drew; of a mixed answer the first picture."""

    text: str
    picture: Image.Image | None


class Asker:
    """Asks a model by the templates that it was tuned with.

    Args:
        templates: of the tasks, which are conversations.
        folder: of the pictures that records name.
    """

    def __init__(self, templates: TaskTemplates, folder: Path) -> None:
        self._templates, self._folder = templates, folder

    def choose(self, records: Sequence[Record], config: AnswersConfig) -> list[Record]:
        """Records of each task, or of each language of captions, in a fixed order."""
        by_task: dict[str, list[Record]] = defaultdict(list)
        for record in records:
            by_task[name_of(record)].append(record)
        return [
            some[index] for some in by_task.values() for index in choose(range(len(some)), config.per_task, config.seed)
        ]

    def prompt(self, record: Record) -> Asked:
        """Up to the end of the user's turn."""
        user, answer = self._templates.fill(record, str(record["key"]))["messages"]
        kinds = {"image" if "image" in part else "text" for part in answer["parts"]}
        return Asked(record, [*self._read(user["parts"]), EndOfTurn()], "mixed" if len(kinds) > 1 else kinds.pop())

    def ask(
        self,
        model: MixedModal,
        records: Sequence[Record],
        config: AnswersConfig,
        name: str,
        only_pictures: bool = False,
    ) -> list[Answered]:
        """One answer to each record.

        Args:
            name: of the progress bar.
            only_pictures: whether a picture is drawn at once where a text and a picture are wanted: of a model that was
                never tuned to say first what it draws.
        """
        asked = [self.prompt(record) for record in records]
        found: dict[int, Answered] = {}
        for output in sorted({one.output for one in asked}):
            places = [place for place, one in enumerate(asked) if one.output == output]
            drawn = "image" if output == "mixed" and only_pictures else output
            options = sampling_options({"image": config.image, "text": config.text})
            options["guidance_scale"] = 1.0 if drawn == "text" else config.guidance_scale
            for start in track(range(0, len(places), config.batch_size), f"{name}: {output}"):
                chosen = places[start : start + config.batch_size]
                samples = model.generate_batch(
                    [asked[place].prompt for place in chosen],
                    drawn,
                    seed=config.seed,
                    **options,
                    max_new_tokens=None if drawn == "image" else config.max_new_tokens,
                )
                found.update((place, _answered(one[0])) for place, one in zip(chosen, samples, strict=True))
        return [found[place] for place in range(len(asked))]

    def _read(self, parts: Sequence[Mapping[str, Any]]) -> list[Any]:
        return [self.open(part["image"]) if "image" in part else part["text"] for part in parts]

    def open(self, file: str) -> Image.Image:
        """A picture that a record names."""
        with Image.open(self._folder / file) as picture:
            return picture.convert("RGB")


def _answered(sample: Any) -> Answered:
    parts = sample if isinstance(sample, list) else [sample]
    texts = [part for part in parts if isinstance(part, str)]
    pictures = [part for part in parts if not isinstance(part, str)]
    return Answered(" ".join(texts).strip(), pictures[0] if pictures else None)


def name_of(record: Record) -> str:
    """The task, and of captions the language."""
    return f"{record['task']} {record['language']}" if "language" in record else record["task"]


class Judge:
    """Tells right from wrong: pictures by the nearest demo picture, as the image tokenizer redraws it; texts exactly.

    Args:
        model: whose image tokenizer redraws.
        demo: all demo pictures.
    """

    def __init__(self, model: MixedModal, demo: Demo) -> None:
        self._demo = demo
        self._images: Tensor = redraw(model.codec, demo.images)
        self._places = {label.key: place for place, label in enumerate(demo.labels)}

    def items(
        self, records: Sequence[Record], answers: Sequence[Answered], heldout: bool, run: Path, folder: str
    ) -> list[dict[str, Any]]:
        """Plain data of each answer: record, what was said, and what is right. Pictures go to `run/folder`."""
        drawn = [number for number, answer in enumerate(answers) if answer.picture is not None]
        nearest: dict[int, int] = {}
        if drawn:
            images = torch.stack([to_tensor(picture) for answer in answers if (picture := answer.picture) is not None])
            nearest = dict(zip(drawn, nearest_pictures(images, self._images).indices.tolist(), strict=True))
        items: list[dict[str, Any]] = []
        for number, (record, answer) in enumerate(zip(records, answers, strict=True)):
            item: dict[str, Any] = {"task": name_of(record), "heldout": heldout, "record": record, "text": answer.text}
            if record["task"] in GROUPS:
                wanted = self._demo.labels[self._places[record["target"]]]
                verdict = dict.fromkeys(("concept_right", "style_right", "both_right"), False)
                if number in nearest and answer.picture is not None:
                    found = self._demo.labels[nearest[number]]
                    verdict = judge(wanted, found)
                    item["image"] = save_picture(answer.picture, run, f"{folder}/{number:04d}.png")
                    item["nearest"] = found.caption
                item |= verdict
            else:
                wanted = record["answer"] if "answer" in record else record["caption"]
                item["right"] = answer.text == wanted
            items.append(item)
        return items


def summarise(items: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rates by task: of pictures `concept`, `style` and `both`, of texts `right`, each `[hits, trials]`.

    Of questions for a category also `balanced`, the mean of the shares of each, `majority`, the share of the commonest
    one, and `kinds`, their number.
    """
    tasks: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for item in items:
        tasks[item["task"]].append(item)
    found: dict[str, dict[str, Any]] = {}
    for task, some in tasks.items():
        names = ("concept", "style", "both") if task in GROUPS else ("",)
        keys = {name or "right": f"{name}_right" if name else "right" for name in names}
        found[task] = {name: list(rate(bool(item[key]) for item in some)) for name, key in keys.items()}
        if task == "category":
            kinds = Counter(item["record"]["answer"] for item in some)
            shares = [
                Rate(sum(item["right"] for item in some if item["record"]["answer"] == kind), count).share
                for kind, count in kinds.items()
            ]
            found[task] |= {
                "balanced": float(np.mean(shares)),
                "majority": max(kinds.values()) / len(some),
                "kinds": len(kinds),
            }
    return found
