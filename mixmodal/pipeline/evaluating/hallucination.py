"""Whether the model says yes to objects that are not in a picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixmodal.data.shards import Sample
from mixmodal.document import EndOfTurn
from mixmodal.evaluation.hallucination import NEGATIVES, Negatives, Probe, pope_questions, pope_scores
from mixmodal.pipeline.evaluating.asking import AskingOptions, ask_each, show_first
from mixmodal.pipeline.evaluating.task import ChosenSamples, Findings, Item, Setup, Shown, Task, objects_of, open_first
from mixmodal.tokenization.codec import Content


@dataclass(frozen=True, kw_only=True)
class HallucinationOptions(AskingOptions):
    """POPE (arXiv 2305.10355). Each picture's metadata have `objects`, the list of what it shows.

    Args:
        num_pairs: objects in and not in a picture that are asked for, as many of one kind as of the other.
        turns: whether the model was tuned on conversations; an end of turn stands behind the question then.
    """

    num_pairs: int = 3
    turns: bool = True
    max_new_tokens: int = 8


class Hallucination(Task[HallucinationOptions]):
    """See `HallucinationOptions`."""

    title = "Hallucination"
    introduction = "Whether the model says yes to objects that are not in the picture (POPE), by how these were chosen."

    def takes(self, sample: Sample) -> bool:
        return len(sample.pictures) == 1 and bool(objects_of(sample))

    def measure(self, setup: Setup, items: Iterable[Item]) -> Iterator[tuple[Item, dict[str, Any]]]:
        end = [EndOfTurn()] if self.options.turns else []
        probes = self._probes(ChosenSamples(self, setup.limits, setup.seed), setup.seed)

        def questions(item: Item) -> list[str]:
            """Each once: those about objects that are there come with every kind of negatives."""
            return list(dict.fromkeys(probe.question for _, probe in probes.get(item.place, [])))

        def prompts(item: Item) -> list[list[Content]]:
            coded = setup.load().codec.to_document([open_first(item, setup.limits), *end]).parts[0]  # for all questions
            return [[coded, question, *end] for question in questions(item)]

        def record(item: Item, said: list[str]) -> dict[str, Any]:
            answers = dict(zip(questions(item), said, strict=True))
            rows = [
                {"negatives": kind, **probe._asdict(), "said": answers[probe.question]}
                for kind, probe in probes.get(item.place, [])
            ]
            return {"sample": item.sample.key, "asked": rows}

        return ask_each(setup, items, self.options, prompts, record)

    def _probes(self, chosen: Iterable[Item], seed: int) -> dict[int, list[tuple[Negatives, Probe]]]:
        """The questions about each picture, by its place: they depend on what all pictures show."""
        objects = [objects_of(item.sample) for item in chosen]
        found: dict[int, list[tuple[Negatives, Probe]]] = {}
        for kind in NEGATIVES:
            for probe in pope_questions(objects, kind, self.options.num_pairs, seed):
                found.setdefault(probe.picture, []).append((kind, probe))
        return found

    def sum_up(self, setup: Setup, entries: Sequence[Mapping[str, Any]]) -> Findings:
        metrics: dict[str, float | None] = {}
        for kind in NEGATIVES:
            rows = [row for entry in entries for row in entry["asked"] if row["negatives"] == kind]
            if not rows:
                continue
            probes = [Probe(*(row[name] for name in Probe._fields)) for row in rows]
            scores = pope_scores(probes, [row["said"] for row in rows])._asdict()
            metrics |= {f"pope_{kind}_{name}": float(value) for name, value in scores.items()}
        return Findings(metrics=metrics, shown=show_first(setup, entries, tell))


def tell(entry: Mapping[str, Any], pictures: dict[str, str]) -> Shown:
    """The model's answer about each object, beside the objects that are there; right where all answers are."""
    asked = {row["name"]: row for row in entry["asked"]}
    text = "; ".join(f"{name}: {row['said']}" for name, row in asked.items())
    probes = [Probe(*(row[name] for name in Probe._fields)) for row in asked.values()]
    right = pope_scores(probes, [row["said"] for row in asked.values()]).accuracy == 1 if asked else None
    there = ", ".join(name for name, row in asked.items() if row["answer"] == "yes")
    return Shown(pictures=pictures, text=text or "nothing to ask", wanted=there, right=right)
