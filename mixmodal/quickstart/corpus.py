"""The demo corpus: captioned emoji in two styles, with held-out pairs of concept and style.

A held-out concept is seen in training in its other style only, so that drawing it takes what was learned of the style.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mixmodal.data.shards import (
    INDEX_NAME,
    PictureFile,
    Sample,
    mark_unfinished,
    remove_unfinished,
    write_shards,
)
from mixmodal.files import write_whole
from mixmodal.quickstart.art import FLAT, LICENCES, OUTLINE, STYLES, Emoji, SkinTone, find_emoji, render_all

Progress = Callable[[int, int], None]
"""Called with the numbers of finished and of all pictures."""
Pictures = Mapping[tuple[str, str], np.ndarray]
"""(code point, style) -> pixels, uint8 `(H, W, 3)`."""
TRAIN, HELDOUT, EXTRA, MIXED = "train", "heldout", "tokenizer_extra", "train_mixed"
CORPUS_NAME = "corpus.json"
PROGRESS_EVERY = 100


@dataclass(frozen=True, kw_only=True)
class DemoCorpusConfig:
    """Which emoji become concepts, and which pairs of concept and style are held out.

    Args:
        image_size: side of the pictures, pixels.
        margin: white around what is drawn, as a share of the side.
        skin_tones: tones of people and hands that are concepts of their own beside the yellow ones.
        skip_categories: categories that are left out.
        skip_patterns: regular expressions; a concept whose name has a match is left out.
        min_correlation: Pearson correlation that the two styles of a concept must exceed; less shows another motif.
        min_distance: root mean squared difference, 0 .. 1, that the nearest other concept must exceed in both styles.
        min_family: concepts that must be left of a family, which differ in their skin tone only, where it had several.
        max_concepts: drawn by the seed where more are left; 0 keeps all.
        heldout_share: share of the pairs of concept and style that is held out, half of it in either style.
        mixed: whether to write documents of both styles of a concept, too.
        shard_size: samples a shard.
        seed: of the draw of the concepts and of the held-out pairs.
    """

    image_size: int = 32
    margin: float = 1 / 32
    skin_tones: tuple[SkinTone, ...] = ()
    skip_categories: tuple[str, ...] = ("flags",)
    skip_patterns: tuple[str, ...] = ()
    min_correlation: float = 0.5
    min_distance: float = 0.1
    min_family: int = 1
    max_concepts: int = 0
    heldout_share: float = 0.12
    mixed: bool = False
    shard_size: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.heldout_share <= 0.5:
            raise ValueError(f"heldout_share is {self.heldout_share}; it must lie in 0 .. 0.5: one style must remain")
        if self.image_size < 8 or not 0 <= self.margin < 0.5:
            raise ValueError(f"image_size is {self.image_size} (at least 8), margin is {self.margin} (0 .. below 0.5)")


@dataclass(frozen=True)
class DemoCorpus:
    """What was written.

    Args:
        folder: holds `corpus.json` and the folders of shards.
        pairs: key, concept, style, category, code_point and split (`train` or `heldout`) of each pair.
        counts: pictures of each folder of shards, and concepts.
    """

    folder: Path
    pairs: list[dict[str, str]]
    counts: dict[str, int]


def caption(concept: str, style: str) -> str:
    """What is written under a picture: `red apple, flat style`."""
    return f"{concept}, {style} style"


def build_demo_corpus(config: DemoCorpusConfig, out: Path, progress: Progress | None = None) -> DemoCorpus:
    """Writes the shards `train`, `heldout`, `tokenizer_extra` (all other pictures) and `train_mixed`, if asked.

    A finished corpus of the same config is taken as it is, an unfinished one is built again.

    Raises:
        ValueError: where a package is missing, the folder holds a corpus of another config, or no concept is left.
    """
    written = _load(config, out)
    if written:
        return written
    emoji = find_emoji(config.skin_tones)
    pictures = _render(emoji, config, progress)
    concepts = choose_concepts(emoji, pictures, config)
    heldout = choose_heldout(concepts, config)
    pairs = [
        {**_metadata(entry, style), "split": HELDOUT if (entry.code_point, style) in heldout else TRAIN}
        for entry in concepts
        for style in STYLES
    ]
    chosen = {entry.code_point for entry in concepts}
    splits = {
        TRAIN: _samples((pair for pair in pairs if pair["split"] == TRAIN), pictures),
        HELDOUT: _samples((pair for pair in pairs if pair["split"] == HELDOUT), pictures),
        EXTRA: _samples(
            (_metadata(entry, style) for entry in emoji if entry.code_point not in chosen for style in entry.files),
            pictures,
        ),
    }
    if config.mixed:
        both = [entry for entry in concepts if not {(entry.code_point, style) for style in STYLES} & heldout]
        splits[MIXED] = _mixed_samples(both, pictures, config)
    counts = {"concepts": len(concepts)}
    for name, samples in splits.items():
        if (out / name / INDEX_NAME).is_file():  # but there is no `corpus.json`: the corpus is unfinished
            mark_unfinished(out / name)
        remove_unfinished(out / name)
        write_shards(samples, out / name, config.shard_size)
        index = json.loads((out / name / INDEX_NAME).read_bytes())
        counts[name] = sum(shard["samples"] for shard in index["shards"])
    content = {"config": _plain(config), "licences": LICENCES, "counts": counts, "pairs": pairs}
    write_whole(out / CORPUS_NAME, json.dumps(content, indent=1, ensure_ascii=False).encode())
    return DemoCorpus(out, pairs, counts)


def _load(config: DemoCorpusConfig, out: Path) -> DemoCorpus | None:
    """The finished corpus of the folder, if there is one."""
    path = out / CORPUS_NAME
    if not path.is_file():
        return None
    content = json.loads(path.read_bytes())
    for key, value in _plain(config).items():
        if content["config"].get(key) != value:
            raise ValueError(
                f"{path}: {key} is {content['config'].get(key)}, not {value}; remove the folder or choose another one"
            )
    return DemoCorpus(out, content["pairs"], content["counts"])


def _plain(config: DemoCorpusConfig) -> dict[str, object]:
    return json.loads(json.dumps(asdict(config)))


def _render(emoji: Sequence[Emoji], config: DemoCorpusConfig, progress: Progress | None) -> Pictures:
    pictures: dict[tuple[str, str], np.ndarray] = {}
    total = sum(len(entry.files) for entry in emoji)
    for entry, style, pixels in render_all(emoji, config.image_size, config.margin):
        pictures[entry.code_point, style] = pixels
        if progress and (len(pictures) % PROGRESS_EVERY == 0 or len(pictures) == total):
            progress(len(pictures), total)
    return pictures


def choose_concepts(emoji: Sequence[Emoji], pictures: Pictures, config: DemoCorpusConfig) -> list[Emoji]:
    """Emoji that are drawn in both styles, show one motif and look like no other, in an order drawn by the seed.

    Raises:
        ValueError: where none is left.
    """
    both = [entry for entry in emoji if len(entry.files) == len(STYLES)]
    patterns = [re.compile(pattern) for pattern in config.skip_patterns]
    kept = np.array(
        [
            entry.category not in config.skip_categories and not any(regex.search(entry.concept) for regex in patterns)
            for entry in both
        ],
        dtype=bool,
    )
    if kept.any():
        flat, outline = (
            np.stack([pictures[entry.code_point, style] for entry in both]).reshape(len(both), -1) for style in STYLES
        )
        kept &= correlations(flat, outline) > config.min_correlation
        for pixels in (flat, outline):
            kept &= distances_to_nearest(pixels) > config.min_distance
    sizes, left = (Counter(entry.family for entry in some) for some in (both, [both[i] for i in np.flatnonzero(kept)]))
    whole = [sizes[entry.family] == 1 or left[entry.family] >= config.min_family for entry in both]
    kept &= np.array(whole, dtype=bool)
    if not kept.any():
        raise ValueError("no concept of the demo corpus is left; lower min_correlation or min_distance, or skip less")
    order = np.random.default_rng((config.seed, 0)).permutation(np.flatnonzero(kept))
    return [both[index] for index in order[: config.max_concepts or None]]


def correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Pearson correlation of each row of one array with that row of the other, `(N, P)` to `(N,)`."""
    centred = [rows.astype(np.float32) - rows.mean(axis=1, keepdims=True) for rows in (first, second)]
    norms = [np.linalg.norm(rows, axis=1) for rows in centred]
    return (centred[0] * centred[1]).sum(axis=1) / np.maximum(norms[0] * norms[1], 1e-6)


def distances_to_nearest(pixels: np.ndarray) -> np.ndarray:
    """Root mean squared difference, 0 .. 1, of each row, uint8 `(N, P)`, to the most similar other one: `(N,)`."""
    rows = pixels.astype(np.float32) / 255
    norms = (rows**2).sum(axis=1)
    squares = norms[:, None] + norms[None] - 2 * rows @ rows.T
    np.fill_diagonal(squares, np.inf)
    return np.sqrt(np.maximum(squares.min(axis=1), 0) / rows.shape[1])


def choose_heldout(concepts: Sequence[Emoji], config: DemoCorpusConfig) -> set[tuple[str, str]]:
    """Held-out pairs, (code point, style): at most one style of a concept, both styles equally often."""
    count = round(config.heldout_share * len(STYLES) * len(concepts))
    order = np.random.default_rng((config.seed, 1)).permutation(len(concepts))[:count]
    return {(concepts[index].code_point, STYLES[number % len(STYLES)]) for number, index in enumerate(order)}


def _metadata(entry: Emoji, style: str) -> dict[str, str]:
    return {
        "key": f"{entry.code_point}_{style}",
        "concept": entry.concept,
        "style": style,
        "category": entry.category,
        "code_point": entry.code_point,
    }


def _picture(metadata: Mapping[str, str], pictures: Pictures) -> PictureFile:
    stream = io.BytesIO()
    Image.fromarray(pictures[metadata["code_point"], metadata["style"]]).save(stream, "PNG", compress_level=1)
    return PictureFile(stream.getvalue(), "png", metadata["key"])


def _samples(metadata: Iterable[Mapping[str, str]], pictures: Pictures) -> Iterator[Sample]:
    for entry in metadata:
        parts = (caption(entry["concept"], entry["style"]), _picture(entry, pictures))
        yield Sample(entry["key"], parts, dict(entry))


def _mixed_samples(concepts: Iterable[Emoji], pictures: Pictures, config: DemoCorpusConfig) -> Iterator[Sample]:
    """Both styles of a concept in one document, the first style drawn by the seed."""
    rng = np.random.default_rng((config.seed, 2))
    for entry in concepts:
        parts: list[str | PictureFile] = []
        for style in (FLAT, OUTLINE) if rng.random() < 0.5 else (OUTLINE, FLAT):
            parts += [caption(entry.concept, style), _picture(_metadata(entry, style), pictures)]
        metadata = {"concept": entry.concept, "category": entry.category, "code_point": entry.code_point}
        yield Sample(f"{entry.code_point}_both", tuple(parts), metadata)
