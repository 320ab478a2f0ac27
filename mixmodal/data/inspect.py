"""`mixmodal inspect`: packed training rows in colour, as the model will see them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from mixmodal.data.mixture import ShareLimits, StageConfig
from mixmodal.data.retrieved import RetrievalConfig
from mixmodal.data.source import Source, SourceConfig
from mixmodal.objectives.causal_masked import CausalMasked, CausalMaskedConfig

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from mixmodal.data.balance import BalancedMixture
    from mixmodal.data.packing import Batch
    from mixmodal.data.pipeline import DataConfig
    from mixmodal.data.token_shards import TokenShards
    from mixmodal.document import TextCodec
    from mixmodal.vocabulary import Vocabulary

STYLES = {"text": "green", "image": "cyan", "sentinel": "bold yellow", "control": "magenta", "padding": "bright_black"}
FURTHER_STYLE = "blue"
"""For coded modalities that have no colour of their own."""


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """What to print.

    Args:
        data: folder with token shards.
        sources: several of them in the place of `data`, as in training; each document is shown with its source.
        modality_balance: as in training; the shares of answers are shown beside those wanted.
        share_limits: as in training.
        stages: as in training.
        step: rows are drawn with the weights of this optimizer step; above 0 with `stages` alone.
        text_tokenizer: model file, to show text as text; by default one beside the token shards, if it is theirs.
        objective: masks to draw.
        seq_len: length of a row in tokens.
        num_rows: rows to print.
        image_first_share: as in training.
        caption_dropout: as in training.
        first_part_weight: as in training.
        loss_on: as in training.
        lookahead: as in training.
        candidates: as in training, of `data`.
        retrieval: as in training.
        seed: of the stream of rows.
        max_codes: codes of a part that are printed before the rest is left out.
    """

    data: Path | None = None
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    modality_balance: dict[str, float] = field(default_factory=dict)
    share_limits: ShareLimits | None = None
    stages: tuple[StageConfig, ...] = ()
    step: int = 0
    text_tokenizer: Path | None = None
    objective: CausalMaskedConfig = field(default_factory=CausalMaskedConfig)
    seq_len: int = 1024
    num_rows: int = 4
    image_first_share: float = 0.5
    caption_dropout: float = 0.1
    first_part_weight: float = 1.0
    loss_on: Literal["flagged", "all"] = "flagged"
    lookahead: int = 0
    candidates: Path | None = None
    retrieval: RetrievalConfig | None = None
    seed: int = 0
    max_codes: int = 12

    def __post_init__(self) -> None:
        if (self.data is None) == (not self.sources):
            raise ValueError("inspect: give either data, a folder of token shards, or sources, several by name")
        for name, least in (("num_rows", 1), ("max_codes", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"inspect: {name} is {getattr(self, name)}; it must be at least {least}")
        if self.step < 0 or (self.step and not self.stages):
            raise ValueError(f"inspect: step is {self.step}; it must not be negative, and acts with stages alone")


class Stretch(NamedTuple):
    """Neighbouring tokens that look the same: one kind (a modality, `sentinel` or `control`) and one loss weight."""

    kind: str
    weight: float
    ids: np.ndarray


def inspect(config: InspectConfig) -> None:
    """Prints rows, a legend and totals.

    Raises:
        ValueError: where there are no token shards, or the text tokenizer given is not theirs, or masks are asked for
            in pairs of answers.
    """
    from rich.console import Console

    from mixmodal.data.balance import BalancedMixture
    from mixmodal.data.mixture import counters
    from mixmodal.data.pipeline import PackedDocuments, open_retrievals, open_sources

    data = _data_config(config)
    sources = open_sources(data)
    shards = next(iter(sources.values()))
    if config.objective.draws and any(source.has_pairs for source in sources.values()):
        raise ValueError("inspect: no masks are drawn in pairs of answers; set objective.min_masks and max_masks to 0")
    text_tokenizer = _find_text_tokenizer(config, shards)
    objective = CausalMasked(config.objective, shards.vocabulary)
    rows = PackedDocuments(
        sources,
        shards.build_format(),
        objective,
        data,
        micro_batch_size=1,
        seed=config.seed,
        retrieval=open_retrievals(data, sources),
    )
    console = Console(highlight=False)
    plain = not console.is_terminal  # in a file or a pipe, lines are not cut to a width
    console.print(_legend(shards.vocabulary), soft_wrap=plain)
    tokens: Counter[str] = Counter()
    weights: defaultdict[str, float] = defaultdict(float)
    for number, batch in enumerate(islice(rows, config.num_rows)):
        used = int(batch.num_tokens)
        console.print(f"\nrow {number}: {batch.num_documents} documents, {used} of {config.seq_len} tokens")
        for key, stretches in _documents(batch, shards.vocabulary):
            console.print(f"  {_escape(key)}", style="bright_black", markup=False, soft_wrap=plain)
            line = _line(stretches, shards.vocabulary, text_tokenizer, config.max_codes)
            console.print(line, soft_wrap=plain)
            for stretch in stretches:
                tokens[stretch.kind] += len(stretch.ids)
                weights[stretch.kind] += stretch.weight * len(stretch.ids)
        tokens["padding"] += config.seq_len - used
    console.print()
    console.print(_totals(tokens, weights))
    counted = counters(rows.state_dict())
    if isinstance(rows.mixture, BalancedMixture):
        console.print(_answers(rows.mixture, rows.sources, counted))
    if config.sources:
        console.print(_shares(rows.mixture.weights, rows.sources, counted))
    if text_tokenizer is None:
        console.print("text is shown as piece numbers; --text_tokenizer FILE shows it as text")


def _data_config(config: InspectConfig) -> DataConfig:
    """What training would be told of the data, with the weights of one step alone."""
    from mixmodal.data.pipeline import DataConfig

    data = DataConfig(
        tokens=config.data,
        sources=config.sources,
        modality_balance=config.modality_balance,
        share_limits=config.share_limits,
        stages=config.stages,
        seq_len=config.seq_len,
        image_first_share=config.image_first_share,
        caption_dropout=config.caption_dropout,
        first_part_weight=config.first_part_weight,
        loss_on=config.loss_on,
        lookahead=config.lookahead,
        candidates=config.candidates,
        retrieval=config.retrieval,
    )
    return _as_in_step(data, config.step)


def _as_in_step(data: DataConfig, step: int) -> DataConfig:
    """With the weights of one step alone; sources that rest in it are left out."""
    if not data.stages:
        return data
    weights = data.weights_at(step)
    sources = {name: replace(one, weight=weights[name]) for name, one in data.sources.items() if weights[name]}
    limits = data.share_limits if len(sources) > 1 or data.modality_balance else None
    return replace(data, sources=sources, stages=(), share_limits=limits)


def stretches_of(ids: np.ndarray, weights: np.ndarray, vocabulary: Vocabulary) -> list[Stretch]:
    """The tokens of one document in stretches; every control token and sentinel is one of its own."""
    names = [*vocabulary.modalities, "sentinel"]
    kinds = np.full(len(ids), "control", dtype=object)
    for name in names:
        kinds[np.asarray(vocabulary.contains(name, ids))] = name
    alone = [index if kind in ("control", "sentinel") else -1 for index, kind in enumerate(kinds)]
    found: list[Stretch] = []
    for (kind, weight, _), group in groupby(range(len(ids)), key=lambda i: (kinds[i], float(weights[i]), alone[i])):
        found.append(Stretch(kind, weight, ids[list(group)]))
    return found


def _documents(batch: Batch, vocabulary: Vocabulary) -> Iterator[tuple[str, list[Stretch]]]:
    segment_ids = batch.segment_ids[0].numpy()
    for segment, key in enumerate(batch.keys[0], start=1):
        inside = segment_ids == segment
        ids, weights = batch.tokens[0].numpy()[inside], batch.loss_weights[0].numpy()[inside]
        yield key, stretches_of(ids, weights, vocabulary)


def _find_text_tokenizer(config: InspectConfig, shards: TokenShards) -> TextCodec | None:
    from mixmodal.tokenization.text_files import load_text_tokenizer

    num_pieces = shards.vocabulary.config.num_text_pieces
    if config.text_tokenizer is not None:
        text_tokenizer = load_text_tokenizer(config.text_tokenizer, num_pieces)
        shards.check(text_tokenizer_sha256=text_tokenizer.sha256)
        return text_tokenizer
    for folder in (shards.folder, shards.folder.parent):
        for path in sorted([*folder.glob("*.model"), *folder.glob("*tokenizer.json")]):
            text_tokenizer = load_text_tokenizer(path, num_pieces)
            if text_tokenizer.sha256 == shards.manifest["text_tokenizer_sha256"]:
                return text_tokenizer
    return None


def _style(kind: str, weight: float = 1.0) -> str:
    style = STYLES.get(kind, FURTHER_STYLE)
    if weight == 1:
        return style
    return f"{style} dim" if weight == 0 else f"{style} underline"


def _line(
    stretches: Sequence[Stretch], vocabulary: Vocabulary, text_tokenizer: TextCodec | None, max_codes: int
) -> Text:
    from rich.text import Text

    line = Text()
    for stretch in stretches:
        content = _content(stretch, vocabulary, text_tokenizer, max_codes)
        mark = "" if stretch.weight == 1 else f"*{stretch.weight:g}"
        line.append(content + mark, _style(stretch.kind, stretch.weight)).append(" ")
    return line


def _content(stretch: Stretch, vocabulary: Vocabulary, text_tokenizer: TextCodec | None, max_codes: int) -> str:
    if stretch.kind in ("control", "sentinel"):
        return vocabulary.name(int(stretch.ids[0]))
    indices = vocabulary.from_ids(stretch.kind, stretch.ids).tolist()
    if stretch.kind == "text" and text_tokenizer is not None:
        return _escape(text_tokenizer.decode(indices))
    shown = " ".join(map(str, indices[:max_codes]))
    rest = f" ..{len(indices) - max_codes} more" if len(indices) > max_codes else ""
    return f"[{stretch.kind} {shown}{rest}]"


def _escape(text: str) -> str:
    """A text or key of the corpus must not steer the terminal, nor break its line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _legend(vocabulary: Vocabulary) -> Text:
    from rich.text import Text

    legend = Text("colours: ")
    for kind in (*vocabulary.modalities, "control", "sentinel"):
        legend.append(kind, _style(kind)).append("  ")
    legend.append("loss weight: 1  ").append("0 is dim and marked *0", "dim").append("  ")
    return legend.append("others underlined and marked", "underline")


def _totals(tokens: Counter[str], weights: Mapping[str, float]) -> Table:
    from rich.table import Table

    table = Table("kind", "tokens", "share", "loss weight")
    for column in table.columns[1:]:
        column.justify = "right"
    for kind, count in tokens.most_common():
        share = f"{count / tokens.total():.1%}"
        table.add_row(kind, str(count), share, f"{weights.get(kind, 0):g}", style=_style(kind))
    table.add_row("all", str(tokens.total()), "100.0%", f"{sum(weights.values()):g}")
    return table


def _answers(mixture: BalancedMixture, sources: Mapping[str, Source], counted: Mapping[str, float]) -> Table:
    """What each modality of answers has given, beside the share wanted, that within the limits, and that stored."""
    from rich.table import Table

    table = Table("answers", "documents", "share", "wanted", "within limits", "stored")
    for column in table.columns[1:]:
        column.justify = "right"
    for modality, wanted in mixture.wanted.items():
        documents = sum(counted[f"documents/{name}"] for name, one in sources.items() if one.modality == modality)
        shares = counted[f"answer_share/{modality}"], wanted, mixture.shares[modality], mixture.stored[modality]
        table.add_row(modality, f"{documents:g}", *(f"{share:.1%}" for share in shares))
    return table


def _shares(weights: Mapping[str, float], sources: Mapping[str, Source], counted: Mapping[str, float]) -> Table:
    """What each source has given, beside the share that its weight asks for; in each modality of answers apart."""
    from rich.table import Table

    table = Table("source", "documents", "tokens", "share", "wanted", "epochs")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, weight in weights.items():
        beside = [other for other in weights if sources[other].modality == sources[name].modality]
        tokens, total = counted[f"tokens/{name}"], sum(counted[f"tokens/{other}"] for other in beside)
        shares = tokens / max(1, total), weight / sum(weights[other] for other in beside)
        documents, epochs = f"{counted[f'documents/{name}']:g}", f"{counted[f'epochs/{name}']:.3f}"
        table.add_row(name, documents, f"{tokens:g}", *(f"{share:.1%}" for share in shares), epochs)
    return table
