"""Tasks whose captions use the same words in another order: does a model see what belongs to what?

A task is a folder with a JSONL file, one object a line:

    {"key": "000", "kind": "order", "images": ["pictures/000_0.png", "pictures/000_1.png"],
     "captions": ["a red circle left of a blue square", "a blue square left of a red circle"], "true": [0, 1]}

| field | what it is |
|---|---|
| `images` | paths of pictures, relative to the folder of the file and inside it |
| `captions` | at least two, all different |
| `true` | for each picture the number of its caption, from 0 |
| `key` | optional: a name of the line, unique in the file; its line number otherwise |
| `kind` | optional: accuracies are told for each kind, too |

With two pictures, two captions and each caption true of one picture a line is a grid as in Winoground (arXiv
2204.03162); with one picture it is a choice as in ARO (arXiv 2210.01936).

Shapes: P pictures and C captions of one line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL.Image import Image as Picture

from mixmodal.classification.published_tasks import from_sugarcrepe, from_winoground, is_winoground
from mixmodal.classification.result import TIE
from mixmodal.tokenization.preprocessing import open_picture

ScorePairs = Callable[[Sequence[Picture], Sequence[str]], np.ndarray]
"""Pictures and captions to scores `(P, C)`, finite: higher fits better."""
ScorePictures = Callable[[Sequence[Picture]], np.ndarray]
"""Pictures to what `ScorePairs` gives them whatever the caption is, `(P,)`: log p(image)."""


class Composition(NamedTuple):
    """One line of a task: see the head of this file."""

    key: str
    kind: str
    images: tuple[Path, ...]
    captions: tuple[str, ...]
    true: tuple[int, ...]

    @property
    def is_grid(self) -> bool:
        """Whether it is two pictures with a caption each."""
        return len(self.images) == len(self.captions) == 2 and sorted(self.true) == [0, 1]


class Judged(NamedTuple):
    """What the scores of one line say.

    Args:
        credits: for each picture 1 where its caption has the best score, 1/k where k captions share it, 0 otherwise.
        ties: pictures whose best score several captions share.
        text, image, group: of a grid, whether each picture prefers its caption, each caption its picture, and both
            (arXiv 2204.03162, section 3.2): strictly, so a tie is a miss. None for other lines.
    """

    credits: tuple[float, ...]
    ties: int
    text: bool | None
    image: bool | None
    group: bool | None


def read_compositions(path: Path, images: Path | None = None) -> list[Composition]:
    """The lines of a task.

    Args:
        path: a file as at the head of this one, or one of a published layout, see `published_tasks`.
        images: folder of the pictures, in place of the file's own.

    Raises:
        ValueError: naming file, line and field that are wrong.
    """
    if not path.is_file():
        raise ValueError(f"task: there is no file {path}")
    if images is not None and not images.is_dir():
        raise ValueError(f"task: there is no folder of images {images}")
    found: dict[str, Composition] = {}
    for number, where, data in _objects(path):
        folder = path.parent if images is None else images
        if is_winoground(data):
            data, folder = from_winoground(data, where), path.parent / "images" if images is None else images
        elif path.suffix == ".json":
            data = from_sugarcrepe(data, where)
        one = _parse(data, folder.resolve(), number, where)
        if one.key in found:
            raise ValueError(f"{where}: the key {one.key!r} comes twice")
        found[one.key] = one
    if not found:
        raise ValueError(f"task: {path} has no line")
    return list(found.values())


def _objects(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Number, place for messages, and content of each line of a JSONL file, or entry of a JSON file's object."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"task: {path} is not UTF-8 ({error})") from error
    if path.suffix == ".json":
        whole = _load(text, f"task: {path}")
        if not isinstance(whole, dict):
            raise ValueError(
                f"task: {path} is no object of entries by key, as SugarCrepe has them; or give a JSONL file"
            )
        for number, (key, data) in enumerate(whole.items(), 1):
            where = f"task: {path}, entry {key}"
            if not isinstance(data, dict):
                raise ValueError(f"{where}: an entry is an object with filename, caption and negative_caption")
            yield number, where, {"key": key, **data}
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            where = f"task: {path}, line {number}"
            data = _load(line, where)
            if not isinstance(data, dict):
                raise ValueError(f"{where}: a line is an object with images, captions and true")
            yield number, where, data


def _load(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error


def _parse(data: dict[str, Any], folder: Path, number: int, where: str) -> Composition:
    if unknown := sorted(set(data) - {"key", "kind", "images", "captions", "true"}):
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; there are key, kind, images, captions and true")
    images, captions = (_strings(data.get(name), f"{where}: {name}") for name in ("images", "captions"))
    if len(captions) < 2 or len(set(captions)) < len(captions):
        raise ValueError(f"{where}: captions are {captions}; give at least two, all different")
    true = data.get("true")
    if not isinstance(true, list) or len(true) != len(images):
        raise ValueError(f"{where}: true is {true!r}; give the number of the true caption for each of {len(images)}")
    for entry in true:
        if type(entry) is not int or not 0 <= entry < len(captions):
            raise ValueError(f"{where}: true has {entry!r}; captions are numbered 0 .. {len(captions) - 1}")
    paths = tuple(_inside(folder, name, where) for name in images)
    key, kind = data.get("key", str(number)), data.get("kind", "all")
    if not isinstance(key, str) or not isinstance(kind, str):
        raise ValueError(f"{where}: key and kind are strings, not {key!r} and {kind!r}")
    return Composition(key, kind, paths, tuple(captions), tuple(true))


def _strings(value: Any, what: str) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(one, str) and one.strip() for one in value):
        raise ValueError(f"{what} is {value!r}; it must be a list of texts that are not empty")
    return value


def _inside(folder: Path, name: str, where: str) -> Path:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder):
        raise ValueError(f"{where}: the picture {name!r} lies outside {folder}; keep pictures beside the file")
    if not path.is_file():
        raise ValueError(f"{where}: there is no picture {path}")
    return path


def judge(scores: np.ndarray, true: Sequence[int], image_scores: np.ndarray | None = None) -> Judged:
    """What scores `(P, C)` say of pictures of which the captions `true` are true.

    Args:
        image_scores: `(P, C)`, compared between pictures in place of `scores`.
    """
    best = scores >= scores.max(axis=1, keepdims=True) - TIE
    rows, true = np.arange(len(scores)), list(true)
    credits = np.where(best[rows, true], 1 / best.sum(axis=1), 0.0)
    ties = int((best.sum(axis=1) > 1).sum())
    if scores.shape != (2, 2) or sorted(true) != [0, 1]:
        return Judged(tuple(credits.tolist()), ties, None, None, None)
    text = bool((credits == 1).all())
    own = (scores if image_scores is None else image_scores)[:, true]  # the diagonal is true
    image = bool((np.diag(own) > own[[1, 0], [0, 1]] + TIE).all())
    return Judged(tuple(credits.tolist()), ties, text, image, text and image)


def evaluate_compositions(
    task: Iterable[Composition], score: ScorePairs, score_pictures: ScorePictures | None = None
) -> dict[str, Any]:
    """Scores every line of a task.

    Args:
        score_pictures: what is subtracted from scores where pictures are compared: log p(image) from
            log p(image | caption), of which a plain picture has more of either. Captions of one picture are compared
            without it.

    Returns:
        Plain data: `lines` (key, kind, scores, credits, and text, image and group of a grid), `all` and `kinds` with
        what `summarise` gives.

    Raises:
        ValueError: naming a line whose scores have a wrong shape or are not finite.
    """
    lines: list[dict[str, Any]] = []
    for one in task:
        pictures = [open_picture(path, f"{one.key}: {path}") for path in one.images]
        scores = checked_scores(score(pictures, one.captions), (len(pictures), len(one.captions)), one.key)
        line: dict[str, Any] = {"key": one.key, "kind": one.kind, "scores": scores.tolist()}
        compared = None
        if score_pictures is not None:
            alone = checked_scores(score_pictures(pictures), (len(pictures),), one.key)
            compared = scores - alone[:, None]
            line["picture_scores"] = alone.tolist()
        lines.append({**line, **judge(scores, one.true, compared)._asdict()})
    kinds = sorted({line["kind"] for line in lines})
    by_kind = {kind: summarise([line for line in lines if line["kind"] == kind]) for kind in kinds}
    return {"all": summarise(lines), "kinds": by_kind, "lines": lines}


def checked_scores(scores: np.ndarray, shape: tuple[int, ...], key: str) -> np.ndarray:
    """Scores of the line `key` in float64.

    Raises:
        ValueError: naming the line, for another shape, or scores that are not finite.
    """
    if np.shape(scores) != shape:
        raise ValueError(f"task: scores of {key} have the shape {np.shape(scores)} instead of {shape}")
    if not np.isfinite(scores).all():
        raise ValueError(f"task: scores of {key} are not finite: {np.asarray(scores).tolist()}")
    return np.asarray(scores, dtype=np.float64)


def summarise(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Numbers behind the accuracies of judged lines.

    Returns:
        `num_pictures`, `num_ties`, `num_correct` (a tie of k counts 1/k) and `accuracy` of the true caption; of
        `num_grids` how many have `text`, `image` and `group` right.
    """
    credits = [credit for line in lines for credit in line["credits"]]
    grids = [line for line in lines if line["group"] is not None]
    return {
        "num_pictures": len(credits),
        "num_ties": sum(line["ties"] for line in lines),
        "num_correct": sum(credits),
        "accuracy": sum(credits) / len(credits),
        "num_grids": len(grids),
        **{name: sum(line[name] for line in grids) for name in ("text", "image", "group")},
    }
