"""The evaluate-retrieval command: what 0, 1, 2 .. retrieved documents are worth to a model, and what random ones."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mixmodal.classification.likelihoods import SequenceScorer
from mixmodal.data.token_shards import TokenShards
from mixmodal.document import SequenceFormat
from mixmodal.evaluation.retrieval import Pair, RetrievalAblation, Worth
from mixmodal.files import write_whole
from mixmodal.pipeline.drawing_config import DTYPES
from mixmodal.pipeline.mixed_modal import MixedModal
from mixmodal.pipeline.prompts import check_memory
from mixmodal.retrieval.candidates import open_candidates
from mixmodal.retrieval.memory import open_memory

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class RetrievalEvaluationConfig:
    """Scores pairs of a text and a picture, each part given the other one, with and without documents of a memory.

    Args:
        model: folder of an exported model, or an id on the Hugging Face hub.
        memory: folder of `mixmodal index`.
        tokens: token shards of the pairs, held out from training.
        candidates: folder of `mixmodal retrieve` of those token shards; `retrieve.query_dropout 0` suits an evaluation.
        out: JSON file for the figures.
        counts: numbers of documents.
        num_random: draws of random documents for each pair, the control.
        max_pairs: the first of them; null is all.
        seed: of the random documents.
        batch_size: sequences in one forward; scores do not depend on it.
        device: `auto` takes the accelerator where there is one.
        dtype: of the weights.
    """

    model: str
    memory: Path
    tokens: Path
    candidates: Path
    out: Path
    counts: tuple[int, ...] = (0, 1, 2)
    num_random: int = 4
    max_pairs: int | None = None
    seed: int = 0
    batch_size: int = 64
    device: str = "auto"
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"

    def __post_init__(self) -> None:
        if not self.counts or min(self.counts) < 0:
            raise ValueError(f"counts is {self.counts}; give at least one number, none below 0")
        for name in ("num_random", "max_pairs", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")


def evaluate_retrieval(config: RetrievalEvaluationConfig) -> list[Worth]:
    """Scores, writes the figures and prints them.

    Raises:
        ValueError: where model, memory, candidates and token shards do not belong together, or there are no pairs.
    """
    model = MixedModal.from_pretrained(config.model, config.device, DTYPES[config.dtype], config.batch_size)
    shards = TokenShards.open(config.tokens)
    shards.check_pairs(wanted=False)
    memory = open_memory(config.memory, encoder_identity=None, verify=False, searched=False)
    check_memory(memory, model.codec, model.folder)
    memory.check_like(shards.manifest)
    candidates = open_candidates(config.candidates, memory=memory, tokens_digest=shards.digest)
    left_out: Counter[str] = Counter()
    pairs = list(read_pairs(shards, model.format, left_out))[: config.max_pairs]
    if not pairs:
        raise ValueError(f"{config.tokens}: there is no document of one text and one picture to score")
    scorer = SequenceScorer(model.model, model.format, config.batch_size)
    ablation = RetrievalAblation(scorer, memory, candidates, model.model.config.max_seq_len)
    found: list[Worth] = []
    for predicted in ("image", "text"):
        text_first = predicted != "text"
        chosen = [pair._replace(ids=model.format.order_pair(pair.ids, text_first=text_first)) for pair in pairs]
        found += ablation.measure(chosen, predicted, config.counts, config.num_random, config.seed)
    report = {
        "model": config.model,
        "memory": str(config.memory),
        "tokens": str(config.tokens),
        "num_random": config.num_random,
        "seed": config.seed,
        "not_pairs": left_out["not pairs"],
        "worth": [asdict(one) for one in found],
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(config.out, (json.dumps(report, indent=2) + "\n").encode())
    from rich.console import Console

    Console().print(table(found))
    print(f"{len(pairs)} pairs; figures in {config.out}")
    return found


def read_pairs(shards: TokenShards, format: SequenceFormat, left_out: Counter[str]) -> Iterator[Pair]:
    """The first variant of every sample that is a pair of a text and a coded part."""
    for sample in range(len(shards) // shards.num_variants):
        index = sample * shards.num_variants
        ids = shards[index]
        if format.turn_pair(ids) is None:
            left_out["not pairs"] += 1
        else:
            yield Pair(sample, shards.keys[index].rpartition("#")[0], ids)


def table(found: Sequence[Worth]) -> Table:
    from rich.table import Table

    table = Table("predicted", "documents", "before a pair", "nats a token", "below 0 documents", "standard error")
    for column in table.columns[2:]:
        column.justify = "right"
    for one in found:
        name = "none" if not one.count else f"{one.count} {one.kind}"
        row = one.predicted, name, f"{one.used:.2f}", f"{one.nats_per_token:.4f}"
        table.add_row(*row, *((f"{one.nats_less:+.4f}", f"{one.nats_less_error:.4f}") if one.count else ("", "")))
    return table
