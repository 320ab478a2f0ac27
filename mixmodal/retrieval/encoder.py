"""Vectors of texts, pictures and whole documents, by frozen two-tower encoders: CLIP and SigLIP through transformers.

A document's text part and image part are encoded apart, each is normalised, and their normalised average is the
document's vector (RA-CM3, arXiv 2211.12561; CM3Leon, arXiv 2309.02591, section 4.2).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mixmodal.environment import choose_device
from mixmodal.extras import import_extra
from mixmodal.files import hash_files
from mixmodal.hub import find_folder

T = TypeVar("T")
ImagePart = Literal["tower", "norm", "scale"]

KINDS = ("clip", "siglip")
"""`model_type` of what is taken; SigLIP 2 of a fixed size calls itself `siglip`, too."""
WEIGHTS = "model*.safetensors"
FILES = (
    "config.json",
    WEIGHTS,
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
)
"""What decides a vector, as patterns: what is downloaded of a hub id, and what the identity is of."""


class DocumentParts(NamedTuple):
    """What a document's vector is made of: its texts and its pictures, in any number."""

    texts: Sequence[str] = ()
    images: Sequence[Image.Image] = ()


class DocumentEncoder:
    """A text tower and an image tower with one space of vectors; see `load_encoder`.

    Args:
        model: CLIPModel or SiglipModel, in evaluation mode.
        processor: its processor, with tokenizer and image processor.
        identity: SHA-256 over the files that it was loaded from: equal ones give equal vectors.
        batch_size: texts or pictures that a tower takes at a time.
    """

    def __init__(self, model: Any, processor: Any, identity: str, batch_size: int = 64) -> None:
        self.identity = identity
        self.batch_size = batch_size
        self._model, self._processor = model, processor
        text = model.config.text_config
        self._max_tokens = int(text.max_position_embeddings)
        self._is_siglip = model.config.model_type == "siglip"
        self.dim = int((text.projection_size or text.hidden_size) if self._is_siglip else model.config.projection_dim)

    @property
    def logit_scale(self) -> float:
        """What the model multiplies cosines with to get logits: the inverse of its temperature."""
        return float(self._model.logit_scale.detach().double().exp())

    @property
    def logit_bias(self) -> float:
        """What the model adds to logits: 0 for CLIP."""
        return float(self._model.logit_bias.detach().double()) if self._is_siglip else 0.0

    @property
    def is_sigmoid(self) -> bool:
        """Whether a logit is of one pair by itself (SigLIP), not of a pair among others (CLIP)."""
        return self._is_siglip

    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """Features of any length, `(n, dim)`, on the encoder's device, with gradients where these are enabled."""
        return self._image_features(images)

    def image_parameters(self, part: ImagePart) -> list[Tensor]:
        """Weights that logits of pictures depend on.

        Args:
            part: all of the image tower with its projection (`tower`), the last norm in it (`norm`), or what logits
                are multiplied with (`scale`).
        """
        tower = self._model.vision_model
        if part == "scale":
            return [self._model.logit_scale]
        if part == "norm":
            return list(tower.post_layernorm.parameters())
        return [*tower.parameters(), *([] if self._is_siglip else self._model.visual_projection.parameters())]

    def scale_logits(self, cosines: Tensor) -> Tensor:
        """Cosines to the model's logits, with gradients where these are enabled."""
        logits = self._model.logit_scale.exp() * cosines
        return logits + self._model.logit_bias if self._is_siglip else logits

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of length 1, float32 `(n, dim)`; what a text has beyond the tower's positions is cut off."""
        return self._embed(texts, self._text_features)

    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Vectors of length 1, float32 `(n, dim)`."""
        return self._embed(images, self._image_features)

    def embed_documents(self, documents: Sequence[DocumentParts]) -> np.ndarray:
        """Vectors of length 1, float32 `(n, dim)`; see `combine`.

        Raises:
            ValueError: for a document without parts.
        """
        texts = self.embed_texts([text for document in documents for text in document.texts])
        images = self.embed_images([image for document in documents for image in document.images])
        rows = np.empty((len(documents), self.dim), np.float32)
        text, image = 0, 0
        for row, document in zip(rows, documents):
            next_text, next_image = text + len(document.texts), image + len(document.images)
            row[:] = combine(texts[text:next_text], images[image:next_image])
            text, image = next_text, next_image
        return rows

    def _embed(self, items: Sequence[T], features: Callable[[Sequence[T]], Tensor]) -> np.ndarray:
        rows = np.empty((len(items), self.dim), np.float32)
        with torch.inference_mode():
            for start in range(0, len(items), self.batch_size):
                stop = start + self.batch_size
                rows[start:stop] = normalise(features(items[start:stop]).float().cpu().numpy())
        return rows

    def _text_features(self, texts: Sequence[str]) -> Tensor:
        # SigLIP was trained on texts padded to its full length, without a mask
        padding = "max_length" if self._is_siglip else True
        inputs = self._processor.tokenizer(
            list(texts), padding=padding, truncation=True, max_length=self._max_tokens, return_tensors="pt"
        )
        names = ("input_ids",) if self._is_siglip else ("input_ids", "attention_mask")
        on_device = {name: inputs[name].to(self._model.device) for name in names}
        return self._model.get_text_features(**on_device).pooler_output

    def _image_features(self, images: Sequence[Image.Image]) -> Tensor:
        pictures = [image.convert("RGB") for image in images]
        inputs = self._processor.image_processor(images=pictures, return_tensors="pt")
        pixels = inputs["pixel_values"].to(self._model.device)
        return self._model.get_image_features(pixel_values=pixels).pooler_output


def normalise(vectors: np.ndarray) -> np.ndarray:
    """Vectors `(..., dim)` at length 1, float64; one of length 0 becomes NaN, which no memory takes."""
    exact = vectors.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return exact / np.linalg.norm(exact, axis=-1, keepdims=True)


def combine(texts: np.ndarray, images: np.ndarray) -> np.ndarray:
    """The vector of a document, float32 `(dim,)` of length 1.

    Args:
        texts: vectors of its texts, `(n, dim)`; their normalised mean is its text part.
        images: vectors of its pictures, `(m, dim)`; likewise. A document of one modality has that part's vector.

    Raises:
        ValueError: where there are neither.
    """
    parts = [normalise(normalise(rows).mean(axis=0)) for rows in (texts, images) if len(rows)]
    if not parts:
        raise ValueError("a document without text and without picture has no vector; leave it out")
    return normalise(np.mean(parts, axis=0)).astype(np.float32)


def load_encoder(source: Path | str, device: str | torch.device = "cpu", batch_size: int = 64) -> DocumentEncoder:
    """The encoder in a folder of transformers' `save_pretrained`, or of a hub id; float32, in evaluation mode.

    Args:
        source: a folder, or where there is none of that name, a hub id as `openai/clip-vit-base-patch32`, with a
            revision as `NAME/REPOSITORY@REVISION`. Weights are safetensors; no code of the repository is run.
        device: where it computes.
        batch_size: texts or pictures that a tower takes at a time.

    Raises:
        ValueError: naming the folder, where it is missing, broken, or holds something else; or a device that is not
            there.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    choose_device(str(device))
    folder = find_encoder(source)
    check_folder(folder)
    transformers = import_extra("transformers", "retrieval", f"encoder {source} needs")
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        model, info = transformers.AutoModel.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **local
        )
        processor = transformers.AutoProcessor.from_pretrained(folder, **local)
    except Exception as error:  # transformers, tokenizers and safetensors raise many kinds for damaged files
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"encoder {folder} can not be loaded: {type(error).__name__}: {reason}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"encoder {folder}: {len(missing)} tensors are missing in its weights ({', '.join(missing[:3])} ...), and "
            "would be random; bring the whole file"
        )
    for part in ("tokenizer", "image_processor"):
        if not hasattr(processor, part):
            raise ValueError(f"encoder {folder}: it has no {part.replace('_', ' ')}; save the processor there, too")
    return DocumentEncoder(model.to(device).eval(), processor, identity_of(folder), batch_size)


def find_encoder(source: Path | str) -> Path:
    """The folder of an encoder, or of the snapshot of a hub id.

    Raises:
        ValueError: where there is neither.
    """
    try:
        return find_folder(source, FILES, "a CLIP or SigLIP model")
    except ValueError as error:
        raise ValueError(f"encoder: {error}") from error


def check_folder(folder: Path) -> None:
    """Whether a folder holds a model of a known kind with weights that are safetensors, by its config and names.

    Raises:
        ValueError: naming the folder or the file.
    """
    path = folder / "config.json"
    try:
        kind = json.loads(path.read_bytes())["model_type"]
    except FileNotFoundError as error:
        raise ValueError(f"encoder {folder}: it has no config.json, so it is no model of transformers") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"encoder: {path} is not the config of a model ({type(error).__name__}: {error})") from error
    if kind not in KINDS:
        raise ValueError(f"encoder: {path} has model_type {kind!r}; it must be {' or '.join(KINDS)}")
    if not list(folder.glob(WEIGHTS)):
        raise ValueError(
            f"encoder {folder}: it has no {WEIGHTS}, and weights of other kinds are not read; convert them, "
            "AutoModel.from_pretrained(DIR).save_pretrained(NEW) where you trust them"
        )


def identity_of(folder: Path) -> str:
    """SHA-256 over name and content of all that decides a vector: config, weights, tokenizer and image processor."""
    paths = {path.name: path for pattern in FILES for path in folder.glob(pattern)}
    return hash_files(sorted(paths.items()))
