"""`MixedModal`: texts and pictures in, texts and pictures out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL.Image import Image as Picture

from mixmodal.classification.autoregressive import (
    AutoregressiveClassifier,
    Classification,
    ScoredSequence,
    SequenceScorer,
)
from mixmodal.document import Document, Mask, Text
from mixmodal.interop.export import ExportError, load_export
from mixmodal.models.transformer import Transformer
from mixmodal.sampling.generator import SequenceGenerator
from mixmodal.sampling.grammar import MIXED
from mixmodal.sampling.guidance import TokenSampling
from mixmodal.tokenization.codec import Codec, Content

# Chameleon's settings for text and Anole's for images (arXiv 2405.09818 and 2407.06135, released code)
DEFAULT_SAMPLING = {
    "text": TokenSampling(temperature=0.7, top_p=0.9),
    "image": TokenSampling(temperature=1.0, top_p=0.9),
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
EXPORT_FILES = ["config.json", "model*.safetensors", "text_tokenizer.model", "image_tokenizer/*", "README.md"]

Value = TypeVar("Value", int, float)
PerModality = Value | Mapping[str, Value] | None
"""One value for all modalities, one by modality, or None for the default."""
Sample = Any
"""A string, a picture, or for `mixed` the list of them: what `output` says."""


@dataclass(frozen=True)
class LogLikelihood:
    """A sum in nats, and the number of tokens in it.

    Args:
        total: log-likelihood, float64.
        count: scored tokens.
    """

    total: float
    count: int


class MixedModal:
    """A trained model with its tokenizers.

    Args:
        model: the network, in evaluation mode.
        codec: its tokenizers and sequence format.
        batch_size: most rows in one forward; samples do not depend on it.
    """

    def __init__(self, model: Transformer, codec: Codec, batch_size: int = 64) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self.model, self.codec, self.batch_size = model, codec, batch_size
        self.format = codec.format
        self._generator = SequenceGenerator(model, codec.format)
        self._scorer = SequenceScorer(model, codec.format, batch_size)

    @classmethod
    def from_pretrained(
        cls,
        source: Path | str,
        device: torch.device | str = "auto",
        dtype: torch.dtype | None = None,
        batch_size: int = 64,
    ) -> MixedModal:
        """Loads an exported folder, or one from the Hugging Face hub where huggingface_hub is installed.

        Args:
            source: a folder such as `runs/NAME/export`, or a hub id `OWNER/NAME`.
            device: `auto` takes the accelerator where there is one.
            dtype: of the network's weights; None keeps the stored one.
            batch_size: most rows in one forward.

        Raises:
            ExportError: naming the folder and the file that is missing or broken.
        """
        if str(device) == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        export = load_export(_folder(source), device, dtype)
        return cls(export.model, export.codec, batch_size)

    # generation

    def generate(
        self,
        prompt: str | Sequence[Content],
        output: str = "image",
        *,
        num: int = 1,
        seed: int = 0,
        best_of: int = 1,
        guidance_scale: float = 1.0,
        temperature: PerModality[float] = None,
        top_k: PerModality[int] = None,
        top_p: PerModality[float] = None,
        max_new_tokens: int | None = None,
    ) -> list[Sample]:
        """`num` samples behind one prompt.

        Args:
            prompt: texts and pictures in order; `generate_batch` takes several prompts.
            output: `text` gives strings, `image` pictures, `mixed` lists of both.
            seed: equal seeds give equal samples, whatever else is generated with them.
            best_of: candidates drawn for each image, of which the one is kept from which the model reads the prompt's
                text best, by log p(text | image): re-ranking as DALL-E does with CLIP (arXiv 2102.12092, 2.6).
            guidance_scale: weight of classifier-free guidance of images: how closely they follow the text; 1 is none.
            temperature, top_k, top_p: for all modalities, or by modality as `{"text": 0.7, "image": 1.0}`.
            max_new_tokens: most tokens of a sample; None is as many as the model's context takes.

        Raises:
            ValueError: for settings that can not act, or a prompt behind which the output does not fit.
        """
        options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        options |= {"best_of": best_of, "guidance_scale": guidance_scale, "max_new_tokens": max_new_tokens}
        return self.generate_batch([prompt], output, num=num, seed=seed, **options)[0]

    def generate_batch(
        self,
        prompts: Sequence[str | Sequence[Content]],
        output: str = "image",
        *,
        num: int = 1,
        seed: int = 0,
        best_of: int = 1,
        guidance_scale: float = 1.0,
        temperature: PerModality[float] = None,
        top_k: PerModality[int] = None,
        top_p: PerModality[float] = None,
        max_new_tokens: int | None = None,
    ) -> list[list[Sample]]:
        """`num` samples for each of many prompts; the arguments are those of `generate`."""
        if min(num, best_of) < 1:
            raise ValueError(f"num is {num} and best_of is {best_of}; both must be at least 1")
        sampling = self._sampling(temperature, top_k, top_p)
        if best_of > 1 and (output not in self.format.blocks or not sampling[output].temperature):
            raise ValueError(
                "best_of chooses among images that differ; it needs output image and a temperature above 0"
            )
        documents = self.codec.to_documents([_parts(prompt) for prompt in prompts])
        following = None if output == MIXED else output
        if following not in (None, "text", *self.format.blocks):
            raise ValueError(f"output {output!r} is unknown; choose text, {', '.join(self.format.blocks)}, {MIXED}")
        rows = [self.format.spell_prompt(document, following) for document in documents]
        guidance = None
        if guidance_scale != 1:
            guidance = [self.format.spell_prompt(without_text(document), following) for document in documents]
        order = [(row, sample) for row in range(len(rows)) for sample in range(num * best_of)]
        found: list[Document] = []
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            continuations = self._generator.generate(
                [rows[row] for row, _ in chosen],
                [sample_seed(seed, sample, rows[row]) for row, sample in chosen],
                output=output,
                sampling=sampling,
                guidance_prompts=None if guidance is None else [guidance[row] for row, _ in chosen],
                guidance_scale=guidance_scale,
                max_new_tokens=max_new_tokens,
            )
            found += [self._parse(rows[row], ids) for (row, _), ids in zip(chosen, continuations)]
        if best_of > 1:
            found = self._keep_best([documents[row] for row, _ in order], found, best_of)
        samples = [_sample(parts, output) for parts in self.codec.from_documents(found)]
        return [samples[start : start + num] for start in range(0, len(samples), num)]

    def _sampling(
        self, temperature: PerModality[float], top_k: PerModality[int], top_p: PerModality[float]
    ) -> dict[str, TokenSampling]:
        modalities = self.format.vocabulary.modalities
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        settings: dict[str, dict[str, Any]] = {name: {} for name in modalities}
        for option, values in given.items():
            values = dict.fromkeys(modalities, values) if not isinstance(values, Mapping) else values
            for modality, value in values.items():
                if modality not in settings:
                    raise ValueError(f"{option} for {modality!r}; the model has {', '.join(modalities)}")
                if value is not None:
                    settings[modality][option] = value
        defaults = {name: DEFAULT_SAMPLING.get(name, TokenSampling()) for name in modalities}
        return {name: TokenSampling(**{**vars(defaults[name]), **settings[name]}) for name in modalities}

    def _keep_best(self, prompts: Sequence[Document], found: Sequence[Document], best_of: int) -> list[Document]:
        """Of every `best_of` candidates the one from which the model reads the text of its prompt best."""
        sequences: list[ScoredSequence] = []
        for prompt, candidate in zip(prompts, found, strict=True):
            texts = [part for part in prompt.parts if isinstance(part, Text)]
            if not texts:
                raise ValueError(
                    "best_of compares images with the prompt's text, and the prompt has none; leave it at 1"
                )
            pictures = [part for part in prompt.parts if not isinstance(part, Text)]
            before = Document([*pictures, *candidate.parts])
            sequences.append(ScoredSequence(*self.format.spell_continuation(before, Document(texts))))
        totals = self._scorer.score(sequences).totals.reshape(-1, best_of)
        return [found[group * best_of + int(place)] for group, place in enumerate(totals.argmax(axis=1))]

    def _parse(self, prompt: np.ndarray, continuation: np.ndarray) -> Document:
        """The generated parts; a sample that ran out of room, or stopped before a block, is ended here."""
        eos = self.format.vocabulary.eos
        if len(continuation) and continuation[-1] in {block.open_id for block in self.format.blocks.values()}:
            continuation = continuation[:-1]
        end = [] if len(continuation) and continuation[-1] == eos else [eos]
        return self.format.parse_continuation(np.concatenate([prompt, continuation, end]).astype(np.int64), len(prompt))

    # likelihood

    def log_likelihood(self, context: Sequence[Content], continuation: Sequence[Content]) -> LogLikelihood:
        """log p(continuation | context): a code competes with codes, a text piece with text pieces and the end.

        Raises:
            ValueError: for an empty continuation, or more tokens than the model's context takes.
        """
        before, behind = self.codec.to_documents([_parts(context), _parts(continuation)])
        if not behind.parts:
            raise ValueError("log_likelihood: the continuation is empty; give it at least one part")
        found = self._scorer.score([ScoredSequence(*self.format.spell_continuation(before, behind))])
        return LogLikelihood(float(found.totals[0]), int(found.counts[0]))

    def build_classifier(
        self,
        classes: Sequence[str],
        method: str = "image_given_text",
        *,
        debias: float = 0.0,
        length_normalise: bool = False,
    ) -> AutoregressiveClassifier:
        """A classifier among captions; the options are those of `AutoregressiveClassifier`."""
        documents = [Document([Text(caption)]) for caption in classes]
        return AutoregressiveClassifier(self._scorer, documents, method, debias, length_normalise)

    def score_classes(
        self, images: Sequence[Picture], classes: Sequence[str], method: str = "image_given_text", **options: Any
    ) -> Classification:
        """Scores and probabilities of each class for each picture, `(P, K)`."""
        documents = [Document([image]) for image in self.codec.encode_pictures(images)]
        return self.build_classifier(classes, method, **options).score(documents)

    def classify(self, image: Picture, classes: Sequence[str], method: str = "image_given_text", **options: Any) -> str:
        """The class whose caption fits the picture best, of equals the first.

        Raises:
            ValueError: for an unknown method, or an option that can not act on it.
        """
        return classes[int(self.score_classes([image], classes, method, **options).scores[0].argmax())]


def without_text(document: Document) -> Document:
    """The unconditional prompt of guidance: every text is one mask (CM3Leon, arXiv 2309.02591 section 3.2).

    Raises:
        ValueError: where there is no text to leave out.
    """
    if not any(isinstance(part, Text) for part in document.parts):
        raise ValueError("guidance_scale strengthens the prompt's text, and the prompt has none; leave it at 1")
    return Document(Mask(0) if isinstance(part, Text) else part for part in document.parts)


def sample_seed(seed: int, sample: int, prompt: np.ndarray) -> list[int]:
    """The entropy of one sample: of its prompt too, so that other prompts do not share its luck."""
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be 0 or more")
    digest = hashlib.sha256(np.asarray(prompt, dtype=np.int64).tobytes()).digest()
    return [seed, sample, int.from_bytes(digest[:8], "little")]


def _parts(prompt: str | Iterable[Content]) -> list[Content]:
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, Picture):
        return [prompt]
    parts = list(prompt)
    if any(isinstance(part, (list, tuple)) for part in parts):
        raise ValueError("a prompt is a list of texts and pictures; give several prompts to generate_batch")
    return parts


def _sample(parts: Sequence[str | Picture | Mask], output: str) -> Sample:
    if output == MIXED:
        return list(parts)
    if output == "text":
        return "".join(part for part in parts if isinstance(part, str))
    return parts[-1]


def _folder(source: Path | str) -> Path:
    """A local folder as it is; else the snapshot of a hub id."""
    folder = Path(source)
    if folder.exists() or not HUB_ID.fullmatch(str(source)):
        return folder
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise ExportError(
            f"there is no folder {source}; to load it as a model from the Hugging Face hub, install huggingface_hub"
        ) from error
    try:
        return Path(snapshot_download(str(source), allow_patterns=EXPORT_FILES))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ExportError(f"there is no folder {source}, and the Hugging Face hub does not give it: {error}") from error
