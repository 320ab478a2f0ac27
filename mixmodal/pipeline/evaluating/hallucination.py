"""Whether the model says yes to objects that are not in a picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixmodal.data.shards import Sample
from mixmodal.document import EndOfTurn
from mixmodal.evaluation.hallucination import NEGATIVES, Negatives, Probe, pope_questions, pope_scores
from mixmodal.pipeline.evaluating.image_to_text import GREEDY
from mixmodal.pipeline.evaluating.task import (
    ChosenSamples,
    Findings,
    Item,
    Setup,
    Task,
    TaskOptions,
    open_first,
    skipped,
)
from mixmodal.pipeline.options import sampling_options
from mixmodal.pipeline.queue import Ask, Failed
from mixmodal.sampling.rules import TokenSampling
from mixmodal.tokenization.codec import Content


@dataclass(frozen=True, kw_only=True)
class HallucinationOptions(TaskOptions):
    """POPE (arXiv 2305.10355). Each picture's metadata have `objects`, the list of what it shows.

    Args:
        num_pairs: objects in and not in a picture that are asked for, as many of one kind as of the other.
        turns: whether the model was tuned on conversations; an end of turn stands behind the question then.
        sampling: how answers are drawn.
        max_new_tokens: after which an answer is cut.
    """

    num_pairs: int = 3
    turns: bool = True
    sampling: TokenSampling = GREEDY
    max_new_tokens: int = 8


class Hallucination(Task[HallucinationOptions]):
    """See `HallucinationOptions`."""

    title = "Hallucination"
    introduction = "Whether the model says yes to objects that are not in the picture (POPE), by how these were chosen."

    def takes(self, sample: Sample) -> bool:
        return len(sample.pictures) == 1 and bool(objects_of(sample))

    def measure(self, setup: Setup, items: Iterable[Item]) -> Iterator[tuple[Item, dict[str, Any]]]:
        model, end = setup.load(), [EndOfTurn()] if self.options.turns else []
        probes = self._probes(ChosenSamples(self, setup.limits, setup.seed), setup.seed)
        known: dict[str, tuple[Item, list[dict[str, Any]]]] = {}
        others: list[tuple[Item, dict[str, Any]]] = []  # broken ones, and those of which nothing can be asked

        def asks() -> Iterator[Ask]:
            for item in items:
                asked = probes.get(item.place, [])
                try:
                    (coded,) = model.codec.encode_pictures([open_first(item, setup.limits)])
                except ValueError as error:
                    others.append((item, skipped(error)))
                    continue
                if not asked:
                    others.append((item, {"sample": item.sample.key, "asked": []}))
                    continue
                rows = [{"negatives": kind, **probe._asdict(), "said": None} for kind, probe in asked]
                known[item.key] = item, rows
                for number, row in enumerate(rows):
                    prompt: list[Content] = [coded, row["question"], *end]
                    yield Ask(f"{item.key} {number}", prompt, seed=setup.seed_of(item))

        options: Any = {"max_new_tokens": self.options.max_new_tokens}
        options |= sampling_options({"text": self.options.sampling})
        for one in model.generate_each(asks(), "text", **options):
            key, number = one.key.split()
            if key not in known:  # another question of the picture has failed
                continue
            item, rows = known[key]
            if isinstance(one, Failed):
                del known[key]
                yield item, skipped(one.error)
                continue
            rows[int(number)]["said"] = str(one.sample).strip()
            if all(row["said"] is not None for row in rows):
                del known[key]
                yield item, {"sample": item.sample.key, "asked": rows}
        yield from others

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
        return Findings(metrics=metrics)


def objects_of(sample: Sample) -> list[str]:
    """What the metadata of a sample say that its picture shows."""
    found = sample.metadata.get("objects")
    return [one for one in found if isinstance(one, str)] if isinstance(found, list) else []
