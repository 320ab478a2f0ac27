"""The generate command: samples of one prompt as PNG files and text, listed in `results.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast

import torch
from PIL.Image import Image as Picture
from PIL.PngImagePlugin import PngInfo

from mixmodal.pipeline.mixed_modal import MixedModal
from mixmodal.pipeline.options import DEFAULT_SAMPLING, SamplingOptions, build_guidance
from mixmodal.pipeline.reading import ReadingConfig
from mixmodal.retrieval.retriever import Retrieved
from mixmodal.sampling.guidance import Unconditional
from mixmodal.sampling.rules import TokenSampling
from mixmodal.tokenization.preprocessing import open_picture

RESULTS = "results.json"
DTYPES = {"stored": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class PromptPart:
    """One part of a prompt: a text or a picture.

    Args:
        text: the text; empty where the part is a picture.
        image: file of the picture; null where the part is text.
    """

    text: str = ""
    image: Path | None = None


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(ReadingConfig):
    """Samples texts and pictures behind a prompt.

    `--prompt TEXT` and `--image FILE`, given as often as needed, are short for the entries of `parts`, in their order.
    With `--memory DIR --retrieve N` the model reads documents of a memory first.

    Args:
        model: folder of an exported model, or an id on the Hugging Face hub.
        out: folder for the samples and `results.json`; made where it is missing.
        parts: the prompt, as `[{text: a red apple}, {image: apple.png}]`.
        output: `text`, `image`, or `mixed` for texts and pictures as the model likes.
        num: number of samples.
        seed: equal seeds give equal samples.
        best_of: images drawn for each one that is kept, the one from which the model reads the prompt's text best.
        guidance_scale: how closely images follow the text: weight of classifier-free guidance; 1 is none, null is 2
            wherever a picture may follow a text.
        image_guidance_scale: how closely they follow the prompt's pictures, for editing; 1 is none.
        unconditional: how guidance does without: `mask` puts a mask in the place of text (CM3Leon), `drop` leaves it
            out (Chameleon).
        contrast_k: k of contrastive decoding CD-K in place of guidance (CM3Leon); 0 is none.
        contrast_alpha: its alpha: what share of the k-th likeliest code's probability a code must have.
        text_sampling: how text is drawn.
        image_sampling: how the codes of images are drawn.
        max_new_tokens: most tokens of a sample; null is as many as the model's context takes.
        batch_size: samples in one forward; they do not depend on it.
        device: `auto` takes the accelerator where there is one.
        dtype: of the weights.
    """

    model: str
    out: Path
    parts: list[PromptPart] = field(default_factory=list)
    output: Literal["text", "image", "mixed"] = "image"
    num: int = 1
    seed: int = 0
    best_of: int = 1
    guidance_scale: float | None = None
    image_guidance_scale: float = 1.0
    unconditional: Unconditional = "mask"
    contrast_k: int = 0
    contrast_alpha: float = 0.1
    text_sampling: TokenSampling = DEFAULT_SAMPLING["text"]
    image_sampling: TokenSampling = DEFAULT_SAMPLING["image"]
    max_new_tokens: int | None = None
    batch_size: int = 64
    device: str = "auto"
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"

    def __post_init__(self) -> None:
        super().__post_init__()
        build_guidance(self.guidance_options(), follows_text=self.output != "text")
        for modality, idle in (("text", "image"), ("image", "text")):
            if self.output == modality and getattr(self, f"{idle}_sampling") != DEFAULT_SAMPLING[idle]:
                raise ValueError(f"{idle}_sampling can not act where output is {modality}; leave it out")

    def guidance_options(self) -> SamplingOptions:
        """What steers pictures."""
        return {
            "guidance_scale": self.guidance_scale,
            "image_guidance_scale": self.image_guidance_scale,
            "unconditional": self.unconditional,
            "contrast_k": self.contrast_k,
            "contrast_alpha": self.contrast_alpha,
        }

    def options(self) -> SamplingOptions:
        """How tokens are drawn, for `MixedModal.generate`."""
        chosen = {"text": self.text_sampling, "image": self.image_sampling}
        names = [one.name for one in fields(TokenSampling)]
        by_modality = {name: {modality: getattr(one, name) for modality, one in chosen.items()} for name in names}
        return cast(SamplingOptions, {**by_modality, **self.guidance_options()})

    @classmethod
    def read_arguments(cls, argv: Sequence[str]) -> list[str]:
        """Gathers `--prompt` and `--image` into `--parts`, because an ordinary option would lose their order.

        Raises:
            ValueError: for one of them without a value, or beside `--parts`.
        """
        rest, parts, waiting = [], [], list(argv)
        while waiting:
            argument = waiting.pop(0)
            name, _, value = argument.partition("=")
            if name not in ("--prompt", "--image"):
                rest.append(argument)
                continue
            if name == argument:
                if not waiting or waiting[0].startswith("--"):
                    raise ValueError(f"{name} needs a value; write {name}=VALUE for one that begins with --")
                value = waiting.pop(0)
            parts.append({"text" if name == "--prompt" else "image": value})
        if not parts:
            return rest
        if any(argument.partition("=")[0] == "--parts" for argument in rest):
            raise ValueError("give the prompt either by --prompt and --image or by --parts")
        return [*rest, f"--parts={json.dumps(parts)}"]


def generate(config: GenerateConfig) -> None:
    """Draws the samples, writes them and says where.

    Raises:
        ValueError: for a part that is neither text nor picture, or what `MixedModal.generate` raises.
    """
    prompt = [read_part(part, place) for place, part in enumerate(config.parts)]
    model = MixedModal.from_pretrained(config.model, config.device, DTYPES[config.dtype], config.batch_size)
    options: dict[str, Any] = {**config.options(), "best_of": config.best_of, "max_new_tokens": config.max_new_tokens}
    config.attach(model)
    documents: list[Retrieved] = []
    if config.retrieve:
        fit = {"max_new_tokens": config.max_new_tokens, "random_seed": config.random_seed}
        documents = model.retrieve([prompt], config.retrieve, config.output, **fit)[0]
    samples = model.generate(prompt, config.output, num=config.num, seed=config.seed, before=documents, **options)
    described = {
        "model": config.model,
        "prompt": [{"text": part.text} if part.image is None else {"image": str(part.image)} for part in config.parts],
        "output": config.output,
        "seed": config.seed,
        "settings": options,
        **config.describe(),
    }
    config.out.mkdir(parents=True, exist_ok=True)
    keys, listed = {}, {}
    if config.retrieve:
        keys = {"retrieved": [one.key for one in documents]}
        listed = {"retrieved": write_documents(model, documents, config.out)}
    written = [write_sample(sample, number, config.out, {**described, **keys}) for number, sample in enumerate(samples)]
    results = json.dumps({**described, **listed, "samples": written}, indent=2, ensure_ascii=False)
    (config.out / RESULTS).write_text(results + "\n", encoding="utf-8")
    print(f"{len(written)} samples in {config.out}, listed in {config.out / RESULTS}")


def read_part(part: PromptPart, place: int) -> str | Picture:
    """The text, or the picture from its file.

    Raises:
        ValueError: naming the part, where it is not exactly one of them or the file can not be read.
    """
    if part.image is not None and not part.text:
        if not part.image.is_file():
            raise ValueError(f"part {place} of the prompt: there is no picture at {part.image}")
        return open_picture(part.image, f"part {place} of the prompt ({part.image})")
    if part.text and part.image is None:
        return part.text
    raise ValueError(f"part {place} of the prompt must have either a text or an image")


def write_sample(sample: Any, number: int, folder: Path, described: dict[str, Any]) -> dict[str, Any]:
    """Writes the parts of one sample; gives its entry of `results.json`."""
    parts = sample if isinstance(sample, list) else [sample]
    entries: list[dict[str, str]] = []
    for place, part in enumerate(parts):
        stem = f"{number:04d}" if part is sample else f"{number:04d}_{place}"
        if isinstance(part, Picture):
            part.save(folder / f"{stem}.png", pnginfo=_png_text({**described, "sample": number}))
            entries.append({"image": f"{stem}.png"})
        else:
            (folder / f"{stem}.txt").write_text(str(part), encoding="utf-8")
            entries.append({"text": str(part), "file": f"{stem}.txt"})
    return {"sample": number, "parts": entries}


def write_documents(model: MixedModal, documents: Sequence[Retrieved], folder: Path) -> list[dict[str, Any]]:
    """Writes the pictures of retrieved documents; gives their entries of `results.json`, in the order of reading."""
    contents = model.codec.from_documents([model.format.parse(one.ids) for one in documents])
    entries = [one.to_dict() for one in documents]
    for number, (entry, content) in enumerate(zip(entries, contents)):
        entry["parts"] = []
        for place, part in enumerate(content):
            if isinstance(part, Picture):
                several = sum(isinstance(one, Picture) for one in content) > 1
                name = f"retrieved_{number:02d}_{place}.png" if several else f"retrieved_{number:02d}.png"
                part.save(folder / name)
                entry["parts"].append({"image": name})
            else:
                entry["parts"].append({"text": str(part)})
    return entries


def _png_text(described: dict[str, Any]) -> PngInfo:
    """What made a picture, as text chunks of its PNG file."""
    info = PngInfo()
    for key, value in described.items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return info
