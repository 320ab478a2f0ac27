"""Logits and gradients against transformers' Chameleon, on tiny random weights."""

import pytest
import torch
import torch.nn.functional as F
from transformers import ChameleonConfig, ChameleonForConditionalGeneration, ChameleonVQVAEConfig

from mixmodal.models.transformer import Transformer, TransformerConfig

SIZES = {"vocab_size": 96, "dim": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 48}


def theirs(post_sublayer: bool) -> ChameleonForConditionalGeneration:
    config = ChameleonConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        swin_norm=post_sublayer,
        vocabulary_map={"<image>": 5, "IMGIMGAZ": 4},
        vq_config=ChameleonVQVAEConfig(
            embed_dim=8, num_embeddings=4, latent_channels=8, resolution=16, base_channels=32, channel_multiplier=[1]
        ).to_dict(),
        attn_implementation="sdpa",
    )
    model = ChameleonForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if "vqmodel" not in name:
            torch.nn.init.normal_(parameter, 0.5 if "norm" in name else 0.0, 0.5 if "norm" in name else 0.2)
    return model


def ours(model: ChameleonForConditionalGeneration, post_sublayer: bool) -> Transformer:
    placement = "post_sublayer" if post_sublayer else "pre"
    network = Transformer(TransformerConfig(**SIZES, norm_placement=placement))
    network.load_state_dict(from_theirs(model.state_dict()))
    return network


def from_theirs(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names for the language model's tensors; also used on gradients."""
    tree = {
        "embedding.weight": state["model.embed_tokens.weight"],
        "norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for layer in range(SIZES["num_layers"]):
        old, new = f"model.layers.{layer}.", f"blocks.{layer}."
        tree[new + "attention.qkv.weight"] = torch.cat([state[f"{old}self_attn.{x}_proj.weight"] for x in "qkv"])
        tree[new + "attention.out.weight"] = state[old + "self_attn.o_proj.weight"]
        for norm in ("q_norm", "k_norm"):
            for kind in ("weight", "bias"):
                tree[f"{new}attention.{norm}.{kind}"] = state[f"{old}self_attn.{norm}.{kind}"]
        tree[new + "ffn.up.weight"] = torch.cat([state[f"{old}mlp.{x}_proj.weight"] for x in ("gate", "up")])
        tree[new + "ffn.out.weight"] = state[old + "mlp.down_proj.weight"]
        tree[new + "attention_norm.weight"] = state[old + "input_layernorm.weight"]
        tree[new + "ffn_norm.weight"] = state[old + "post_attention_layernorm.weight"]
    return tree


@pytest.mark.parametrize("post_sublayer", [False, True], ids=["chameleon_7b", "chameleon_34b"])
def test_logits_and_gradients_equal_those_of_transformers(post_sublayer: bool) -> None:
    torch.manual_seed(0)
    model = theirs(post_sublayer)
    network = ours(model, post_sublayer)
    tokens = torch.randint(6, 96, (3, 20))
    columns = slice(6, 96)  # theirs masks the logits of image codes
    expected = model(input_ids=tokens).logits[..., columns].float()
    found = network(tokens)[..., columns]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)  # worst seen 8e-7

    for logits in (expected, found):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten() - columns.start).backward()
    gradients = {
        name: torch.zeros_like(value) if value.grad is None else value.grad for name, value in model.named_parameters()
    }
    for name, gradient in from_theirs(gradients).items():
        mine = dict(network.named_parameters())[name].grad
        torch.testing.assert_close(
            mine, gradient, atol=2e-6, rtol=1e-4, msg=lambda text, at=name: f"{at}: {text}"
        )  # worst seen 2e-7
