"""How each family of diffusion models wants its pictures, conditions and times: one small adapter a family.

An adapter makes `(z, model_times, conditions)` into what the family's pipeline hands to `scheduler.step` with guidance
off, bit for bit. Pipelines of one method name differ: `encode_prompt` returns its tensors in another order in each
family, so the adapters name what they take.

Shapes: B batch, N prompts or labels, C h w latents (or pixels).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mixmodal.classification.adapter_base import Adapter, Conditions, without_variance

FLUX_STEPS = 1000


class StableDiffusion(Adapter):
    """Stable Diffusion 1 and 2, of any prediction."""

    def __init__(self, pipe: Any, image_size: int | None = None) -> None:
        super().__init__(pipe, pipe.unet, image_size)

    def _encode(self, prompts: list[str]) -> Conditions:
        found = self.pipe.encode_prompt(
            prompt=prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"embeddings": found[0]}

    def predict(self, z: Tensor, model_times: Tensor, conditions: Conditions) -> Tensor:
        return self.network(z, model_times, encoder_hidden_states=conditions["embeddings"], return_dict=False)[0]


class StableDiffusionXL(Adapter):
    """Stable Diffusion XL, told that pictures were of the size they have, and not cropped."""

    def __init__(self, pipe: Any, image_size: int | None = None) -> None:
        super().__init__(pipe, pipe.unet, image_size)

    def _encode(self, prompts: list[str]) -> Conditions:
        embeddings, _, pooled, _ = self.pipe.encode_prompt(
            prompt=prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"embeddings": embeddings, "pooled": pooled}

    def predict(self, z: Tensor, model_times: Tensor, conditions: Conditions) -> Tensor:
        size = self.image_size
        sizes = torch.tensor([[size, size, 0, 0, size, size]], device=z.device, dtype=conditions["embeddings"].dtype)
        added = {"text_embeds": conditions["pooled"], "time_ids": sizes.expand(len(z), -1)}
        return self.network(
            z,
            model_times,
            encoder_hidden_states=conditions["embeddings"],
            added_cond_kwargs=added,
            return_dict=False,
        )[0]


class StableDiffusion3(Adapter):
    """Stable Diffusion 3 and 3.5, with or without T5."""

    t5_tokenizer, t5_tokens = "tokenizer_3", 256

    def __init__(self, pipe: Any, image_size: int | None = None) -> None:
        super().__init__(pipe, pipe.transformer, image_size)

    def patch_side(self) -> int:
        return self.network.config.patch_size

    def _encode(self, prompts: list[str]) -> Conditions:
        embeddings, _, pooled, _ = self.pipe.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.t5_tokens,
        )
        return {"embeddings": embeddings, "pooled": pooled}

    def predict(self, z: Tensor, model_times: Tensor, conditions: Conditions) -> Tensor:
        return self.network(
            hidden_states=z,
            timestep=model_times,
            encoder_hidden_states=conditions["embeddings"],
            pooled_projections=conditions["pooled"],
            return_dict=False,
        )[0]


class Flux(Adapter):
    """FLUX.1: latents go in as rows of 2 x 2 patches, and the time as u.

    Args:
        guidance: what a model with a guidance embedding (dev) is told; 1 is no guidance.
    """

    t5_tokenizer, t5_tokens = "tokenizer_2", 512

    def __init__(self, pipe: Any, image_size: int | None = None, guidance: float | None = None) -> None:
        super().__init__(pipe, pipe.transformer, image_size)
        if guidance is not None and not self.network.config.guidance_embeds:
            raise ValueError(f"guidance {guidance} can not act: this model has no embedding of it; leave it out")
        self.guidance = 1.0 if guidance is None else guidance
        kind = "guidance" if self.network.config.guidance_embeds else "step"
        self.caution = f"a {kind}-distilled model: its errors bound no likelihood, so its costs are experimental"

    def default_side(self) -> int:
        return self.pipe.default_sample_size

    def patch_side(self) -> int:
        return 2

    def num_channels(self) -> int:
        return self.network.config.in_channels // 4

    def _encode(self, prompts: list[str]) -> Conditions:
        embeddings, pooled, _ = self.pipe.encode_prompt(
            prompt=prompts, device=self.device, max_sequence_length=self.t5_tokens
        )
        return {"embeddings": embeddings, "pooled": pooled}

    def predict(self, z: Tensor, model_times: Tensor, conditions: Conditions) -> Tensor:
        rows, columns = z.shape[2] // 2, z.shape[3] // 2
        places = torch.zeros(rows, columns, 3, device=z.device, dtype=z.dtype)
        places[..., 1] = torch.arange(rows, device=z.device)[:, None]
        places[..., 2] = torch.arange(columns, device=z.device)[None]
        guidance = None
        if self.network.config.guidance_embeds:
            guidance = torch.full((len(z),), self.guidance, device=z.device, dtype=torch.float32)
        out = self.network(
            hidden_states=pack(z),
            timestep=model_times.to(z.dtype) / FLUX_STEPS,
            guidance=guidance,
            pooled_projections=conditions["pooled"],
            encoder_hidden_states=conditions["embeddings"],
            txt_ids=torch.zeros(conditions["embeddings"].shape[1], 3, device=z.device, dtype=z.dtype),
            img_ids=places.flatten(0, 1),
            return_dict=False,
        )[0]
        return unpack(out, rows, columns)


def pack(latents: Tensor) -> Tensor:
    """Latents `(B, C, h, w)` as patches `(B, h / 2 * w / 2, 4 C)`, by rows."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, height // 2 * (width // 2), channels * 4)


def unpack(patches: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `pack`, of `rows` x `columns` patches."""
    batch, _, channels = patches.shape
    latents = patches.view(batch, rows, columns, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return latents.reshape(batch, channels // 4, rows * 2, columns * 2)


class PixArt(Adapter):
    """PixArt-alpha and -sigma."""

    t5_tokenizer = "tokenizer"

    def __init__(self, pipe: Any, image_size: int | None = None) -> None:
        super().__init__(pipe, pipe.transformer, image_size)
        self.t5_tokens = 300 if "Sigma" in type(pipe).__name__ else 120

    def patch_side(self) -> int:
        return self.network.config.patch_size

    def _cleaned(self, prompts: Sequence[str]) -> list[str]:
        return [prompt.lower().strip() for prompt in prompts]

    def _encode(self, prompts: list[str]) -> Conditions:
        embeddings, mask, _, _ = self.pipe.encode_prompt(
            prompt=prompts,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.t5_tokens,
        )
        return {"embeddings": embeddings, "mask": mask}

    def predict(self, z: Tensor, model_times: Tensor, conditions: Conditions) -> Tensor:
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.network.config.sample_size == 128:  # alpha at 1024 pixels alone was told them
            added["resolution"] = torch.full((len(z), 2), float(self.image_size), device=z.device, dtype=z.dtype)
            added["aspect_ratio"] = torch.ones(len(z), 1, device=z.device, dtype=z.dtype)
        out = self.network(
            z,
            encoder_hidden_states=conditions["embeddings"],
            encoder_attention_mask=conditions["mask"],
            timestep=model_times,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return without_variance(out, z.shape[1])


class Labelled(Adapter):
    """Models that are told the number of a class: DiT, and U-Nets of diffusers in pixels or latents.

    Args:
        names: numbers of classes by name; None for those of the pipeline, where it has any.
        encode: for a U-Net that reads text, prompts to what it is called with beside pictures and times; None for
            numbers of classes.
    """

    def __init__(
        self,
        pipe: Any,
        image_size: int | None = None,
        names: dict[str, int] | None = None,
        encode: Callable[[Sequence[str]], Conditions] | None = None,
    ) -> None:
        self.is_transformer = getattr(pipe, "transformer", None) is not None
        super().__init__(pipe, pipe.transformer if self.is_transformer else pipe.unet, image_size)
        self.names = getattr(pipe, "labels", None) or {} if names is None else names
        self.encode = encode
        self.conditioned_on = "label" if encode is None else "text"
        config = self.network.config
        found = config.get("num_embeds_ada_norm") if self.is_transformer else config.get("num_class_embeds")
        if encode is None and not found:
            raise ValueError("this network is told neither classes nor texts: it has no num_class_embeds")
        self.num_labels = int(found or 0)

    def patch_side(self) -> int:
        return self.network.config.patch_size if self.is_transformer else 1

    def encode_labels(self, classes: Sequence[str | int]) -> Conditions:
        """Conditions of N classes, given by number or name.

        Raises:
            ValueError: for a class that the model does not have.
        """
        numbers = []
        for one in classes:
            number = self.names.get(one, one) if isinstance(one, str) else one
            if isinstance(number, str) and number.isdecimal():
                number = int(number)
            if isinstance(number, str) or not 0 <= number < self.num_labels:
                raise ValueError(f"class {one!r} is none of the {self.num_labels} classes of this model")
            numbers.append(number)
        return {"class_labels": torch.tensor(numbers, device=self.device)}

    def _encode(self, prompts: list[str]) -> Conditions:
        return self.encode_labels(prompts) if self.encode is None else self.encode(prompts)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Conditions:
        found = self._encode(list(prompts))  # there is no text encoder of the pipeline's that could have been freed
        return {name: one.to(self.dtype) if one.is_floating_point() else one for name, one in found.items()}

    def tokenize(self, prompts: Sequence[str]) -> list[tuple[object, ...]]:
        conditions = self.encode_text(prompts)
        rows = [one.cpu().float().flatten(1).tolist() if one.ndim > 1 else one.tolist() for one in conditions.values()]
        return [tuple(map(str, row)) for row in zip(*rows)]

    def predict(self, z: Tensor, model_times: Tensor, conditions: Conditions) -> Tensor:
        out = self.network(z, timestep=model_times, **conditions, return_dict=False)[0]
        return without_variance(out, z.shape[1])


class BuildAdapter(Protocol):
    def __call__(self, pipe: Any, image_size: int | None = None) -> Adapter: ...


FAMILIES: dict[str, BuildAdapter] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "PixArtAlphaPipeline": PixArt,
    "PixArtSigmaPipeline": PixArt,
    "DiTPipeline": Labelled,
    "DDPMPipeline": Labelled,
    "DDIMPipeline": Labelled,
}
"""By class of the pipeline. The last two are of U-Nets alone, in pixels."""


def build_adapter(pipe: Any, image_size: int | None = None) -> Adapter:
    """The adapter of a pipeline that is in memory.

    Args:
        image_size: side of the pictures in pixels; None for what the model was made for.

    Raises:
        ValueError: for a family that is not known, naming those that are.
    """
    return find_family(type(pipe).__name__)(pipe, image_size)


def find_family(name: str) -> BuildAdapter:
    """The adapter of a class of pipelines.

    Raises:
        ValueError: for one that is not known, naming those that are.
    """
    if name not in FAMILIES:
        raise ValueError(f"there is no adapter for pipelines of the class {name}; known are {', '.join(FAMILIES)}")
    return FAMILIES[name]
