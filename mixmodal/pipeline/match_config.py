"""What the match command is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mixmodal.classification.autoregressive import METHODS as AUTOREGRESSIVE
from mixmodal.config import check_least
from mixmodal.data.skipping import SampleLimits
from mixmodal.interop.adapter_files import hash_adapter
from mixmodal.pipeline.classify_config import METHODS
from mixmodal.pipeline.diffusion_options import DiffusionOptions
from mixmodal.records import Shard, check_out

WHOLE_DIFFUSION = DiffusionOptions(policy="full")


@dataclass(frozen=True, kw_only=True)
class MatchConfig:
    """Matches pictures with captions that differ in the order of their words, or in one of them: does a model see it?

    `out` gets a line for each line of the task in `records.jsonl` as it is finished, and when all are, `summary.json`:
    accuracy, text, image and group scores, beside what a blind reader of the captions gets. The same command goes on
    where it broke off; `--shard 0/4` to `3/4` in four processes, or a launcher, share the lines, and the last to end
    writes the summary.

    Args:
        model: folder of an exported model, a diffusion model or a CLIP or SigLIP as the method needs it, or a hub id.
        adapter: folder of an adapter of the model, as `runs/NAME/adapter`, which is merged into it; null is none.
        task: JSONL file of pictures, captions and which are true; or Winoground's examples.jsonl, or a JSON file of
            SugarCrepe.
        out: folder for records and summary; made where it is missing.
        images: folder of the pictures; null is that of the task, for Winoground `images` in it.
        method: `image_given_text` scores log p(image | text), `text_given_image` scores log p(text | image), both by an
            exported model of ours; `diffusion` how well a diffusion model denoises the picture when told the caption;
            `contrastive` the logits of a CLIP or SigLIP.
        blind: folder or hub id of an exported model of ours whose log p(text) is the blind reader; null is the model
            itself where it is one of ours, and no blind reader otherwise.
        seed: of the times and noises of `diffusion`; others draw nothing, and it stays 0.
        debias: how often log p(text) is subtracted from log p(text | image), 0 .. 1.
        diffusion: times and weighting; for `diffusion` only, and of the policy `full`.
        shard: `INDEX/COUNT` takes every COUNT-th line; null takes all, and under a launcher what its RANK and
            WORLD_SIZE say.
        max_skipped_share: share of lines with broken pictures, 0 .. 1, above which the job fails.
        batch_size: sequences in one forward; scores do not depend on it.
        device: `auto` takes the accelerator where there is one.
        dtype: of the weights.
    """

    model: str
    task: Path
    out: Path
    adapter: Path | None = None
    images: Path | None = None
    method: str = "image_given_text"
    blind: str | None = None
    seed: int = 0
    debias: float = 0.0
    diffusion: DiffusionOptions = WHOLE_DIFFUSION
    shard: str | None = None
    max_skipped_share: float = 0.05
    batch_size: int = 64
    device: str = "auto"
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"

    def __post_init__(self) -> None:
        check_out(self.out)
        check_least(self, 1, "batch_size")
        check_least(self, 0, "seed")
        SampleLimits(max_skipped_share=self.max_skipped_share)  # whether it is a share
        if self.shard is not None:
            Shard.parse(self.shard)
        self._check_idle()

    @property
    def blind_model(self) -> str | None:
        """The model that reads the captions without the pictures."""
        return self.model if self.blind is None and self.method in AUTOREGRESSIVE else self.blind

    def _check_idle(self) -> None:
        """Complains about options of other methods."""
        if self.method not in METHODS:
            raise ValueError(f"classification method {self.method!r} is unknown; choose {', '.join(METHODS)}")
        idle = {
            "adapter": (self.adapter is not None, self.method in AUTOREGRESSIVE),
            "debias": (bool(self.debias), self.method == "text_given_image"),
            "diffusion": (self.diffusion != WHOLE_DIFFUSION, self.method == "diffusion"),
            "seed": (bool(self.seed), self.method == "diffusion"),
            "dtype": (self.dtype != "stored", self.method != "contrastive" or self.blind is not None),
        }
        for name, (is_given, acts) in idle.items():
            if is_given and not acts:
                raise ValueError(f"{name} can not act on the method {self.method}; leave it out")
        if self.diffusion.policy != "full":
            raise ValueError(
                f"diffusion.policy is {self.diffusion.policy}; pictures are compared, too, so every caption is "
                "measured at the same times: leave it full"
            )
        if self.diffusion.is_measured:
            raise ValueError("diffusion: a task has no labelled pictures that weights or times could be fitted on")
        if self.diffusion.compile:
            raise ValueError("diffusion.compile can not act here: captions change from line to line; leave it out")

    def describe(self) -> dict[str, Any]:
        """What scores depend on beside the models and the task, as plain data."""
        names = ("method", "dtype", "seed", "debias")
        adapted = {} if self.adapter is None else {"adapter_sha256": hash_adapter(self.adapter)}
        return {**{name: getattr(self, name) for name in names}, "diffusion": self.diffusion.describe(), **adapted}
