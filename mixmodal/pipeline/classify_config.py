"""What the classify command is told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mixmodal.classification.autoregressive import METHODS as AUTOREGRESSIVE
from mixmodal.classification.datasets import check_templates, read_templates
from mixmodal.classification.templates import PLACE
from mixmodal.classification.variants import VariantsConfig
from mixmodal.config import check_least
from mixmodal.data.skipping import SampleLimits
from mixmodal.pipeline.adapt_options import AdaptOptions
from mixmodal.pipeline.diffusion_options import DiffusionOptions
from mixmodal.pipeline.reading import ReadingConfig
from mixmodal.records import Shard, check_out

METHODS = (*AUTOREGRESSIVE, "diffusion", "contrastive")
PLAIN = [PLACE]
PLAIN_VARIANTS, DEFAULT_DIFFUSION, NO_ADAPTATION = VariantsConfig(), DiffusionOptions(), AdaptOptions()


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(ReadingConfig):
    """Classifies pictures among captions, by the likelihood that a model gives, and says how well.

    `out` gets a line for each picture in `records.jsonl` as it is finished, and when all are, `summary.json`,
    `confusion.png` and `reliability.png`. The same command goes on where it broke off; `--shard 0/4` to `3/4` in four
    processes, or a launcher, share the pictures, and the last to end writes the summary. `--template TEXT` may be given
    several times.

    With `--memory DIR --retrieve N` the model reads the documents of a memory that are nearest to the picture, the same
    before every class. A memory that holds the pictures themselves, with their captions, gives the answers away.

    Args:
        model: folder of an exported model, or an id on the Hugging Face hub.
        data: folder of pictures, in subfolders named by their label where that is known, or of shards; or a CSV file
            with the columns path and label; or a common set as it is distributed (docs/classifiers.md).
        classes: text file with one class a line: its caption, or its label, a tab and its caption; null takes those
            that the layout of `data` names.
        out: folder for records and summary; made where it is missing.
        method: `image_given_text` scores log p(image | text), `text_given_image` scores log p(text | image), both by an
            exported model of ours; `diffusion` how well a diffusion model denoises the picture when told the class;
            `contrastive` the logits of a CLIP or SigLIP.
        templates: texts around the caption, as `a photo of {}`; scores are means over several, as log-likelihoods.
        templates_file: text file with one of them a line, in place of `templates`.
        shift: pictures of the same classes from elsewhere, as `data`: both accuracies, and how much is lost.
        cues: pictures with the shape of one class and the texture of another: a folder of files with names such as
            cat1-clock3.png, first the shape, or a CSV file with the columns path, shape and texture. Which of the two
            decides is the shape bias.
        seed: of the times and noises of `diffusion` and of `adapt`; others draw nothing, and it stays 0.
        debias: alpha in log p(text | image) - alpha log p(text); for `text_given_image` only.
        length_normalise: divide scores by the number of tokens; for `text_given_image` only.
        variants: crops, mirror images and noise in which a picture is tokenized again; for an exported model only.
        diffusion: policy and weighting; for `diffusion` only.
        adapt: adapts the classifier to each picture by a denoiser (Diffusion-TTA); for `contrastive` only.
        shard: `INDEX/COUNT` takes every COUNT-th picture; null takes all, and under a launcher what its RANK and
            WORLD_SIZE say.
        max_skipped_share: share of broken pictures, 0 .. 1, above which the job fails.
        batch_size: sequences in one forward; scores do not depend on it.
        device: `auto` takes the accelerator where there is one.
        dtype: of the weights; for `contrastive` of those of `adapt.denoiser`, its own are float32.
    """

    model: str
    data: Path
    classes: Path | None = None
    out: Path
    method: str = "image_given_text"
    templates: list[str] = field(default_factory=lambda: list(PLAIN))
    templates_file: Path | None = None
    shift: Path | None = None
    cues: Path | None = None
    seed: int = 0
    debias: float = 0.0
    length_normalise: bool = False
    variants: VariantsConfig = PLAIN_VARIANTS
    diffusion: DiffusionOptions = DEFAULT_DIFFUSION
    adapt: AdaptOptions = NO_ADAPTATION
    shard: str | None = None
    max_skipped_share: float = 0.05
    batch_size: int = 64
    device: str = "auto"
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_out(self.out)
        check_least(self, 1, "batch_size")
        check_least(self, 0, "seed")
        SampleLimits(max_skipped_share=self.max_skipped_share)  # whether it is a share
        if self.templates_file is not None and self.templates != PLAIN:
            raise ValueError("give either templates or templates_file")
        if self.shard is not None:
            Shard.parse(self.shard)
        self._check_idle()

    @property
    def is_adapted(self) -> bool:
        """Whether the classifier is adapted to each picture."""
        return self.adapt.denoiser is not None

    def _check_idle(self) -> None:
        """Complains about options of other methods."""
        if self.method not in METHODS:
            raise ValueError(f"classification method {self.method!r} is unknown; choose {', '.join(METHODS)}")
        is_ours, denoises = self.method in AUTOREGRESSIVE, self.method == "diffusion" or self.is_adapted
        idle = {
            "adapter": (self.adapter is not None, is_ours),
            "memory": (self.memory is not None, is_ours),
            "debias": (bool(self.debias), is_ours),
            "length_normalise": (self.length_normalise, is_ours),
            "variants": (self.variants != PLAIN_VARIANTS, is_ours),
            "diffusion": (self.diffusion != DEFAULT_DIFFUSION, self.method == "diffusion"),
            "adapt": (self.is_adapted, self.method == "contrastive"),
            "seed": (bool(self.seed), denoises),
            "dtype": (self.dtype != "stored", is_ours or denoises),
        }
        for name, (is_given, acts) in idle.items():
            if is_given and not acts:
                raise ValueError(f"{name} can not act on the method {self.method}; leave it out")

    @classmethod
    def read_arguments(cls, argv: Sequence[str]) -> list[str]:
        """Gathers `--template TEXT` into `--templates`.

        Raises:
            ValueError: for one without a value, or beside `--templates`.
        """
        rest, found, words = [], [], iter(argv)
        for word in words:
            name, equals, value = word.partition("=")
            if name != "--template":
                rest.append(word)
                continue
            if not equals and (value := next(words, None)) is None:
                raise ValueError("--template needs a value, as 'a photo of {}'")
            found.append(value)
        if not found:
            return rest
        if any(word.partition("=")[0] == "--templates" for word in rest):
            raise ValueError("give templates either by --template or by --templates")
        return [*rest, f"--templates={json.dumps(found)}"]

    def read_templates(self) -> list[str]:
        """Those that are given, or in the file that is.

        Raises:
            ValueError: for a text that is none.
        """
        found = self.templates if self.templates_file is None else read_templates(self.templates_file)
        check_templates(found)
        return list(found)
