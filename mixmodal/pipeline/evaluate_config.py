"""What the evaluate command is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mixmodal.data.skipping import SampleLimits
from mixmodal.pipeline.evaluating.hallucination import Hallucination, HallucinationOptions
from mixmodal.pipeline.evaluating.image_to_text import ImageToText, ImageToTextOptions
from mixmodal.pipeline.evaluating.questions import Questions, QuestionsOptions
from mixmodal.pipeline.evaluating.task import Task, TaskOptions
from mixmodal.pipeline.evaluating.text import TextBits, TextOptions
from mixmodal.pipeline.evaluating.text_to_image import TextToImage, TextToImageOptions

TASKS: dict[str, type[Task[Any]]] = {
    "text_to_image": TextToImage,
    "image_to_text": ImageToText,
    "questions": Questions,
    "text": TextBits,
    "hallucination": Hallucination,
}


@dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """Which tasks there are, each with its options; those that are left out are not done.

    Args:
        text_to_image: pictures of captions.
        image_to_text: captions of pictures.
        questions: answers to questions about pictures.
        text: bits for each byte of texts.
        hallucination: questions for objects that are in a picture, and that are not.
    """

    text_to_image: TextToImageOptions | None = None
    image_to_text: ImageToTextOptions | None = None
    questions: QuestionsOptions | None = None
    text: TextOptions | None = None
    hallucination: HallucinationOptions | None = None

    def build(self) -> dict[str, Task[Any]]:
        """The tasks by name, in the order above."""
        given: dict[str, TaskOptions | None] = {
            "text_to_image": self.text_to_image,
            "image_to_text": self.image_to_text,
            "questions": self.questions,
            "text": self.text,
            "hallucination": self.hallucination,
        }
        return {name: TASKS[name](options) for name, options in given.items() if options is not None}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluates a model by tasks.

    `out` gets a folder for each task, with a line for each sample in `records.jsonl` as it is finished and
    `summary.json` when all are, and then `evaluation.json` and `evaluation.html` for all tasks. The same command goes
    on where it broke off; `--shard 0/4` to `3/4` in four processes, or a launcher, share the samples, and the last to
    end sums up.

    Args:
        model: folder of an exported model, or an id on the Hugging Face hub.
        adapter: folder of an adapter of the model, as `runs/NAME/adapter`, which is merged into it; null is none.
        out: folder for records and results; made where it is missing.
        tasks: by name.
        seed: of the choice of samples, and of what is drawn.
        shard: `INDEX/COUNT` takes every COUNT-th sample; null takes all, and under a launcher what its RANK and
            WORLD_SIZE say.
        limits: what samples may be, and the share of broken ones that fails the job.
        batch_size: sequences in one forward; results do not depend on it.
        device: `auto` takes the accelerator where there is one.
        dtype: of the weights.
    """

    model: str
    adapter: Path | None = None
    out: Path
    tasks: TasksConfig
    seed: int = 0
    shard: str | None = None
    limits: SampleLimits = field(default_factory=SampleLimits)
    batch_size: int = 64
    device: str = "auto"
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"

    def __post_init__(self) -> None:
        if not self.tasks.build():
            raise ValueError(f"tasks is empty; give at least one of {', '.join(TASKS)}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative")
