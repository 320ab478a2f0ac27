"""All layouts of the Chameleon family give the same network, bit for bit, and come back as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import synthetic_checkpoints as synthetic
import torch
from torch import Tensor

from mixmodal import weights
from mixmodal.interop.chameleon.checkpoint import open_checkpoint
from mixmodal.interop.chameleon.conversion import (
    count_sets,
    cut_shard,
    export_tensors,
    import_tensors,
    read_shape,
    to_halves,
    to_pairs,
)
from mixmodal.interop.chameleon.layouts import LAYOUTS
from mixmodal.models.transformer import Transformer, TransformerConfig

SIZES = {"7b": synthetic.SMALL, "34b": synthetic.SHARDED}


def read(source: Path, **options: Any) -> tuple[TransformerConfig, dict[str, Tensor]]:
    checkpoint = open_checkpoint(source, **options)
    assert checkpoint is not None
    config = read_shape(checkpoint)
    return config, dict(import_tensors(checkpoint, config))


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_four_layouts_give_identical_tensors(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    size = SIZES[name]
    folders = synthetic.write_all(tmp_path, synthetic.draw_state(size, dtype), size)
    if size.shards > 1:
        del folders["anole"]  # has the mean of the norms
    found = {layout: read(folder) for layout, folder in folders.items()}
    configs, states = zip(*found.values())
    assert len(set(configs)) == 1
    assert configs[0].norm_placement == ("post_sublayer" if size.swin else "pre")
    assert (configs[0].max_seq_len, configs[0].num_heads, configs[0].vocab_size) == (64, size.heads, 96)
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        for key, tensor in state.items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, states[0][key]), key
    Transformer(configs[0]).load_state_dict(states[0])


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("swin", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_logits_are_those_of_transformers(name: str, swin: bool, seed: int, tmp_path: Path) -> None:
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    size = SIZES[name]._replace(swin=swin)
    state = synthetic.draw_state(size, seed=seed)
    vq = {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "num_embeddings": 8, "embed_dim": 4}
    config = ChameleonConfig(
        **synthetic.chameleon_config(size), vq_config=vq, vocabulary_map={"<image>": 20, "IMGIMGAZ": 4}
    )
    theirs = ChameleonForConditionalGeneration(config).eval()
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.startswith("model.vqmodel.") for key in missing)
    shape, ours = read(synthetic.write_meta(tmp_path / "meta", state, size))
    network = Transformer(shape).eval()
    network.load_state_dict(ours)
    tokens = torch.randint(5, size.vocab, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, logits = theirs(tokens).logits, network(tokens)
    wanted[..., 4] = logits[..., 4]  # they hide the codes of pictures
    assert wanted.std() > 0.5
    assert (wanted - logits).abs().max() < 1e-5  # worst seen: 6.7e-6


@pytest.mark.parametrize("layout", ["transformers", "transformers-4.43", "anole", "meta"])
@pytest.mark.parametrize("name", SIZES)
def test_every_layout_comes_back_bit_for_bit(layout: str, name: str, tmp_path: Path) -> None:
    size = SIZES[name]
    state = synthetic.draw_state(size, torch.bfloat16)
    folders = synthetic.write_all(tmp_path, state, size)
    config, ours = read(folders[layout])
    num_sets = count_sets(config, ours.__getitem__)
    assert num_sets == (size.shards if layout != "anole" else 1)
    found = dict(export_tensors(LAYOUTS[layout], config, ours.__getitem__, num_sets))
    if layout == "meta":
        shards = synthetic.of_meta(state, size)
        assert {*found, "rope.freqs"} == set(shards[0])
        for rank, shard in enumerate(shards):
            for key, tensor in found.items():
                assert torch.equal(cut_shard(LAYOUTS[layout], key, tensor, rank, size.shards), shard[key]), key
        return
    wanted = {"transformers": state, "transformers-4.43": synthetic.of_shards(state, size)}
    wanted["anole"] = synthetic.of_anole(state, size)
    assert set(found) == set(wanted[layout])
    assert all(torch.equal(tensor, wanted[layout][key]) for key, tensor in found.items())


def test_shards_share_what_may_be_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read by turns: each is closed after its part of the bytes, so that four take no more than one."""
    folder = synthetic.write_meta(tmp_path / "meta", synthetic.draw_state(synthetic.SHARDED), synthetic.SHARDED)
    monkeypatch.setattr(weights, "READ_BYTES", 2 * (folder / "consolidated.00.pth").stat().st_size)
    opened: list[Path] = []
    read_pickle = weights.read_pickle
    monkeypatch.setattr(weights, "read_pickle", lambda path: opened.append(path) or read_pickle(path))
    read(folder)
    assert len(opened) == 2 * 4


def test_what_anole_can_not_hold_is_refused_with_the_reason_unless_it_may_lose(tmp_path: Path) -> None:
    size = synthetic.SHARDED
    state = synthetic.draw_state(size)
    config, ours = read(synthetic.write_meta(tmp_path / "meta", state, size))
    anole = LAYOUTS["anole"]
    with pytest.raises(
        ValueError, match=r"blocks\.0\.attention\.q_norm\.weight: heads have .* stores 1; .*allow_lossy true"
    ):
        dict(export_tensors(anole, config, ours.__getitem__, 4))
    lossy = dict(export_tensors(anole, config, ours.__getitem__, 4, allow_lossy=True))
    wanted = synthetic.of_anole(state, size)
    for key, tensor in lossy.items():
        assert (tensor - wanted[key]).abs().max() < 1e-6, key  # worst seen: 1.2e-7, in another order of the mean


def test_a_model_of_ours_has_a_norm_for_each_head(tmp_path: Path) -> None:
    config = TransformerConfig(vocab_size=9, dim=32, num_heads=4, num_layers=1, ffn_dim=8)
    state = Transformer(config).state_dict()
    assert count_sets(config, state.__getitem__) == 1  # as it is initialised
    state["blocks.0.attention.k_norm.bias"] = torch.rand(4, 8)
    assert count_sets(config, state.__getitem__) == 4


def test_the_orders_of_rows_are_inverses() -> None:
    rows = torch.arange(24).view(24, 1)
    assert to_halves(rows, 8)[:8, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert torch.equal(to_pairs(to_halves(rows, 8), 8), rows)
    assert not torch.equal(to_halves(to_halves(rows, 8), 8), rows)


WRONG = [
    (
        "meta",
        "transformers",
        "layout transformers has a tensor model.embed_tokens.weight, which the checkpoint has not",
    ),
    ("transformers", "meta", "layout meta has a tensor tok_embeddings.weight"),
    ("anole", "transformers", r"self_attn.q_norm.weight of shape \(heads, head_dim\), .* of shape \(8,\): .* anole"),
    ("transformers-4.43", "anole", r"q_norm.weight of shape \(head_dim,\), .* of shape \(1, 8\): .* transformers-4.43"),
    ("transformers", "transformers-4.43", r"q_norm.weight of shape \(shards, head_dim\), .* of shape \(4, 8\)"),
    ("transformers-4.43", "transformers", r"q_norm.weight of shape \(heads, head_dim\), .* of shape \(1, 8\)"),
    ("transformers", "llama", r"llama has no model.layers.0.self_attn.q_norm.weight, and .* has it of shape \(4, 8\)"),
]


@pytest.mark.parametrize(("layout", "forced", "message"), WRONG)
def test_a_wrong_layout_is_refused_with_the_key(layout: str, forced: Any, message: str, tmp_path: Path) -> None:
    size = synthetic.SMALL._replace(kv_heads=2)
    folders = synthetic.write_all(tmp_path, synthetic.draw_state(size), size)
    read(folders[layout], layout=layout)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(folders[layout], layout=forced)


def change(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    data.get("model", data).update(changes)
    path.write_text(json.dumps(data))


def test_damage_is_named_with_file_and_key(tmp_path: Path) -> None:
    size = synthetic.SHARDED
    folder = synthetic.write_meta(tmp_path / "x", synthetic.draw_state(size), size)
    shard = torch.load(folder / "consolidated.02.pth")
    torch.save({key: value for key, value in shard.items() if "w3" not in key}, folder / "consolidated.02.pth")
    with pytest.raises(ValueError, match=r"consolidated\.02\.pth has no tensor layers\.0\.feed_forward\.w3\.weight"):
        open_checkpoint(folder)
    (folder / "consolidated.02.pth").unlink()
    with pytest.raises(ValueError, match=r"consolidated\.02\.pth is missing; there is consolidated\.03\.pth"):
        open_checkpoint(folder)
    (folder / "consolidated.03.pth").unlink()
    with pytest.raises(ValueError, match="model_parallel_size is 4, and there are 2 shards"):
        open_checkpoint(folder)
    folder = synthetic.write_transformers(tmp_path / "y", synthetic.draw_state(size), size)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        open_checkpoint(folder)


def test_missing_and_unknown_tensors_are_listed(tmp_path: Path) -> None:
    size = synthetic.SMALL
    state = synthetic.draw_state(size)
    del state["model.layers.1.mlp.up_proj.weight"]
    state["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    with pytest.raises(ValueError, match=r"1 missing \(model.layers.1.mlp.up_proj.weight\); 1 unknown \(.*q_proj.bias"):
        read(synthetic.write_transformers(tmp_path / "x", state, size))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("layers.1.feed_forward.w2.weight", torch.zeros(32, 40), r"w2.weight have shape .*\(32, 40\)"),
        ("layers.1.attention.wv.weight", torch.zeros(24, 32), r"wv.weight have shape .*\(24, 32\)"),
        (
            "layers.0.attention.wo.weight",
            torch.zeros(32, 32, dtype=torch.int8),
            "wo.weight have shape .* of torch.int8",
        ),
        ("layers.1.attention.q_normalization.weight", torch.zeros(4), r"q_normalization.weight has shape \(1, 4\)"),
        ("layers.1.attention.k_normalization.bias", torch.zeros(3, 8), r"k_normalization.bias has shape \(3, 8\)"),
    ],
)
def test_a_tensor_that_does_not_fit_the_others_is_named(
    name: str, tensor: Tensor, message: str, tmp_path: Path
) -> None:
    size = synthetic.SMALL
    folder = synthetic.write_meta(tmp_path / "x", synthetic.draw_state(size), size)
    torch.save({**torch.load(folder / "consolidated.pth"), name: tensor}, folder / "consolidated.pth")
    with pytest.raises(ValueError, match=message):
        read(folder)


@pytest.mark.parametrize("shape", [(), (0, 8), (4, 0), (2, 2, 2)])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        *(
            f"model.layers.{layer}.self_attn.{part}.weight"
            for layer in (0, 1)
            for part in ("q_proj", "q_norm", "k_norm")
        ),
    ],
)
def test_a_tensor_of_other_dimensions_is_named(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    size = synthetic.SMALL
    state = {**synthetic.draw_state(size), name: torch.zeros(shape)}
    folder = synthetic.write_transformers(tmp_path / "x", state, size)
    with pytest.raises(ValueError, match=rf"{name.rpartition('.')[0]}|k_norm|32 rows of queries"):
        read(folder)


def test_a_model_without_layers_is_refused(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in synthetic.draw_state(synthetic.SMALL).items() if "layers" not in name}
    with pytest.raises(ValueError, match=r"there is no tensor whose name begins with model\.layers\.0\."):
        read(synthetic.write_transformers(tmp_path / "x", state, synthetic.SMALL))


def test_heads_of_odd_width_are_refused(tmp_path: Path) -> None:
    size = synthetic.SMALL
    state = synthetic.draw_state(size)
    for name in synthetic.NORMS:
        for layer in range(size.layers):
            state[f"model.layers.{layer}.{name}"] = torch.ones(32, 1)
    folder = synthetic.write_transformers(tmp_path / "x", state, size, num_attention_heads=32, num_key_value_heads=32)
    with pytest.raises(ValueError, match="32 rows of queries and 32 of keys do not make heads of width 1"):
        read(folder)


def test_shards_that_differ_in_shape_are_named(tmp_path: Path) -> None:
    size = synthetic.SHARDED
    folder = synthetic.write_meta(tmp_path / "x", synthetic.draw_state(size), size)
    shard = torch.load(folder / "consolidated.01.pth")
    torch.save({**shard, "norm.weight": torch.ones(3)}, folder / "consolidated.01.pth")
    with pytest.raises(ValueError, match=r"consolidated\.01\.pth: norm\.weight has shape \(3,\), not \(64,\)"):
        open_checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_that_shards_hold_alike_are_averaged_where_they_differ(dtype: torch.dtype, tmp_path: Path) -> None:
    size = synthetic.SHARDED
    state = synthetic.draw_state(size, dtype)
    folder = synthetic.write_meta(tmp_path / "x", state, size)
    copies = torch.rand(4, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    for rank, copy in enumerate(copies):
        path = folder / f"consolidated.{rank:02}.pth"
        torch.save({**torch.load(path), "layers.1.ffn_norm.weight": copy}, path)
    tensors = read(folder)[1]
    assert torch.equal(tensors["blocks.1.ffn_norm.weight"], copies.float().mean(0).to(dtype))


def test_two_models_in_a_download_must_be_told_apart(tmp_path: Path) -> None:
    size = synthetic.SMALL
    for name in ("7b", "other"):
        synthetic.write_meta(tmp_path / "models" / name, synthetic.draw_state(size), size)
    with pytest.raises(ValueError, match=r"holds 2 models \(.*7b, .*other\); give one of them"):
        open_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path / "models" / "7b") is not None
    (tmp_path / "models" / "other" / "consolidated.pth").rename(tmp_path / "models" / "other" / "consolidated-old.pth")
    found = open_checkpoint(tmp_path)
    assert found is not None
    assert found.folder == tmp_path / "models" / "7b"


def test_a_number_of_sets_that_is_not_the_stated_number_of_shards_is_refused(tmp_path: Path) -> None:
    """`q_norm.weight` of (2, 8) where the config says 4 shards is of no known layout."""
    size = synthetic.SHARDED._replace(shards=2)
    state = synthetic.of_shards(synthetic.draw_state(size), size)
    folder = synthetic.write_transformers(tmp_path / "x", state, size)
    read(folder)
    change(folder / "config.json", model_parallel_size=4)
    with pytest.raises(ValueError, match=r"q_norm.weight has shape \(2, 8\) .* in no known layout with 4 shards"):
        open_checkpoint(folder)


def test_as_many_shards_as_heads_is_either_layout(tmp_path: Path) -> None:
    size = synthetic.SMALL._replace(shards=4)
    state = synthetic.draw_state(size)
    folder = synthetic.write_transformers(tmp_path / "x", synthetic.of_shards(state, size), size)
    found, forced = (read(folder, layout=layout)[1] for layout in (None, "transformers-4.43"))
    assert all(torch.equal(forced[name], tensor) for name, tensor in found.items())


def test_tables_that_old_checkpoints_hold_are_not_needed(tmp_path: Path) -> None:
    size = synthetic.SMALL
    state = synthetic.draw_state(size)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    state["model.rotary_emb.inv_freq"] = torch.ones(4)
    read(synthetic.write_transformers(tmp_path / "x", state, size))


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    folder = synthetic.write_meta(tmp_path / "x", synthetic.draw_state(synthetic.SMALL), synthetic.SMALL)
    marker = tmp_path / "ran"

    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (marker,)

    torch.save({"tok_embeddings.weight": Code()}, folder / "consolidated.pth")
    with pytest.raises(ValueError, match=r"consolidated\.pth can not be read without running code"):
        open_checkpoint(folder)
    assert not marker.exists()
