"""What the evaluation asks of a classifier, whatever it computes, and of one with several prompt templates.

Shapes: P pictures, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from PIL.Image import Image as Picture


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a classifier finds for one picture, each `(K,)`.

    Args:
        scores: what is compared, float64: higher fits better. -inf is a class that was given up without a score.
        probabilities: of the classes, float64, of sum 1.
        tied: which classes share the best score, bool: one, or more where there is a tie.
        evaluations: what each class took, int64: sequences scored, passes of a denoiser, or the like.
        details: what else is recorded of the picture, as plain JSON data.
    """

    scores: np.ndarray
    probabilities: np.ndarray
    tied: np.ndarray
    evaluations: np.ndarray
    details: Mapping[str, Any] = field(default_factory=dict)

    def check(self, num_classes: int, key: str) -> None:
        """Whether there is a finding for every class.

        Raises:
            ValueError: naming the picture `key`, for a wrong number of classes, a score that is nan or +inf,
                probabilities that are none, or no class that is best.
        """
        for name in ("scores", "probabilities", "tied", "evaluations"):
            if (shape := getattr(self, name).shape) != (num_classes,):
                raise ValueError(f"{key}: the classifier gave {name} of shape {shape} for {num_classes} classes")
        if np.isnan(self.scores).any() or (self.scores == np.inf).any() or not np.isfinite(self.scores).any():
            raise ValueError(f"{key}: the scores are not finite ({self.scores.tolist()}); check the model's precision")
        if (self.probabilities < 0).any() or abs(self.probabilities.sum() - 1) > 1e-6:
            raise ValueError(f"{key}: the probabilities sum to {self.probabilities.sum():.6g}, not to 1")
        if not self.tied.any():
            raise ValueError(f"{key}: the classifier says of no class that it is the best")


class PictureClassifier(Protocol):
    """Anything that scores a fixed list of classes."""

    def score(self, pictures: Sequence[Picture]) -> Sequence[Scored]:
        """Findings in the order of pictures, RGB of any size: of each the same whichever others are beside it."""
        ...
