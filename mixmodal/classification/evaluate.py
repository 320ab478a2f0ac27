"""Zero-shot classification of many pictures: reading them and their classes, and the report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from PIL.Image import Image as Picture

from mixmodal.classification.autoregressive import AutoregressiveClassifier
from mixmodal.data.shards import read_samples
from mixmodal.data.skipping import SampleError, SkipCounter
from mixmodal.document import Document
from mixmodal.retrieval.retriever import Retrieved
from mixmodal.tokenization.codec import Codec
from mixmodal.tokenization.preprocessing import MAX_PIXELS, PictureError, open_picture

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class NamedClass(NamedTuple):
    """A class: the label that data carry, and the text that the model scores."""

    label: str
    caption: str


class LabelledPicture(NamedTuple):
    """A picture with the label that its folder or shard gives it, or None."""

    key: str
    picture: Picture
    label: str | None


def read_classes(path: Path, template: str = "{}") -> list[NamedClass]:
    """Classes from a text file: on each line a caption, or a label, a tab and a caption.

    Args:
        template: text with `{}` where the caption goes, such as `a photo of {}`.

    Raises:
        ValueError: naming the file, for fewer than two classes, a label that comes twice, or a template without `{}`.
    """
    if "{}" not in template:
        raise ValueError(f"template {template!r} has no {{}} for the class to stand in")
    if not path.is_file():
        raise ValueError(f"classes: there is no file {path}; write one caption a line")
    classes = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            label, _, caption = line.strip().partition("\t")
            classes.append(NamedClass(label, template.replace("{}", caption or label)))
    if len(classes) < 2:
        raise ValueError(f"classes: {path} has {len(classes)} of them; at least two are needed, one a line")
    labels = [one.label for one in classes]
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise ValueError(f"classes: {path} has the class {twice!r} more than once")
    return classes


def read_pictures(folder: Path, classes: Sequence[NamedClass], counter: SkipCounter) -> Iterator[LabelledPicture]:
    """Pictures of a folder, where a subfolder's name is the label, or of the shards in it.

    In shards the label is the `label` of a sample's JSON, or its text where that is a label or a caption of `classes`.
    Broken pictures are skipped and counted.

    Raises:
        ValueError: where there are no pictures, or a label is not among the classes.
    """
    if not folder.is_dir():
        raise ValueError(f"data: there is no folder {folder}")
    shards = sorted(folder.glob("*.tar"))
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not shards and not files:
        raise ValueError(f"data: {folder} holds neither pictures ({', '.join(SUFFIXES)}) nor shards (*.tar)")
    known = {one.label for one in classes}
    found = _from_shards(folder, classes, counter) if shards else _from_files(folder, files, counter)
    for one in found:
        if one.label is not None and one.label not in known:
            raise ValueError(f"data: {one.key} is labelled {one.label!r}, which the classes do not have")
        counter.use()
        yield one


def _from_files(folder: Path, files: Sequence[Path], counter: SkipCounter) -> Iterator[LabelledPicture]:
    for path in files:
        relative = path.relative_to(folder)
        try:
            picture = open_picture(path, str(path))
        except PictureError as error:
            counter.skip(SampleError("broken picture", str(error)))
            continue
        yield LabelledPicture(str(relative), picture, relative.parts[0] if len(relative.parts) > 1 else None)


def _from_shards(folder: Path, classes: Sequence[NamedClass], counter: SkipCounter) -> Iterator[LabelledPicture]:
    labels = {one.caption: one.label for one in classes} | {one.label: one.label for one in classes}
    for sample in read_samples(folder, counter):
        text = " ".join(sample.texts)
        label = sample.metadata.get("label", labels.get(text))
        for number, file in enumerate(sample.pictures):
            try:
                picture = file.open(MAX_PIXELS)
            except PictureError as error:
                counter.skip(SampleError("broken picture", str(error)))
                continue
            key = sample.key if len(sample.pictures) == 1 else f"{sample.key}.{number}"
            yield LabelledPicture(key, picture, None if label is None else str(label))


def evaluate_classifier(
    classifier: AutoregressiveClassifier,
    codec: Codec,
    pictures: Iterable[LabelledPicture],
    classes: Sequence[NamedClass],
    batch_size: int = 64,
    retrieve: Callable[[Sequence[Picture]], Sequence[Sequence[Retrieved]]] | None = None,
) -> dict[str, Any]:
    """Scores every picture; where labels are known, accuracy and confusion too.

    Args:
        pictures: read `batch_size` at a time.
        retrieve: pictures to the documents that are read before each one and every class.

    Returns:
        Plain data: `pictures` (key, label, prediction, tied, scores, probabilities, log_likelihoods, num_tokens, and
        with `retrieve` also `retrieved`: key and score of each document), `accuracy` (a tie of k classes counts 1/k
        where the label is among them), `num_ties`, and `confusion`, with the labels' rows and the predictions' columns.
    """
    entries: list[dict[str, Any]] = []
    stream = iter(pictures)
    while batch := list(islice(stream, batch_size)):
        images = codec.encode_pictures([one.picture for one in batch])
        documents = None if retrieve is None else retrieve([one.picture for one in batch])
        before = None
        if documents is not None:
            before = [classifier.format.prefix([one.ids for one in row]) for row in documents]
        found = classifier.score([Document([image]) for image in images], before)
        for row, one in enumerate(batch):
            entries.append(
                {
                    "key": one.key,
                    "label": one.label,
                    "prediction": classes[int(found.scores[row].argmax())].label,
                    "tied": [classes[index].label for index in found.tied[row].nonzero()[0]],
                    "scores": found.scores[row].tolist(),
                    "probabilities": found.probabilities[row].tolist(),
                    "log_likelihoods": found.log_likelihoods.totals[row].tolist(),
                    "num_tokens": found.log_likelihoods.counts[row].tolist(),
                }
            )
            if documents is not None:
                entries[-1]["retrieved"] = [one.to_dict() for one in documents[row]]
    return {**summarise(entries, [one.label for one in classes]), "pictures": entries}


def summarise(entries: Sequence[dict[str, Any]], labels: Sequence[str]) -> dict[str, Any]:
    """Accuracy, ties and confusion of scored pictures; those without a label are left out of accuracy and confusion."""
    labelled = [entry for entry in entries if entry["label"] is not None]
    credit = sum(1 / len(entry["tied"]) for entry in labelled if entry["label"] in entry["tied"])
    confusion = [[0] * len(labels) for _ in labels]
    for entry in labelled:
        confusion[labels.index(entry["label"])][labels.index(entry["prediction"])] += 1
    return {
        "num_pictures": len(entries),
        "num_labelled": len(labelled),
        "num_correct": credit,
        "accuracy": credit / len(labelled) if labelled else None,
        "num_ties": sum(len(entry["tied"]) > 1 for entry in entries),
        "confusion": confusion if labelled else None,
    }
