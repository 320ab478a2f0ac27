"""Pictures a second to codes and back: ours, VQModel of diffusers and ChameleonVQVAE of transformers, same weights.

python benchmarks/measure_image_tokenizer.py [--repeats 10] [--image_size 256 --channels 128 --batch_size 2]

The shape is LlamaGen's VQ-16 (two ResBlocks a stage, attention in the last, 16384 codes of 8 dimensions). The three
take turns, so that what else the machine does meets all of them. All compute in float32; on a GPU ours is measured
compiled and in bfloat16 as well, with the codebook in float32. Speed is measured on pictures in channels_last, which is
the faster layout for all three; codes are compared on contiguous pictures, the layout that the others are given by
default, since torch's GroupNorm sums flat pictures less exactly in channels_last on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import record
from torch import Tensor

from mixmodal.data.synthetic import synthetic_pairs
from mixmodal.interop.vqgan import load_vqgan
from mixmodal.interop.vqgan_names import TAMING, names
from mixmodal.tokenization.image import ImageTokenizer

MULTIPLIERS = (1, 1, 2, 2, 4)
LATENT_CHANNELS, CODES, DIM = 256, 16384, 8
PICTURES = 32
"""Whose codes are compared."""


def draw_images(batch_size: int, image_size: int) -> Tensor:
    """Synthetic pictures, float32 `(B, 3, H, W)` in [-1, 1]."""
    pictures = [np.asarray(pair.picture) for pair in synthetic_pairs(batch_size, image_size, seed=0)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def build_diffusers(channels: int, images: Tensor) -> Any:
    """A random model; its codebook lies where its latents of `images` do, so that many codes are met."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import VQModel

    plain = len(MULTIPLIERS) - 1
    model = VQModel(
        down_block_types=("DownEncoderBlock2D",) * plain + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * plain,
        block_out_channels=tuple(channels * multiplier for multiplier in MULTIPLIERS),
        layers_per_block=2,
        latent_channels=LATENT_CHANNELS,
        num_vq_embeddings=CODES,
        vq_embed_dim=DIM,
    ).eval()
    latents = model.encode(images).latents.movedim(1, -1).flatten(0, -2)
    noise = torch.randn(CODES, DIM)
    model.quantize.embedding.weight.copy_(latents.mean(0) + latents.std(0) * noise)
    return model


def build_chameleon(own: ImageTokenizer) -> Any:
    """transformers' encoder with the weights of ours."""
    from transformers import ChameleonVQVAE, ChameleonVQVAEConfig

    autoencoder, size = own.config.autoencoder, own.config.image_size
    model = ChameleonVQVAE(
        ChameleonVQVAEConfig(
            embed_dim=DIM,
            num_embeddings=CODES,
            latent_channels=LATENT_CHANNELS,
            resolution=size,
            base_channels=autoencoder.channels,
            channel_multiplier=list(MULTIPLIERS),
            attn_resolutions=[size // autoencoder.downsampling],
        )
    )
    theirs = dict(names(TAMING, autoencoder))
    state = {}
    for name, tensor in own.state_dict().items():
        module, _, part = name.rpartition(".")
        state[f"{theirs[module]}.{part}"] = tensor
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model.eval()


def compiled(own: ImageTokenizer) -> ImageTokenizer:
    """Convolutions in bfloat16 and fused by the compiler; the codebook stays in float32."""
    fast = copy.deepcopy(own)
    for half in (fast.encoder, fast.decoder):
        half.to(torch.bfloat16, memory_format=torch.channels_last)
        half.compile()
    return fast


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def take_turns(functions: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each function in each round; two rounds come before, for compilers and caches."""
    rounds = [{name: seconds(call, device) for name, call in functions.items()} for _ in range(repeats + 2)]
    return {name: [found[name] for found in rounds[2:]] for name in functions}


def agreement(one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], batches: list[Tensor]) -> float:
    """Share of places with the same code."""
    return float(torch.cat([(one(batch).flatten() == other(batch).flatten()).float() for batch in batches]).mean())


@torch.no_grad()
def main(arguments: argparse.Namespace, device: torch.device) -> None:
    torch.manual_seed(0)
    pictures = draw_images(PICTURES, arguments.image_size)
    images = pictures[: arguments.batch_size].contiguous(memory_format=torch.channels_last)
    diffusers = build_diffusers(arguments.channels, images)
    with tempfile.TemporaryDirectory() as folder:
        diffusers.save_pretrained(folder)
        own = load_vqgan(Path(folder), arguments.image_size).tokenizer.to(device)
    diffusers, chameleon, images = diffusers.to(device), build_chameleon(own).to(device), images.to(device)

    def diffusers_codes(images: Tensor) -> Tensor:
        return diffusers.quantize(diffusers.encode(images).latents)[2][2]

    def chameleon_codes(images: Tensor) -> Tensor:
        return chameleon.encode(images).image_tokens

    torch.backends.cudnn.allow_tf32 = False  # equal codes are asked for in float32
    batches = [*pictures.contiguous().to(device).split(arguments.batch_size)]
    shares = {
        "diffusers.VQModel": agreement(own.encode, diffusers_codes, batches),
        "transformers.ChameleonVQVAE": agreement(own.encode, chameleon_codes, batches),
    }
    codes = own.encode(images)
    torch.backends.cudnn.allow_tf32 = True
    latents = own.quantizer.codes_to_latents(codes)
    encoders: dict[str, Callable[[], Any]] = {
        "ours": lambda: own.encode(images),
        "diffusers.VQModel": lambda: diffusers_codes(images),
        "transformers.ChameleonVQVAE": lambda: chameleon_codes(images),
    }
    decoders: dict[str, Callable[[], Any]] = {
        "ours": lambda: own.decode(codes),
        "diffusers.VQModel": lambda: diffusers.decode(latents, force_not_quantize=True).sample,
    }
    if device.type == "cuda":
        fast = compiled(own)
        encoders["ours, compiled bfloat16"] = lambda: fast.encode(images)
        decoders["ours, compiled bfloat16"] = lambda: fast.decode(codes)
        shares["ours, compiled bfloat16"] = agreement(own.encode, fast.encode, batches)
    settings = {
        "image_size": arguments.image_size,
        "batch_size": arguments.batch_size,
        "pictures_compared": len(pictures),
        "channels": arguments.channels,
        "channel_multipliers": list(MULTIPLIERS),
        "precision": "float32",
        "num_threads": torch.get_num_threads(),
        "different_codes": len(torch.cat([own.encode(batch).flatten() for batch in batches]).unique()),
        **{f"{name}_version": __import__(name).__version__ for name in ("diffusers", "transformers")},
    }
    for what, functions in (("encode", encoders), ("decode", decoders)):
        record_speeds(what, take_turns(functions, arguments.repeats, device), device, settings)
    for name, share in shares.items():
        subject = f"codes of ours in float32 equal to those of {name}"
        record("image_tokenizer", subject, [100 * share], "%", device.type, settings)


def record_speeds(what: str, found: dict[str, list[float]], device: torch.device, settings: dict[str, Any]) -> None:
    """Pictures a second of each of those that took turns, and how many times as fast ours is as others."""
    for name, times in found.items():
        rates = [settings["batch_size"] / spent for spent in times]
        record("image_tokenizer", f"{what}, {name}", rates, "pictures/s", device.type, settings)
    for name in [name for name in found if not name.startswith("ours")]:
        for own_name in [name for name in found if name.startswith("ours")]:
            ratios = [spent / own_spent for spent, own_spent in zip(found[name], found[own_name])]
            record("image_tokenizer", f"{what}, {own_name} over {name}", ratios, "times", device.type, settings)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--image_size", type=int, default=256)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=32 if on_gpu else 2)
    main(parser.parse_args(), torch.device("cuda" if on_gpu else "cpu"))
