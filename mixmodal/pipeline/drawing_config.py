"""The options of commands that draw samples: which model, what steers it, where samples go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from mixmodal.config import check_least
from mixmodal.pipeline.mixed_modal import MixedModal
from mixmodal.pipeline.options import DEFAULT_SAMPLING, SamplingOptions, build_guidance, sampling_options
from mixmodal.pipeline.reading import ReadingConfig, local_device
from mixmodal.sampling.guidance import Unconditional
from mixmodal.sampling.rules import TokenSampling

DTYPES = {"stored": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class DrawingConfig(ReadingConfig):
    """Draws pictures, with documents of a memory before the prompt where one is given.

    Args:
        model: folder of an exported model, or an id on the Hugging Face hub.
        out: folder for the samples and `results.json`; made where it is missing.
        num: number of samples of a prompt.
        seed: equal seeds give equal samples.
        guidance_scale: how closely images follow the text: weight of classifier-free guidance; 1 is none, null is 2
            wherever a picture may follow a text.
        image_guidance_scale: how closely they follow the prompt's pictures, for editing; 1 is none.
        unconditional: how guidance does without: `mask` puts a mask in the place of text (CM3Leon), `drop` leaves it
            out (Chameleon).
        contrast_k: k of contrastive decoding CD-K in place of guidance (CM3Leon); 0 is none.
        contrast_alpha: its alpha: what share of the k-th likeliest code's probability a code must have.
        image_sampling: how the codes of images are drawn.
        batch_size: samples in one forward; they do not depend on it.
        device: `auto` takes the accelerator where there is one.
        dtype: of the weights.
        cuda_graphs: on a CUDA device, launches each step within pictures as one graph.
        compile: on a CUDA device, lets torch.compile make one program of each block, which takes its time first.
    """

    model: str
    out: Path
    num: int = 1
    seed: int = 0
    guidance_scale: float | None = None
    image_guidance_scale: float = 1.0
    unconditional: Unconditional = "mask"
    contrast_k: int = 0
    contrast_alpha: float = 0.1
    image_sampling: TokenSampling = DEFAULT_SAMPLING["image"]
    batch_size: int = 64
    device: str = "auto"
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"
    cuda_graphs: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "num", "batch_size")
        check_least(self, 0, "seed")
        if self.out.is_file():
            raise ValueError(f"out is {self.out}, which is a file; give a folder for the samples")

    @property
    def samplings(self) -> dict[str, TokenSampling]:
        """How tokens are drawn, by modality."""
        return {"image": self.image_sampling}

    def guidance_options(self) -> SamplingOptions:
        """What steers pictures."""
        return {
            "guidance_scale": self.guidance_scale,
            "image_guidance_scale": self.image_guidance_scale,
            "unconditional": self.unconditional,
            "contrast_k": self.contrast_k,
            "contrast_alpha": self.contrast_alpha,
        }

    def check_guidance(self, *, follows_text: bool) -> None:
        """Whether what steers pictures can act, where they `follows_text`.

        Raises:
            ValueError: naming the option.
        """
        build_guidance(self.guidance_options(), follows_text)

    def options(self) -> SamplingOptions:
        """How tokens are drawn, for `MixedModal.generate`."""
        chosen = self.samplings
        return {**sampling_options(chosen), **self.guidance_options()}

    def load(self) -> MixedModal:
        """The model, on this process's device where a launcher has started several, with its memory."""
        how = local_device(self.device), DTYPES[self.dtype], self.batch_size, self.adapter
        model = MixedModal.from_pretrained(self.model, *how)
        model.accelerate(cuda_graphs=self.cuda_graphs, compile=self.compile)
        self.attach(model)
        return model
