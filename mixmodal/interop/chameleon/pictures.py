"""An image tokenizer of ours as the VQGAN that Chameleon's code and transformers read, where its shape is one's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mixmodal.interop.vqgan_names import CODEBOOK, TAMING, names
from mixmodal.tokenization.autoencoder import AutoencoderConfig
from mixmodal.tokenization.image import ImageTokenizer
from mixmodal.tokenization.quantizer_base import QuantizerConfig

FIXED_AUTOENCODER: Mapping[str, Any] = {
    "patch_size": 1,
    "resample": "conv",
    "mid_blocks": ("res", "attention", "res"),
    "norm_groups": 32,
    "norm_eps": 1e-6,
}
"""What can not be chosen in their code."""


def find_obstacle(autoencoder: AutoencoderConfig, quantizer: QuantizerConfig) -> str | None:
    """The key and value for which Chameleon's VQGAN can not hold an image tokenizer; None where it can."""
    if quantizer.kind != "vq":
        return f"quantizer.kind is {quantizer.kind}, and theirs is vq"
    for key, wanted in FIXED_AUTOENCODER.items():
        found = getattr(autoencoder, key)
        if found != wanted:
            return f"autoencoder.{key} is {found}, and theirs is {wanted}"
    depth, decoder_depth = autoencoder.num_res_blocks, autoencoder.num_decoder_res_blocks
    if not isinstance(depth, int) or not isinstance(decoder_depth, int):
        return "the number of ResBlocks differs between stages, and theirs does not"
    if decoder_depth != depth + 1:
        return f"autoencoder.num_decoder_res_blocks is {decoder_depth}, and theirs is num_res_blocks + 1"
    if autoencoder.decoder_channels not in (0, autoencoder.channels):
        return f"autoencoder.decoder_channels is {autoencoder.decoder_channels}, and theirs is channels"
    if any(multiplier != int(multiplier) for multiplier in autoencoder.channel_multipliers):
        return "autoencoder.channel_multipliers are no whole numbers, as theirs are"
    return None


def to_vqgan(tokenizer: ImageTokenizer) -> dict[str, Tensor]:
    """Weights under Chameleon's names: of the encoder and the codebook, and of the decoder where there is one.

    Where ours goes without the 1x1 convolutions around the quantizer, they get the identity.
    """
    config, state = tokenizer.config.autoencoder, tokenizer.state_dict()
    modules = dict(names(TAMING, config))
    found = {CODEBOOK: tokenizer.quantizer.codebook().detach()}  # type: ignore[operator]
    for name, tensor in state.items():
        module, _, part = name.rpartition(".")
        if module in modules and not name.startswith("quantizer."):
            found[f"{modules[module]}.{part}"] = tensor.detach()
    for name in ("quant_conv", "post_quant_conv"):
        if f"{name}.weight" not in found:
            width = found[CODEBOOK].shape[1] if not config.latent_channels else config.latent_channels
            found[f"{name}.weight"] = torch.eye(width)[..., None, None].to(tokenizer.dtype)
            found[f"{name}.bias"] = torch.zeros(width, dtype=tokenizer.dtype)
    return {name: tensor.cpu().contiguous() for name, tensor in found.items()}


def describe_vqgan(tokenizer: ImageTokenizer) -> dict[str, Any]:
    """Their words for its shape: `vq_config` of transformers, without the two that they call otherwise in Anole."""
    config, quantizer = tokenizer.config.autoencoder, tokenizer.config.quantizer
    size = tokenizer.config.image_size
    return {
        "embed_dim": quantizer.codebook_dim,
        "num_embeddings": tokenizer.codebook_size,
        "resolution": size,
        "in_channels": 3,
        "base_channels": config.channels,
        "channel_multiplier": [int(multiplier) for multiplier in config.channel_multipliers],
        "num_res_blocks": config.num_res_blocks,
        "attn_resolutions": [size // 2**stage for stage in config.attention_stages] or None,
        "dropout": 0.0,
        "attn_type": "vanilla",
        "double_latent": False,
        "latent_channels": config.latent_channels or quantizer.codebook_dim,
    }


def in_yaml(tokenizer: ImageTokenizer) -> dict[str, Any]:
    """The content of Chameleon's vqgan.yaml."""
    shape = describe_vqgan(tokenizer)
    return {
        "model": {
            "params": {
                "embed_dim": shape["embed_dim"],
                "n_embed": shape["num_embeddings"],
                "ddconfig": {
                    "double_z": False,
                    "z_channels": shape["latent_channels"],
                    "resolution": shape["resolution"],
                    "in_channels": 3,
                    "out_ch": 3,
                    "ch": shape["base_channels"],
                    "ch_mult": shape["channel_multiplier"],
                    "num_res_blocks": shape["num_res_blocks"],
                    "attn_resolutions": shape["attn_resolutions"] or [],
                    "dropout": 0.0,
                },
            }
        }
    }
