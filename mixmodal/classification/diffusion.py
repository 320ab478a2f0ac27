"""Costs of classes for pictures under a diffusion model: how badly it denoises the picture when told the class.

arXiv 2303.16203 (section 3.2) and arXiv 2303.15233 (section 3). One batch takes any mixture of pictures, classes and
units; noise is drawn once a unit and shared by all classes and pictures.

Shapes: P pictures, K classes, M templates, B batch, C h w latents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image as Picture
from torch import Tensor

from mixmodal.classification.adapter_base import Adapter, Conditions
from mixmodal.classification.denoising import (
    LOSSES,
    Loss,
    Space,
    Weighting,
    build_weighting,
    error_scale,
    mean_error,
    target,
)
from mixmodal.classification.templates import PLACE, check_number, check_places, fill
from mixmodal.classification.units import Unit, draw_noise
from mixmodal.config import check_least
from mixmodal.files import replacing
from mixmodal.tokenization.preprocessing import resize_and_crop, to_tensor

Predict = Callable[[Tensor, Tensor, Conditions], Tensor]
"""As `Adapter.predict`."""
CACHE_FORMAT = 1
"""Raised where what is cached of the same prompts changes."""


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """What is measured, and how.

    Args:
        weighting: in which space errors are taken, and what a time weighs.
        loss: of the error's elements; their mean is taken.
        seed: of the noises.
        batch_size: triples that the network sees at once; larger batches are cut.
        compile: compile the network, on CUDA alone. Batches are then padded to `batch_size`, so that it is compiled
            once.
        encode_batch_size: pictures that the autoencoder sees at once.
    """

    weighting: Weighting = field(default_factory=lambda: build_weighting("uniform"))
    loss: Loss = "l2"
    seed: int = 0
    batch_size: int = 32
    compile: bool = False
    encode_batch_size: int = 8

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss {self.loss!r} is unknown; choose {', '.join(LOSSES)}")
        check_least(self, 1, "batch_size", "encode_batch_size")


class DiffusionScorer:
    """Costs by denoising, a `Scorer` of `units.py`. Pictures come with `set_pictures`.

    Costs are not multiplied by `Unit.weight`; that is the policy's. A cost that is not a number is given as it is.

    Args:
        adapter: the model.
        classes: K names, or numbers of a model that is told numbers.
        templates: prompts with `{}` for the class; `Unit.template` says which. A model of numbers takes `{}` alone.
        config: what is measured.
        cache: from prompts to their conditions and back from disk, see `PromptCache`; None keeps none.
        free_text_encoders: let go of the text encoders when the prompts are encoded.

    Raises:
        ValueError: for fewer than two classes, classes that the model can not tell apart (naming both), a template
            without `{}`, or compilation on another device than CUDA.
    """

    def __init__(
        self,
        adapter: Adapter,
        classes: Sequence[str | int],
        templates: Sequence[str] = (PLACE,),
        config: DiffusionConfig | None = None,
        cache: PromptCache | None = None,
        free_text_encoders: bool = True,
    ) -> None:
        self.adapter, self.classes, self.templates = adapter, list(classes), list(templates)
        self.config = config or DiffusionConfig()
        if self.config.compile and adapter.device.type != "cuda":
            raise ValueError(f"compile acts on CUDA alone, and the model is on {adapter.device}; leave it out")
        check_prompts(adapter, self.classes, self.templates)
        prompts = [fill(template, one) for template in self.templates for one in self.classes]
        self.conditions = adapter.encode_text(prompts) if cache is None else cache.encode(adapter, prompts)
        if free_text_encoders:
            adapter.free_text_encoders()
        self._predict: Predict = adapter.predict
        if self.config.compile:
            adapter.network.to(memory_format=torch.channels_last)
            self._predict = torch.compile(adapter.predict, dynamic=False)
        self._latents = torch.empty(0, *adapter.latent_shape)
        self._noises = torch.empty(0, *adapter.latent_shape, device=adapter.device)
        self._places: dict[int, int] = {}
        self.num_evaluations = 0

    @property
    def scale(self) -> float:
        """What makes a mean squared error a sum in nats: half of the numbers in a picture's latents."""
        return float(np.prod(self.adapter.latent_shape)) / 2

    def set_pictures(self, pictures: Sequence[Picture] | Tensor) -> None:
        """Takes pictures to be scored in place of those before; each is encoded once.

        Args:
            pictures: RGB pictures, resized and cropped here; or images `(P, 3, H, W)` in [-1, 1] of the model's size.

        Raises:
            ValueError: for images of another shape.
        """
        parts = []
        for start in range(0, len(pictures), self.config.encode_batch_size):
            some: Any = pictures[start : start + self.config.encode_batch_size]
            if not isinstance(some, Tensor):
                some = torch.stack([to_tensor(resize_and_crop(one, self.adapter.image_size)) for one in some])
            size = self.adapter.image_size
            if some.ndim != 4 or some.shape[2:] != (size, size):
                raise ValueError(f"images of shape {tuple(some.shape)} given; this model takes {size} x {size} pixels")
            parts.append(self.adapter.encode_images(some))
        self.set_latents(torch.cat(parts) if parts else torch.empty(0, *self.adapter.latent_shape))

    def set_latents(self, latents: Tensor) -> None:
        """Takes latents `(P, C, h, w)`, scaled as the model wants them, in place of pictures.

        Raises:
            ValueError: for latents of another shape.
        """
        if tuple(latents.shape[1:]) != self.adapter.latent_shape:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)} given; this model has (P, *{self.adapter.latent_shape})"
            )
        self._latents = latents.to(self.adapter.device, torch.float32)

    @property
    def latents(self) -> Tensor:
        """Of the pictures, float32 `(P, C, h, w)`."""
        return self._latents

    def cost(self, pictures: Sequence[int], classes: Sequence[int], units: Sequence[Unit]) -> np.ndarray:
        """Costs of n (picture, class, unit) triples, float64 `(n,)`: the weighted mean error; lower fits better.

        Raises:
            ValueError: for triples of unequal number, or a template that is not there.
        """
        times = np.array([unit.time for unit in units], dtype=np.float64)
        weights = self.config.weighting.weights(self.adapter.schedule, times)
        return self.errors(pictures, classes, units) * weights

    def error_table(self, units: Sequence[Unit]) -> np.ndarray:
        """`errors` of all pictures that are set, all classes and these units, float64 `(P, K, len(units))`."""
        shape = (len(self._latents), len(self.classes), len(units))
        pictures, classes, places = (one.flatten().tolist() for one in np.indices(shape))
        return self.errors(pictures, classes, [units[place] for place in places]).reshape(shape)

    def errors(self, pictures: Sequence[int], classes: Sequence[int], units: Sequence[Unit]) -> np.ndarray:
        """`cost` without the weight of the time."""
        if not len(pictures) == len(classes) == len(units):
            raise ValueError(
                f"triples need as many pictures, classes and units: {len(pictures)}, {len(classes)}, {len(units)}"
            )
        times = np.array([unit.time for unit in units], dtype=np.float64)
        templates = np.array([unit.template for unit in units], dtype=np.int64)
        if len(units) and not 0 <= templates.min() <= templates.max() < len(self.templates):
            raise ValueError(f"units name template {templates.max()}; there are {len(self.templates)}")
        prompts = templates * len(self.classes) + np.asarray(classes, dtype=np.int64)
        places = self._place_noises(units)
        signs = np.array([unit.sign for unit in units], dtype=np.float32)
        rows = np.asarray(pictures, dtype=np.int64)
        errors = [
            self._errors(
                *(one[start : start + self.config.batch_size] for one in (rows, prompts, places, signs, times))
            )
            for start in range(0, len(units), self.config.batch_size)
        ]
        self.num_evaluations += len(units)
        return torch.cat(errors).cpu().double().numpy() if errors else np.zeros(0)

    @torch.no_grad()
    def _errors(
        self, pictures: np.ndarray, prompts: np.ndarray, places: np.ndarray, signs: np.ndarray, times: np.ndarray
    ) -> Tensor:
        """Unweighted mean errors of one batch, float32 `(B,)` on the device."""
        adapter, num = self.adapter, len(times)
        if self.config.compile and num < self.config.batch_size:
            rows = np.minimum(np.arange(self.config.batch_size), num - 1)
            pictures, prompts, places, signs, times = (one[rows] for one in (pictures, prompts, places, signs, times))
        chosen = self._index(prompts)
        return denoising_errors(
            adapter,
            self._latents[self._index(pictures)],
            self._noises[self._index(places)] * column(signs, adapter.device),
            times,
            {name: one[chosen] for name, one in self.conditions.items()},
            space=self.config.weighting.space,
            loss=self.config.loss,
            predict=self._predict,
        )[:num]

    def _index(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(self.adapter.device)

    def _place_noises(self, units: Sequence[Unit]) -> np.ndarray:
        """Where the noise of each unit lies in the bank on the device, int64 `(n,)`; new ones are drawn."""
        fresh = {unit.noise: unit for unit in units if unit.noise not in self._places}
        if fresh:
            shape, used = self.adapter.latent_shape, len(self._places)
            drawn = torch.stack([draw_noise(self.config.seed, one._replace(sign=1), shape) for one in fresh.values()])
            if (needed := used + len(fresh)) > len(self._noises):  # twice the room: a bank is copied few times
                room = torch.empty(max(needed, 2 * used), *shape, device=self.adapter.device)
                room[:used] = self._noises[:used]
                self._noises = room
            self._noises[used:needed] = drawn.to(self.adapter.device)
            self._places.update(zip(fresh, range(used, needed)))
        return np.array([self._places[unit.noise] for unit in units], dtype=np.int64)


def denoising_errors(
    adapter: Adapter,
    x: Tensor,
    eps: Tensor,
    times: np.ndarray,
    conditions: Conditions,
    *,
    space: Space = "eps",
    loss: Loss = "l2",
    predict: Predict | None = None,
) -> Tensor:
    """Unweighted mean errors, float32 `(B,)` on the device, with gradients to the conditions where these are enabled.

    Args:
        adapter: the model.
        x: latents, float32 `(B, C, h, w)`, or `(1, C, h, w)` for one picture.
        eps: noises, float32 `(B, C, h, w)`.
        times: shares of the schedule in (0, 1), float64 `(B,)`.
        conditions: one for each row, in the network's precision.
        space: in which errors are taken.
        loss: of the error's elements.
        predict: in place of the adapter's own, such as a compiled one.

    Raises:
        ValueError: for times outside (0, 1).
    """
    mix = adapter.schedule.mix(times)
    alpha, sigma = column(mix.alpha, adapter.device), column(mix.sigma, adapter.device)
    scale = column(error_scale(adapter.kind, space, mix.alpha, mix.sigma), adapter.device)
    z = (alpha * x + sigma * eps).to(adapter.dtype)
    out = (predict or adapter.predict)(z, mix.model_times.to(adapter.device), conditions).float()
    return mean_error(loss, (out - target(adapter.kind, x, eps, alpha, sigma)) * scale)


def column(numbers: np.ndarray, device: torch.device) -> Tensor:
    """One number for each row of latents, float32 `(B, 1, 1, 1)`."""
    return torch.from_numpy(numbers.astype(np.float32)).to(device)[:, None, None, None]


def check_prompts(adapter: Adapter, classes: Sequence[str | int], templates: Sequence[str]) -> None:
    """Complains about classes that the model can not tell apart.

    Raises:
        ValueError: naming both, or the template that can not be filled.
    """
    check_number(len(classes))
    if adapter.conditioned_on == "label" and list(templates) != [PLACE]:
        raise ValueError(f"this model is told numbers of classes, so templates can not act: {list(templates)}")
    check_places(templates)
    for template in templates:
        seen: dict[tuple[object, ...], str | int] = {}
        for one, tokens in zip(classes, adapter.tokenize([fill(template, name) for name in classes])):
            if tokens in seen:
                raise ValueError(
                    f"classes {seen[tokens]!r} and {one!r} are the same to this model in the template {template!r}: "
                    "their tokens are equal (it may know no capitals, or cut long prompts); rename one"
                )
            seen[tokens] = one


@dataclass(frozen=True, kw_only=True)
class PromptCache:
    """Conditions of prompts on disk, so that a text encoder need not run again for the same model and prompts.

    Args:
        folder: of the files, one for each set of prompts.
        model: name of the model.
        revision: what tells its versions apart.
    """

    folder: Path
    model: str
    revision: str

    def path(self, adapter: Adapter, prompts: Sequence[str]) -> Path:
        """The file of these prompts; its name is a hash of all that its contents depend on."""
        digest = hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
        family = type(adapter.pipe).__name__
        key = [CACHE_FORMAT, self.model, self.revision, family, str(adapter.dtype), digest]
        return self.folder / f"prompts_{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:40]}.safetensors"

    def encode(self, adapter: Adapter, prompts: Sequence[str]) -> Conditions:
        """`adapter.encode_text`, or what is cached of it.

        Raises:
            ValueError: naming a file that is broken.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file, save_file

        path = self.path(adapter, prompts)
        if path.is_file():
            try:
                return {name: one.to(adapter.device) for name, one in load_file(path).items()}
            except SafetensorError as error:
                raise ValueError(f"cached prompts {path} are broken; delete the file ({error})") from error
        found = adapter.encode_text(prompts)
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            save_file({name: one.cpu().contiguous() for name, one in found.items()}, part)
        return found
