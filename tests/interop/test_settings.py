"""What weights do not show is read from the JSON file beside them, as transformers and Meta's loader read it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import synthetic_checkpoints as synthetic
from test_conversion import change, read

from mixmodal.interop.chameleon.checkpoint import open_checkpoint


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ("transformers", {"model_type": "gemma"}, r"config\.json: model_type is 'gemma'"),
        ("transformers", {"hidden_act": "gelu"}, r"config\.json: hidden_act is 'gelu'"),
        ("transformers", {"rope_scaling": {"factor": 2}}, r"config\.json: rotary positions are scaled"),
        ("transformers", {"rope_parameters": {"rope_type": "yarn"}}, r"config\.json: rotary positions are scaled"),
        (
            "transformers",
            {"rope_scaling": {"type": "linear", "factor": 2}},
            r"config\.json: rotary positions are scaled",
        ),
        ("transformers", {"rope_parameters": 3}, r"config\.json: rope_parameters is 3; an object is needed"),
        ("transformers", {"rope_parameters": {"full": {"rope_theta": 3.0}}}, "rope_parameters is .*, the same for all"),
        ("transformers", {"rms_norm_eps": -1.0}, r"config\.json: rms_norm_eps is -1\.0; a number above 0"),
        ("transformers", {"rope_theta": 0}, r"config\.json: rope_theta is 0"),
        ("transformers", {"rope_theta": float("inf")}, r"config\.json: rope_theta is inf"),
        ("transformers", {"rope_theta": float("nan")}, r"config\.json: rope_theta is nan"),
        (
            "transformers",
            {"max_position_embeddings": 1 << 40},
            r"config\.json: max_position_embeddings is 1099511627776",
        ),
        ("meta", {"norm_eps": 0}, r"params\.json: norm_eps is 0"),
        ("meta", {"max_seq_len": 0}, r"params\.json: max_seq_len is 0"),
        ("transformers", {"partial_rotary_factor": 0.5}, r"config\.json: partial_rotary_factor is 0\.5"),
        ("transformers", {"mlp_bias": True}, r"config\.json: mlp_bias is True"),
        ("transformers", {"quantization_config": {"bits": 4}}, r"config\.json: quantization_config is"),
        ("transformers", {"num_hidden_layers": True}, r"config\.json: num_hidden_layers is True; int is needed"),
        ("transformers", {"hidden_size": 64}, r"config\.json: dim is 64 there, and 32 in the weights"),
        ("transformers", {"max_position_embeddings": "many"}, r"config\.json: max_position_embeddings is 'many'"),
        ("meta", {"swin_norm": None}, r"params\.json: the key swin_norm is missing"),
        ("meta", {"n_heads": 8}, r"params\.json: num_heads is 8 there, and 4 in"),
        ("meta", {"qk_normalization": False}, "qk_normalization is false"),
    ],
)
def test_a_config_that_does_not_fit_is_named(layout: str, changes: dict, message: str, tmp_path: Path) -> None:
    size = synthetic.SMALL
    folder = synthetic.write_all(tmp_path, synthetic.draw_state(size), size)[layout]
    change(next(folder.glob("[cp]*[gs].json")) if layout == "transformers" else folder / "params.json", **changes)
    with pytest.raises(ValueError, match=message):
        read(folder)


@pytest.mark.parametrize(
    ("changes", "theta"),
    [
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_parameters": {"rope_theta": 7.0}}, 7.0),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, 7.0),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "default"}}, 5e5),
    ],
)
def test_rotary_settings_are_those_that_transformers_reads(changes: dict, theta: float, tmp_path: Path) -> None:
    from transformers import ChameleonConfig

    size = synthetic.SMALL
    folder = synthetic.write_transformers(tmp_path / "x", synthetic.draw_state(size), size, **changes)
    assert ChameleonConfig.from_pretrained(folder).rope_parameters["rope_theta"] == theta  # type: ignore[index]
    assert read(folder)[0].rope_theta == theta


def test_what_a_file_of_transformers_leaves_out_has_the_defaults_of_transformers(tmp_path: Path) -> None:
    from transformers import ChameleonConfig, LlamaConfig

    size = synthetic.SMALL
    state = synthetic.draw_state(size)
    llama = {name: tensor for name, tensor in state.items() if not any(norm in name for norm in synthetic.NORMS)}
    for kind, defaults, tensors in (("chameleon", ChameleonConfig(), state), ("llama", LlamaConfig(), llama)):
        folder = synthetic.write_transformers(tmp_path / kind, tensors, size)
        (folder / "config.json").write_text(json.dumps({"model_type": kind, "num_attention_heads": size.heads}))
        config = read(folder)[0]
        assert config.norm_eps == defaults.rms_norm_eps
        assert config.max_seq_len == defaults.max_position_embeddings
        assert config.rope_theta == defaults.rope_parameters["rope_theta"]  # type: ignore[index]


def test_a_size_that_meta_leaves_open_is_read_from_the_weights(tmp_path: Path) -> None:
    size = synthetic.SMALL
    folder = synthetic.write_meta(tmp_path / "x", synthetic.draw_state(size), size)
    change(folder / "params.json", vocab_size=-1, n_kv_heads=None)
    assert read(folder)[0].vocab_size == size.vocab


def test_meta_settings_are_read_in_the_order_of_its_loader(tmp_path: Path) -> None:
    """The file, its section `model`, and then consolidate_params.json, each over the ones before."""
    size = synthetic.SMALL
    folder = synthetic.write_meta(tmp_path / "x", synthetic.draw_state(size), size)
    data = json.loads((folder / "params.json").read_text())
    del data["model"]["swin_norm"]
    data["model"]["norm_eps"] = 1e-4
    (folder / "params.json").write_text(json.dumps({"swin_norm": True, "rope_theta": 3.0, **data}))
    (folder / "consolidate_params.json").write_text(json.dumps({"model_parallel_size": 1, "norm_eps": 1e-3}))
    config = read(folder)[0]
    assert (config.norm_placement, config.norm_eps, config.rope_theta) == ("post_sublayer", 1e-3, 10000.0)


@pytest.mark.parametrize("layout", ["meta", "anole", "transformers-4.43", "transformers"])
def test_an_output_that_is_not_there_is_missing_unless_the_config_ties_it(layout: str, tmp_path: Path) -> None:
    size = synthetic.SMALL
    state = synthetic.draw_state(size)
    del state["lm_head.weight"]
    folder = synthetic.write_all(tmp_path, state, size)[layout]
    with pytest.raises(ValueError, match=r"1 missing \((output|lm_head)\.weight\)"):
        read(folder)
    if layout != "meta":
        change(folder / "config.json", tie_word_embeddings=True)
        config, tensors = read(folder)
        assert config.tie_embeddings
        assert "output.weight" not in tensors


def test_without_a_config_the_place_of_norms_must_be_said(tmp_path: Path) -> None:
    size = synthetic.SMALL
    folder = synthetic.write_meta(tmp_path / "x", synthetic.draw_state(size), size)
    (folder / "params.json").unlink()
    with pytest.raises(ValueError, match=r"params\.json is missing: .* --norm_placement"):
        open_checkpoint(folder)
    assert read(folder, norm_placement="post_sublayer")[0].norm_placement == "post_sublayer"
