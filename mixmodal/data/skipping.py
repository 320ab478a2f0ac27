"""What happens to bad samples: each is named and counted, and too many of them end the job."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixmodal.tokenization.preprocessing import MAX_PIXELS

logger = logging.getLogger(__name__)
MAX_EXAMPLES = 20
"""Messages that a report repeats; all of them are logged."""


@dataclass(frozen=True, kw_only=True)
class SampleLimits:
    """What a sample may be, and how many bad ones a job puts up with.

    Args:
        max_pixels: cap on the pixels of a picture, checked before decoding.
        max_caption_words: words that are kept of a text; longer ones are cut and counted. A conversation, or a task's
            document, with a longer one is skipped.
        max_skipped_share: share of bad samples, 0 .. 1, above which the job fails.
    """

    max_pixels: int = MAX_PIXELS
    max_caption_words: int = 256
    max_skipped_share: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.max_skipped_share <= 1:
            raise ValueError(f"max_skipped_share is {self.max_skipped_share}; it must lie in 0 .. 1")
        for name in ("max_pixels", "max_caption_words"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def may_be_cut(messages: Sequence[object], metadata: Mapping[str, Any]) -> bool:
    """Whether long texts are cut: not of conversations and tasks, whose answers would be lost, or end in the middle."""
    return not messages and metadata.get("task") is None


class SampleError(ValueError):
    """A sample that can not be used. The message names file and key; `reason` is what it is counted under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class TooManySkipped(ValueError):
    """More than the allowed share of the samples is bad."""


class SkipCounter:
    """Counts used, skipped and altered samples of one job.

    Args:
        max_share: share of skipped samples above which the job fails.
        min_samples: samples to see before the share is judged while the job is under way; `finish` always judges.
    """

    def __init__(self, max_share: float = 0.0, min_samples: int = 100) -> None:
        self.max_share = max_share
        self.min_samples = min_samples
        self.num_used = 0
        self.skipped: Counter[str] = Counter()
        self.altered: Counter[str] = Counter()
        self.examples: list[str] = []

    @property
    def num_skipped(self) -> int:
        return sum(self.skipped.values())

    def use(self, count: int = 1) -> None:
        """Counts good samples."""
        self.num_used += count

    def skip(self, error: SampleError) -> None:
        """Counts and logs a bad sample.

        Raises:
            TooManySkipped: above the allowed share.
        """
        self.skipped[error.reason] += 1
        self._log(f"skipped ({error.reason}): {error}")
        if self.num_used + self.num_skipped >= self.min_samples:
            self._judge()

    def alter(self, change: str, message: str) -> None:
        """Counts and logs a sample that is used, but not as it was."""
        self.altered[change] += 1
        self._log(f"{change}: {message}")

    def merge(self, counts: Mapping[str, Any]) -> None:
        """Adds what another counter's `to_dict` gave.

        Raises:
            TooManySkipped: above the allowed share.
        """
        self.num_used += counts["used"]
        self.skipped.update(counts["skipped"])
        self.altered.update(counts["altered"])
        self.examples += counts["examples"][: MAX_EXAMPLES - len(self.examples)]
        if self.num_used + self.num_skipped >= self.min_samples:
            self._judge()

    def finish(self) -> None:
        """The last word on the share.

        Raises:
            TooManySkipped: above the allowed share.
        """
        self._judge()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a report."""
        return {
            "used": self.num_used,
            "skipped": dict(sorted(self.skipped.items())),
            "altered": dict(sorted(self.altered.items())),
            "examples": list(self.examples),
        }

    def _log(self, message: str) -> None:
        logger.warning("%s", message)
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(message)

    def _judge(self) -> None:
        total = self.num_used + self.num_skipped
        if self.num_skipped > self.max_share * total:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped.most_common())
            raise TooManySkipped(
                f"{self.num_skipped} of {total} samples are bad ({reasons}), more than max_skipped_share "
                f"{self.max_share:g} allows; the first: {self.examples[0]}"
            )
