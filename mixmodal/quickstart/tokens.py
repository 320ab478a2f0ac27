"""Token shards of both splits: the training pairs, and the held-out ones for the held-out loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mixmodal.data.augment import AugmentConfig
from mixmodal.data.pretokenize import PretokenizeConfig, pretokenize


def write_token_shards(run: Path, config: PretokenizeConfig, progress: Callable[[int, int], None]) -> None:
    """Writes `tokens/train`, as the config says, and `tokens/heldout`, of the pictures as they are."""
    pretokenize(config, progress)
    plain = {"num_variants": 1, "augment": AugmentConfig()}
    pretokenize(replace(config, shards=(run / "data" / "heldout",), out=run / "tokens" / "heldout", **plain), progress)
