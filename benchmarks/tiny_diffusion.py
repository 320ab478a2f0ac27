"""Tiny pipelines of diffusers with random weights, one a family, made without a hub: for tests and benchmarks.

What a pipeline hands to its scheduler is kept by `spy_on_steps`, and asked of an adapter again by `replay`.

python benchmarks/tiny_diffusion.py FAMILY DIR      saves one as a folder
"""

from __future__ import annotations

import argparse
import string
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixmodal.classification.adapter_base import Adapter
from mixmodal.classification.adapters import Flux, build_adapter, unpack
from mixmodal.classification.denoising import Flow

PROMPTS = ["a photo of a cat.", "a red apple"]

WORDS = ("a", "photo", "of", "cat", "dog", "red", "blue", "apple", "pear", ".")
UNET_BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
VAE_BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
}
STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def clip_tokenizer() -> Any:
    """Letters and words, 16 tokens a prompt."""
    from transformers import CLIPTokenizer

    marks = ["<|startoftext|>", "<|endoftext|>"]
    letters = [*string.ascii_lowercase, "."]
    merges, vocabulary = [], [*letters, *(f"{letter}</w>" for letter in letters)]
    for word in WORDS:
        built = word[0]
        for place, letter in enumerate(word[1:], start=1):
            last = letter + "</w>" if place == len(word) - 1 else letter
            if (built, last) not in merges:
                merges.append((built, last))
                vocabulary.append(built + last)
            built += last
    vocab = {token: number for number, token in enumerate(dict.fromkeys([*vocabulary, *marks]))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16)


def t5_tokenizer() -> Any:
    """Words and nothing else."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocab = {token: number for number, token in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])  # pyright: ignore
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def clip_encoder(tokenizer: Any, projected: bool = False, dim: int = 32) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        intermediate_size=2 * dim,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        projection_dim=dim,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5_encoder(tokenizer: Any, dim: int = 32) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=len(tokenizer), d_model=dim, d_kv=8, d_ff=2 * dim, num_layers=2, num_heads=4)
    return T5EncoderModel(config).eval()


def vae(channels: int = 4, **settings: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 16),
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=32,
        **VAE_BLOCKS,
        **settings,
    ).eval()


def stable_diffusion(prediction: str = "epsilon") -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    tokenizer = clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=32,
        attention_head_dim=8,
        **UNET_BLOCKS,
    )
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler(**STABLE, prediction_type=prediction, steps_offset=1, clip_sample=False),
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    tokenizer = clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=64,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
        **UNET_BLOCKS,
    )
    return StableDiffusionXLPipeline(
        vae=vae(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.1, 0.9, 1.3, 1.0]),
        text_encoder=clip_encoder(tokenizer),
        text_encoder_2=clip_encoder(tokenizer, projected=True),
        tokenizer=tokenizer,
        tokenizer_2=clip_tokenizer(),
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(**STABLE, steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
    )


def stable_diffusion_3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    tokenizer, long_tokenizer = clip_tokenizer(), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=16,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=clip_encoder(tokenizer, projected=True),
        tokenizer=tokenizer,
        text_encoder_2=clip_encoder(tokenizer, projected=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(long_tokenizer, dim=64),
        tokenizer_3=long_tokenizer,
    )


def flux(guidance_embeds: bool = True) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    tokenizer, long_tokenizer = clip_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=guidance_embeds),
        vae=vae(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=clip_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5_encoder(long_tokenizer),
        tokenizer_2=long_tokenizer,
        transformer=transformer.eval(),
    )
    pipe.default_sample_size = 16
    return pipe


def pixart() -> Any:
    from diffusers import DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    tokenizer = t5_tokenizer()
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        caption_channels=32,
        sample_size=16,
        norm_num_groups=4,
        use_additional_conditions=False,
    )
    return PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=t5_encoder(tokenizer),
        vae=vae(),
        transformer=transformer.eval(),
        scheduler=DDIMScheduler(clip_sample=False),  # pyright: ignore[reportArgumentType]
    )


def dit() -> Any:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=16,
        num_embeds_ada_norm=1000,
        norm_num_groups=4,
    )
    return DiTPipeline(
        transformer=transformer.eval(),
        vae=vae(),
        scheduler=DDIMScheduler(clip_sample=False),  # pyright: ignore[reportArgumentType]
        id2label={"0": "cat, house cat", "1": "dog"},
    )


FAMILIES: dict[str, Callable[[], Any]] = {
    "sd_epsilon": stable_diffusion,
    "sd_velocity": lambda: stable_diffusion("v_prediction"),
    "sdxl_euler": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "flux_dev": flux,
    "flux_schnell": lambda: flux(guidance_embeds=False),
    "pixart": pixart,
    "dit": dit,
}


def build(family: str, seed: int = 0) -> Any:
    """A pipeline of the family on the CPU in float32, in evaluation mode, quiet; weights depend on the seed alone."""
    torch.manual_seed(seed)
    pipe = FAMILIES[family]()
    for model in pipe.components.values():
        if isinstance(model, torch.nn.Module):
            for name, weight in model.named_parameters():
                if weight.ndim > 1 and not weight.any():  # what starts at zero would hide conditions and times
                    torch.nn.init.normal_(weight, std=0.05)
                elif "scale_shift_table" in name:
                    torch.nn.init.normal_(weight, std=0.3)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Step(NamedTuple):
    """What a pipeline handed to `scheduler.step`, as its denoiser saw it."""

    out: Tensor
    time: Tensor
    z: Tensor


def spy_on_steps(pipe: Any) -> list[Step]:
    """The three steps of a pipeline that draws both prompts without guidance; its scheduler is left as it was."""
    steps: list[Step] = []
    step, scheduler = pipe.scheduler.step, pipe.scheduler

    def spying(out: Tensor, time: Tensor, z: Tensor, *arguments: Any, **options: Any) -> Any:
        seen = z
        if "Euler" in type(scheduler).__name__ and "Flow" not in type(scheduler).__name__:
            seen = z / (scheduler.sigmas[scheduler.step_index] ** 2 + 1) ** 0.5
        steps.append(Step(out.clone(), torch.as_tensor(time), seen.clone()))
        return step(out, time, z, *arguments, **options)

    options: dict[str, Any] = {"prompt": PROMPTS, "output_type": "latent", "guidance_scale": 1.0}
    if type(pipe).__name__ == "DiTPipeline":
        options = {"class_labels": [0, 1], "output_type": "pt", "guidance_scale": 1.0}
    if type(pipe).__name__.startswith("PixArt"):
        options["use_resolution_binning"] = False
    scheduler.step = spying
    try:
        with torch.no_grad():
            pipe(**options, num_inference_steps=3, generator=torch.Generator().manual_seed(0))
    finally:
        del scheduler.step  # the method of its class is back
    if isinstance(build_adapter(pipe), Flux):
        steps = [Step(unpack(one.out, 8, 8), one.time, unpack(one.z, 8, 8)) for one in steps]
    return steps


def conditions_of(adapter: Adapter) -> dict[str, Tensor]:
    """Both prompts, or the first two labels."""
    return adapter.encode_text(PROMPTS if adapter.conditioned_on == "text" else ["0", "1"])


@torch.no_grad()
def replay(adapter: Adapter, step: Step, conditions: dict[str, Tensor], backwards: bool = False) -> float:
    """The largest difference between the pipeline's output and the adapter's, at the schedule's time of the step."""
    shares = (step.time.double() + (0 if isinstance(adapter.schedule, Flow) else 0.5)) / 1000
    shares = 1 - shares if backwards else shares
    mix = adapter.schedule.mix(shares.clamp(max=1 - 1e-12).expand(2).numpy())
    return float((adapter.predict(step.z, mix.model_times, conditions) - step.out).abs().max())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("folder")
    arguments = parser.parse_args()
    build(arguments.family).save_pretrained(arguments.folder)
