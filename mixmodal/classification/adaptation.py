"""Adapts a contrastive classifier to each picture by what a diffusion model makes of its guess.

Diffusion-TTA (arXiv 2311.16102, section 3): the classifier's probabilities mix the embeddings of the classes to one
condition, and the classifier is changed until a denoiser that is told this condition does better on the picture.

Shapes: P pictures, K classes, B draws of time and noise, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image as Picture
from torch import Tensor

from mixmodal.classification.contrastive import ContrastiveClassifier, classification_of
from mixmodal.classification.keyed import keyed_generator
from mixmodal.classification.result import Classification
from mixmodal.retrieval.encoder import ImagePart

Conditions = Mapping[str, Tensor]
"""What a denoiser is told, by name; the first dimension is that of classes or of draws."""
Denoise = Callable[[Conditions, Tensor, Tensor], Tensor]
"""Conditions of B draws, times in (0, 1) (float64 `(B,)` on the CPU) and standard normal noises `(B, ...)` to errors
`(B,)` on a picture, with gradients to the conditions."""
ABOVE_ZERO, BELOW_ONE = float(np.finfo(np.float64).tiny), float(1 - np.finfo(np.float64).epsneg)


@dataclass(frozen=True, kw_only=True)
class AdaptationConfig:
    """How a classifier is adapted.

    Args:
        part: of the classifier, what is changed: its image tower, the last norm in it, or the scale of its logits.
        num_steps: of Adam, for each picture.
        lr: of Adam; a last norm or a scale alone takes far larger ones than a whole tower.
        num_draws: times and noises of a step; the paper takes 180.
        seed: of these, with the key of the picture.

    Raises:
        ValueError: for a value out of range.
    """

    part: ImagePart = "tower"
    num_steps: int = 5
    lr: float = 1e-5
    num_draws: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.part not in ("tower", "norm", "scale"):
            raise ValueError(f"adaptation: part {self.part!r} is unknown; choose tower, norm or scale")
        if min(self.num_steps, self.num_draws) < 1 or self.lr <= 0 or self.seed < 0:
            raise ValueError(
                f"adaptation: num_steps is {self.num_steps} and num_draws {self.num_draws} (at least 1), "
                f"lr is {self.lr} (above 0), seed is {self.seed} (not negative)"
            )


class Adapted(NamedTuple):
    """What is found before and after.

    Args:
        before: of the classifier as it was.
        after: of the classifier adapted to each picture.
        losses: the denoiser's error at each step, float64 `(P, num_steps)`, each at other draws.
    """

    before: Classification
    after: Classification
    losses: np.ndarray


class AdaptedClassifier:
    """A contrastive classifier that is adapted to each picture and then as it was.

    Args:
        classifier: what is adapted; vectors of its classes stay as they are.
        prepare: a picture to how well it is denoised.
        embeddings: what the denoiser is told of each class, `(K, ...)` each, in floating point.
        noise_shape: of the noise of one draw.
        config: how.

    Raises:
        ValueError: for embeddings that are none of the K classes, or can not be mixed.
    """

    def __init__(
        self,
        classifier: ContrastiveClassifier,
        prepare: Callable[[Picture], Denoise],
        embeddings: Conditions,
        noise_shape: Sequence[int],
        config: AdaptationConfig | None = None,
    ) -> None:
        num_classes = len(classifier.vectors)
        for name, values in embeddings.items():
            if len(values) != num_classes or not values.is_floating_point():
                raise ValueError(
                    f"adaptation: the condition {name!r} has {len(values)} rows of {values.dtype} for {num_classes} "
                    "classes; it must have a row of floating-point numbers for each, which can be mixed"
                )
        self.classifier, self.prepare, self.embeddings = classifier, prepare, embeddings
        self.noise_shape, self.config = tuple(noise_shape), config or AdaptationConfig()

    def score(self, pictures: Sequence[Picture], keys: Sequence[str]) -> Adapted:
        """Scores pictures one by one; the weights are as they were afterwards, also after an error.

        Args:
            keys: name the pictures; a picture of the same key has the same draws.

        Raises:
            ValueError: naming a picture on which the denoiser's error is not finite.
        """
        before, after, losses = [], [], []
        for picture, key in zip(pictures, keys, strict=True):
            with self._changeable() as parameters:
                optimizer = torch.optim.Adam(parameters, lr=self.config.lr)
                denoise = self.prepare(picture)
                row = []
                with torch.no_grad():
                    before.append(self._logits(picture).double().cpu().numpy())
                for step in range(self.config.num_steps):
                    loss = self._loss(picture, key, step, denoise)
                    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                    for parameter, gradient in zip(parameters, gradients):
                        parameter.grad = gradient
                    optimizer.step()
                    row.append(loss.item())
                with torch.no_grad():
                    after.append(self._logits(picture).double().cpu().numpy())
                losses.append(row)
        shape = (len(pictures), len(self.classifier.vectors))
        is_sigmoid = self.classifier.encoder.is_sigmoid
        first, last = (classification_of(np.array(rows).reshape(shape), is_sigmoid) for rows in (before, after))
        return Adapted(first, last, np.array(losses).reshape(len(pictures), self.config.num_steps))

    @contextmanager
    def _changeable(self) -> Iterator[list[Tensor]]:
        """The weights that may change within; behind it they are what they were."""
        parameters = self.classifier.encoder.image_parameters(self.config.part)
        kept = [(one.detach().clone(), one.requires_grad, one.grad) for one in parameters]
        try:
            for one in parameters:
                one.requires_grad_(True)
            with torch.enable_grad():
                yield parameters
        finally:
            with torch.no_grad():
                for one, (value, had_gradient, gradient) in zip(parameters, kept):
                    one.copy_(value)
                    one.requires_grad_(had_gradient)
                    one.grad = gradient

    def _logits(self, picture: Picture) -> Tensor:
        """`(K,)`, with gradients."""
        encoder = self.classifier.encoder
        image = F.normalize(encoder.image_features([picture]), dim=-1)  # (1, D)
        vectors = torch.from_numpy(self.classifier.vectors).to(image)
        return encoder.scale_logits(image @ vectors.T)[0]

    def _loss(self, picture: Picture, key: str, step: int, denoise: Denoise) -> Tensor:
        """The mean error of denoising under the mixed condition, at the draws of a step."""
        shares = self._logits(picture).softmax(0)
        number = self.config.num_draws
        conditions = {}
        for name, values in self.embeddings.items():
            mixed = torch.tensordot(shares.to(values), values, dims=1)
            conditions[name] = mixed.expand(number, *mixed.shape)
        generator = keyed_generator(self.config.seed, key, step)
        # one time in each of B equal parts: draws of a step cover the schedule
        shares_of_parts = torch.rand(number, generator=generator, dtype=torch.float64)
        times = (torch.arange(number) + shares_of_parts) / number  # which may be rounded to 1
        times = times.clamp(ABOVE_ZERO, BELOW_ONE)
        noises = torch.randn(number, *self.noise_shape, generator=generator)
        loss = denoise(conditions, times, noises.to(shares.device)).mean()
        if not torch.isfinite(loss):
            raise ValueError(f"adaptation: the denoiser's error on {key} is {loss.item()} at step {step}; check it")
        return loss
