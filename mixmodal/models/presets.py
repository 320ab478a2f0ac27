"""Published model shapes by name; `configs/model/NAME.yaml` says the same for use with `--config`."""

from __future__ import annotations

from mixmodal.models.transformer import TransformerConfig


def _cm3leon(dim: int, num_layers: int, num_heads: int) -> TransformerConfig:
    """CM3Leon, arXiv 2309.02591: OPT-like, without biases, dropout and norm parameters.

    The paper gives neither heads nor feed-forward width: here heads as in OPT of the same width, and 4 times the width.
    """
    return TransformerConfig(
        vocab_size=65031,
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        ffn_dim=4 * dim,
        max_seq_len=4096,
        norm="layernorm",
        activation="gelu",
        position="learned",
        qk_norm=False,
        tie_embeddings=True,
        init_std=0.006,
        zero_init_output=True,
    )


PRESETS: dict[str, TransformerConfig] = {
    "tiny": TransformerConfig(),
    "cm3leon_350m": _cm3leon(1024, 24, 16),
    "cm3leon_760m": _cm3leon(1536, 24, 16),
    "cm3leon_7b": _cm3leon(4096, 32, 32),
    "chameleon_7b": TransformerConfig(
        vocab_size=65536, dim=4096, num_layers=32, num_heads=32, ffn_dim=11008, max_seq_len=4096, dropout=0.1
    ),
    "chameleon_34b": TransformerConfig(
        vocab_size=65536,
        dim=8192,
        num_layers=48,
        num_heads=64,
        num_kv_heads=8,
        ffn_dim=22016,
        max_seq_len=4096,
        norm_placement="post_sublayer",
    ),
}
