"""Pictures of captions: how real a set of them looks, and how well each shows what its caption says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image as Pictures
from PIL.Image import Image as Picture
from torch import Tensor

from mixmodal.data.shards import Sample, read_samples
from mixmodal.document import EndOfTurn, Image
from mixmodal.evaluation.concepts import nearest_pictures, redraw
from mixmodal.evaluation.features import FEATURE_NETWORKS, warn_of_few
from mixmodal.evaluation.generation import build_network, embed, frechet_distance, kernel_distance, precision_recall
from mixmodal.evaluation.reference import ReferencePictures
from mixmodal.pipeline.evaluating.memorisation import MemorisationOptions, find_nearest_training, open_training
from mixmodal.pipeline.evaluating.task import (
    LABELS,
    SHOWN,
    ChosenSamples,
    Findings,
    Item,
    Setup,
    Shown,
    Task,
    TaskOptions,
    batches,
    mean,
    rate_labels,
    save,
    skipped,
)
from mixmodal.pipeline.options import DEFAULT_SAMPLING, sampling_options
from mixmodal.pipeline.queue import Ask, Drawn, Failed
from mixmodal.retrieval.encoder import load_encoder
from mixmodal.sampling.rules import TokenSampling
from mixmodal.tokenization.codec import Content
from mixmodal.tokenization.preprocessing import resize_and_crop, to_tensor


@dataclass(frozen=True, kw_only=True)
class QuestionOptions:
    """VQAScore (arXiv 2404.01291): the model's own P(yes | picture, question), asked of each picture that it drew.

    Args:
        text: the question, with `{}` where the caption goes.
        yes: the answer whose probability is the score.
        no: the other answer, for `vqa_score_two_way`: P(yes) as a share of both.
        turns: whether the model was tuned on conversations; an end of turn stands behind the question then.
    """

    text: str = 'Does this figure show "{}"? Please answer yes or no.'
    yes: str = "Yes"
    no: str = "No"
    turns: bool = True

    def __post_init__(self) -> None:
        if "{}" not in self.text:
            raise ValueError(f"question.text is {self.text!r}; it needs {{}} where the caption goes")


@dataclass(frozen=True, kw_only=True)
class TextToImageOptions(TaskOptions):
    """Draws a picture for each caption.

    Args:
        reference: folders of shards with real pictures to compare with; empty takes those of `data`.
        max_reference: of more real pictures than these, so many are chosen by the seed.
        features: network of the distances: `efficientnet_lite0`, `inception` (extra `fid`), or `none` for no distances.
        neighbours: k of precision and recall.
        clip: folder or hub id of a CLIP for the CLIP score; null for none.
        question: asked for VQAScore; null for none.
        memorisation: whether drawn pictures repeat those of training; null does not look.
        labelled: folders of shards with a `concept` and a `style` in their metadata, of which the picture nearest to a
            drawn one says what that shows; empty for none. Captions must have both, too.
        sampling: how codes are drawn.
        guidance_scale: how closely pictures follow the caption; 1 is none, null the default of `mixmodal generate`.
        best_of: pictures drawn for each caption, of which the one is kept from which the model reads it best.
    """

    reference: tuple[Path, ...] = ()
    max_reference: int = 10000
    features: Literal["efficientnet_lite0", "inception", "none"] = "efficientnet_lite0"
    neighbours: int = 3
    clip: str | None = None
    question: QuestionOptions | None = None
    memorisation: MemorisationOptions | None = None
    labelled: tuple[Path, ...] = ()
    sampling: TokenSampling = DEFAULT_SAMPLING["image"]
    guidance_scale: float | None = None
    best_of: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_reference", "neighbours", "best_of"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.features not in (*FEATURE_NETWORKS, "none"):
            raise ValueError(f"features is {self.features!r}; choose {', '.join(FEATURE_NETWORKS)} or none")


class TextToImage(Task[TextToImageOptions]):
    """See `TextToImageOptions`."""

    title = "Text to image"
    introduction = "Pictures drawn for captions, compared as a set with real ones, and one by one with their captions."
    judged_by = ("reference", "max_reference", "features", "neighbours", "clip", "memorisation", "labelled")

    def takes(self, sample: Sample) -> bool:
        return bool(sample.texts) and not sample.messages

    def measure(self, setup: Setup, items: Iterable[Item]) -> Iterator[tuple[Item, dict[str, Any]]]:
        options, known = self.options, {}
        if options.memorisation is not None:
            open_training(options.memorisation, setup.load())  # a wrong folder is told before anything is drawn

        def asks() -> Iterator[Ask]:
            for item in items:
                known[item.key] = item
                yield Ask(item.key, item.sample.texts[0], seed=setup.seed_of(item))

        steering = {"guidance_scale": options.guidance_scale, **sampling_options({"image": options.sampling})}
        drawn = setup.load().generate_each(asks(), "image", best_of=options.best_of, **steering)  # type: ignore[arg-type]
        for batch in batches(drawn, setup.batch_size):
            whole = [one for one in batch if isinstance(one, Drawn)]
            scores = iter(self._ask(setup, [(known[one.key], one.sample) for one in whole]))
            for one in batch:
                item = known.pop(one.key)
                if isinstance(one, Failed):
                    yield item, skipped(one.error)
                    continue
                head = {"sample": item.sample.key, "caption": item.sample.texts[0], **item.labels}
                found = {"image": save(setup, one.sample, item.key), "codes": codes_of(one), **next(scores)}
                yield item, {**head, **found}

    def _ask(self, setup: Setup, drawn: Sequence[tuple[Item, Any]]) -> list[dict[str, float]]:
        """Log-likelihoods in nats of both answers about each picture."""
        asked = self.options.question
        if asked is None or not drawn:
            return [{} for _ in drawn]
        model, end = setup.load(), [EndOfTurn()] if asked.turns else []
        pairs: list[tuple[list[Content], list[Content]]] = []
        for item, picture in drawn:
            coded = model.codec.to_document([picture, *end]).parts[
                0
            ]  # alone: how codes round must not depend on others
            context = [coded, asked.text.replace("{}", item.sample.texts[0]), *end]
            pairs += [(context, [answer, *end]) for answer in (asked.yes, asked.no)]
        found = [one.total for one in model.log_likelihoods(pairs)]
        return [{"yes": yes, "no": no} for yes, no in zip(found[::2], found[1::2])]

    def sum_up(self, setup: Setup, entries: Sequence[Mapping[str, Any]]) -> Findings:
        options, notes, reference = self.options, [], None
        metrics: dict[str, float | None] = {}
        if options.features != "none":
            reference = self._compare(setup, entries, metrics, notes)
        if options.clip is not None:
            metrics["clip_score"] = self._clip_score(setup, options.clip, entries)
        if options.question is not None:
            metrics["vqa_score"] = mean(math.exp(entry["yes"]) for entry in entries)
            metrics["vqa_score_two_way"] = mean(
                math.exp(entry["yes"] - np.logaddexp(entry["yes"], entry["no"])) for entry in entries
            )
        verdicts = self._judge(setup, entries, metrics) if options.labelled else entries
        near, training = {}, None
        if options.memorisation is not None:
            held_out = ChosenSamples(self, setup.limits, setup.seed)
            repeats = find_nearest_training(options.memorisation, setup, entries, held_out)
            near, training = repeats.pictures, repeats.training_sha256
            metrics |= repeats.metrics
            notes.append(repeats.note)
        shown = [
            Shown(
                pictures={entry["image"]: "drawn" if near else "", **near.get(entry["key"], {})},
                text=entry["caption"],
                right=entry.get("concept_right"),
            )
            for entry in verdicts[:SHOWN]
        ]
        digests = {"reference_sha256": reference, "training_sha256": training}
        return Findings(metrics=metrics, notes=notes, shown=shown, **digests)

    def _compare(
        self, setup: Setup, entries: Sequence[Mapping[str, Any]], metrics: dict[str, float | None], notes: list[str]
    ) -> str:
        """Distances of the sets; gives the digest of the real one."""
        options, model = self.options, setup.load()
        assert options.features != "none"
        image, k = model.codec.image_tokenizer.config, options.neighbours
        pictures = ReferencePictures(
            options.reference or options.data,
            image.image_size,
            setup.limits,
            preprocess=image.preprocess,
            max_pictures=options.max_reference,
            seed=setup.seed,
        )
        network = build_network(options.features, setup.device)
        drawn = embed(network, (self._pixels(setup, entry) for entry in entries), setup.device)
        real = embed(network, (one for batch in pictures for one in batch), setup.device)
        fewest, is_inception = min(len(real), len(drawn)), options.features == "inception"
        frechet = "fid" if is_inception else f"frechet_{options.features}"
        kernel = "kid" if is_inception else f"kernel_{options.features}"
        if fewest >= 2:
            metrics[frechet] = frechet_distance(real, drawn)
            found = kernel_distance(real, drawn, seed=setup.seed)
            metrics[kernel], metrics[f"{kernel}_deviation"] = found
        if fewest > k:
            both = precision_recall(real, drawn, k)
            metrics[f"precision_{options.features}"], metrics[f"recall_{options.features}"] = both
        else:
            notes.append(f"{fewest} pictures are too few for precision and recall with {k} neighbours")
        if warning := warn_of_few(frechet, fewest, real.shape[1]):
            notes.append(warning)
        return pictures.sha256()

    def _clip_score(self, setup: Setup, clip: str, entries: Sequence[Mapping[str, Any]]) -> float | None:
        """100 times the mean cosine, none below 0 (arXiv 2104.08718, section 3, on torchmetrics' scale)."""
        encoder, found = load_encoder(clip, setup.device), []
        for batch in batches(entries, encoder.batch_size):
            texts = encoder.embed_texts([entry["caption"] for entry in batch])
            images = encoder.embed_images([open_drawn(setup, entry) for entry in batch])
            found += (texts.astype(np.float64) * images).sum(axis=1).tolist()
        return mean(100 * max(0.0, cosine) for cosine in found)

    def _judge(
        self, setup: Setup, entries: Sequence[Mapping[str, Any]], metrics: dict[str, float | None]
    ) -> list[dict[str, Any]]:
        """Entries with verdicts by the nearest labelled picture, as the image tokenizer redraws it."""
        codec = setup.load().codec
        config, labels, images = codec.image_tokenizer.config, [], []
        for sample in read_samples(self.options.labelled, limits=setup.limits):
            if not all(isinstance(sample.metadata.get(name), str) for name in LABELS) or len(sample.pictures) != 1:
                raise ValueError(f"labelled: {sample.source} lacks a concept, a style, or one picture")
            labels.append({name: sample.metadata[name] for name in LABELS})
            picture = sample.pictures[0].open(setup.limits.max_pixels)
            images.append(to_tensor(resize_and_crop(picture, config.image_size, config.preprocess)))
        known = redraw(codec, torch.stack(images))
        verdicts: list[dict[str, Any]] = []
        for entry in entries:
            if any(name not in entry for name in LABELS):
                raise ValueError(f"labelled: the caption of {entry['sample']} has no concept and style of its own")
            drawn = to_tensor(resize_and_crop(open_drawn(setup, entry), config.image_size, config.preprocess))
            found = labels[int(nearest_pictures(drawn[None], known).indices[0])]
            verdicts.append({**entry, **{f"{name}_right": found[name] == entry[name] for name in LABELS}})
        metrics |= rate_labels(verdicts)
        return verdicts

    def _pixels(self, setup: Setup, entry: Mapping[str, Any]) -> Tensor:
        """A drawn picture, uint8 `(3, H, W)`, of the reference's size."""
        config = setup.load().codec.image_tokenizer.config
        fitted = resize_and_crop(open_drawn(setup, entry), config.image_size, config.preprocess)
        return torch.from_numpy(np.array(fitted).transpose(2, 0, 1).copy())


def codes_of(drawn: Drawn) -> list[list[int]]:
    """The codes `(h, w)` of a drawn picture."""
    assert drawn.document is not None
    image = drawn.document.parts[-1]
    assert isinstance(image, Image)
    return image.codes.tolist()


def open_drawn(setup: Setup, entry: Mapping[str, Any]) -> Picture:
    """The picture of a record."""
    with Pictures.open(setup.folder / entry["image"]) as picture:
        return picture.convert("RGB")
