"""What every classifier finds, and how scores become probabilities.

Shapes: P pictures, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mixmodal.classification.likelihoods import LogLikelihoods

TIE = 1e-5  # nats; float32 sums of equal sequences differ by less


class Classification(NamedTuple):
    """What a classifier finds for P pictures and K classes, each `(P, K)`.

    Args:
        scores: what is compared, float64.
        probabilities: softmax of the scores over the classes (equal priors), float64.
        log_likelihoods: the sums in nats behind the scores, and their counts.
    """

    scores: np.ndarray
    probabilities: np.ndarray
    log_likelihoods: LogLikelihoods

    @property
    def tied(self) -> np.ndarray:
        """Which classes share the best score, `(P, K)` bool: one in each row, or more where there is a tie."""
        return self.scores >= self.scores.max(axis=1, keepdims=True) - TIE
