"""`mixmodal export` writes what transformers loads, and every layout comes back through both commands."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest
import synthetic_checkpoints as synthetic
import torch
from PIL import Image as PIL
from synthetic_download import write_download
from test_importing import fails, run

import mixmodal
from mixmodal.document import build_format
from mixmodal.interop.chameleon.checkpoint import open_checkpoint
from mixmodal.interop.chameleon.conversion import read_shape
from mixmodal.interop.chameleon.pictures import describe_vqgan, find_obstacle, in_yaml
from mixmodal.interop.chameleon.writing import gather_export, in_meta_words, write_exported
from mixmodal.interop.export import describe_model, save_export
from mixmodal.models.transformer import Transformer, TransformerConfig, save_weights
from mixmodal.pipeline import MixedModal
from mixmodal.tokenization.autoencoder import AutoencoderConfig
from mixmodal.tokenization.image import ImageTokenizer, ImageTokenizerConfig
from mixmodal.tokenization.quantizer_base import QuantizerConfig
from mixmodal.tokenization.text import TextTokenizer
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

SIZES = {"vocab_size": 0, "dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 48}


def perturb(model: Transformer) -> Transformer:
    """Norms that differ between heads, as training makes them, and logits that differ."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def write_own(folder: Path, tokenizers: Path, vqgan: bool = True, **changes: Any) -> Path:
    """An exported model as training writes it, with a picture tokenizer of Chameleon's shape or the demo's."""
    text, images = tokenizers / "text.model", tokenizers / "image"
    if vqgan:
        config = ImageTokenizerConfig(
            image_size=16,
            autoencoder=AutoencoderConfig(channels=32, channel_multipliers=(1, 1, 2), latent_channels=16),
            quantizer=QuantizerConfig(kind="vq", codebook_size=40, codebook_dim=8, update="gradient"),
        )
        torch.manual_seed(1)
        images = folder.parent / "image"
        ImageTokenizer(config).save(images)
    codes, pieces = ImageTokenizer.load(images).codebook_size, TextTokenizer.load(text).num_pieces
    sizes = VocabularyConfig(codebook_sizes={"image": codes}, num_text_pieces=pieces, num_sentinels=8)
    vocabulary = Vocabulary(sizes)
    model = perturb(Transformer(TransformerConfig(**{**SIZES, "vocab_size": vocabulary.size, **changes})))
    save_export(folder, model, build_format("chameleon", vocabulary, {"image": (4, 4)}), text, images, {})
    return folder


def test_a_tokenizer_without_decoder_loads_in_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_download(tmp_path / "x")
    encoder = foreign.draw_state("taming", with_decoder=False)
    torch.save(encoder, tmp_path / "x" / "tokenizer" / "vqgan.ckpt")
    run("import", tmp_path / "x", "--out", tmp_path / "ours")
    run("export", tmp_path / "ours", tmp_path / "theirs")
    assert f"left out  the picture decoder: {tmp_path / 'ours'} has none" in capsys.readouterr().out
    state = load_theirs(tmp_path / "theirs").state_dict()
    assert torch.equal(state["model.vqmodel.quant_conv.weight"], encoder["quant_conv.weight"])


def test_a_format_that_the_processor_does_not_spell_is_said(
    tmp_path: Path, tokenizers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_own(tmp_path / "ours", tokenizers) / "config.json"
    config.write_text(config.read_text().replace('"name": "chameleon"', '"name": "cm3leon"'))
    run("export", tmp_path / "ours", tmp_path / "theirs")
    assert "the sequence format cm3leon: their code spells prompts as chameleon does" in capsys.readouterr().out


def load_theirs(folder: Path) -> Any:
    from transformers import ChameleonForConditionalGeneration

    model, report = ChameleonForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("placement", ["pre", "post_sublayer"])
def test_transformers_says_what_ours_says(placement: str, tmp_path: Path, tokenizers: Path) -> None:
    run("export", write_own(tmp_path / "ours", tokenizers, norm_placement=placement), tmp_path / "out")
    ours, theirs = mixmodal.load_transformer(tmp_path / "ours"), load_theirs(tmp_path / "out")
    tokens = torch.randint(ours.config.vocab_size, (15, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, wanted = ours(tokens), theirs(tokens).logits
    codes = slice(4, 44)
    assert (wanted[..., codes] < -1e30).all()  # transformers hides them
    wanted[..., codes] = found[..., codes]
    assert (found - wanted).abs().max() < 1e-5  # worst seen over five seeds: 3.6e-6
    assert found.std() > 1
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id, theirs.config.pad_token_id) == (0, 2, 1)
    told = theirs.generation_config
    assert (told.bos_token_id, told.eos_token_id, told.pad_token_id) == (0, 2, 1)


def test_a_text_goes_on_with_the_same_64_tokens(tmp_path: Path, tokenizers: Path) -> None:
    run("export", write_own(tmp_path / "ours", tokenizers), tmp_path / "out")
    ours, theirs = mixmodal.load_transformer(tmp_path / "ours"), load_theirs(tmp_path / "out")
    prompt = torch.tensor([[0, *range(60, 70)]])
    wanted = theirs.generate(prompt, max_new_tokens=64, do_sample=False, eos_token_id=None)[0, 11:].tolist()
    tokens, cache = prompt, ours.build_cache(1, 80)
    found: list[int] = []
    with torch.no_grad():
        for _ in range(64):
            logits = ours(tokens, cache=cache)[0, -1]
            logits[4:44] = -torch.inf
            found.append(int(logits.argmax()))
            tokens = torch.tensor([found[-1:]])
    assert found == wanted
    assert len(set(found)) > 5


def test_the_processor_and_the_encoder_are_inside(tmp_path: Path, tokenizers: Path) -> None:
    from transformers import ChameleonProcessor

    run("export", write_own(tmp_path / "ours", tokenizers), tmp_path / "out")
    model, theirs = MixedModal.from_pretrained(tmp_path / "ours"), load_theirs(tmp_path / "out")
    processor = ChameleonProcessor.from_pretrained(tmp_path / "out")
    picture = PIL.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    batch = processor(text="<image>a red apple", images=picture, return_tensors="pt")
    assert batch["input_ids"].shape[1] == 1 + 18 + len(model.codec.text_tokenizer.encode("a red apple")) + 1
    codes = theirs.model.get_image_tokens(batch["pixel_values"]).flatten().long() - 4
    assert torch.equal(codes, torch.from_numpy(model.codec.encode_pictures([picture])[0].codes).flatten())
    assert len(codes.unique()) > 1
    with torch.no_grad():
        ids = batch["input_ids"].clone()
        ids[ids == processor.image_token_id] = codes + 4
        logits = theirs(**batch).logits
        assert (logits[..., 44:] - model.model(ids)[..., 44:]).abs().max() < 1e-5


def test_a_picture_tokenizer_of_another_kind_stays_outside_with_the_reason(
    tmp_path: Path, tokenizers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("export", write_own(tmp_path / "ours", tokenizers, vqgan=False), tmp_path / "out")
    assert "the image tokenizer: quantizer.kind is fsq, and theirs is vq; use ours" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vq_config"]["num_embeddings"] == 75


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "gelu"}, "model.activation is gelu, and layout transformers has swiglu only"),
        ({"norm": "layernorm"}, "model.norm is layernorm"),
        ({"position": "learned"}, "model.position is learned"),
        ({"head_dim": 16}, "4 heads of 16 are not as wide as model.dim 32"),
        (
            {"qk_norm": False, "norm_placement": "post_sublayer"},
            "model.norm_placement is post_sublayer, and layout llama",
        ),
    ],
)
def test_a_network_that_transformers_has_no_class_for_is_refused(
    changes: dict, message: str, tmp_path: Path, tokenizers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_own(tmp_path / "ours", tokenizers, **changes)
    assert message in fails(capsys, "export", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_meta_gets_what_its_loader_insists_on(tmp_path: Path, tokenizers: Path, capsys: pytest.CaptureFixture) -> None:
    """`rope.freqs` as the one unknown tensor, heads as wide as dim / heads, the inner width by its rule."""
    folder = write_own(tmp_path / "ours", tokenizers, ffn_dim=76)
    run("export", folder, tmp_path / "out", "--to", "meta", "--num_shards", 1, "--allow_lossy", "true")
    inner = tmp_path / "out" / "models" / "mixmodal"
    shard = torch.load(inner / "consolidated.pth", weights_only=True)
    assert torch.allclose(shard["rope.freqs"], torch.tensor([1, 0.1, 0.01, 0.001]))
    assert shard["layers.0.attention.q_normalization.weight"].shape == (8,)
    told = json.loads((inner / "params.json").read_text())["model"]
    hidden = int(told["ffn_dim_multiplier"] * int(2 * 4 * 32 / 3))
    assert told["multiple_of"] * -(-hidden // told["multiple_of"]) == 76
    assert in_meta_words(4096, 11008) == {}
    assert in_meta_words(8192, 22016) == {}
    wide = write_own(tmp_path / "wide", tokenizers, head_dim=16)
    assert "4 heads of 16 are not as wide" in fails(capsys, "export", wide, tmp_path / "no", "--to", "meta")


def test_a_full_disk_is_named_and_leaves_nothing(
    tmp_path: Path, tokenizers: Path, no_file_above: Callable[[int], AbstractContextManager[None]]
) -> None:
    found = gather_export(write_own(tmp_path / "ours", tokenizers), "meta", 1)
    with pytest.raises(OSError, match=r": '.*consolidated.*\.pth'$") as caught, no_file_above(20_000):
        write_exported(found, tmp_path / "out", allow_lossy=True)
    assert caught.value.errno == errno.EFBIG
    found = gather_export(tmp_path / "ours", None)
    with pytest.raises(OSError, match=r": '.*shard-0\.partial'$") as caught, no_file_above(20_000):
        write_exported(found, tmp_path / "out")
    assert caught.value.errno == errno.EFBIG
    assert {path.name for path in tmp_path.iterdir()} == {"ours", "image"}


def test_a_network_without_qk_norm_is_a_llama(
    tmp_path: Path, tokenizers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    run("export", write_own(tmp_path / "ours", tokenizers, qk_norm=False, head_dim=16), tmp_path / "out")
    message = fails(capsys, "export", tmp_path / "ours", tmp_path / "no", "--to", "meta")
    assert "model.qk_norm is False, and layout meta has True only; --to transformers makes a Llama of it" in message
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(theirs).__name__ == "LlamaForCausalLM"
    ours = mixmodal.load_transformer(tmp_path / "ours")
    tokens = torch.randint(ours.config.vocab_size, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (theirs(tokens).logits - ours(tokens)).abs().max() < 1e-5


def test_a_bare_network_says_nothing_of_what_its_ids_mean(tmp_path: Path) -> None:
    """A Llama that was imported without pictures: its end of text is not ours."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**{**SIZES, "vocab_size": 50, "qk_norm": False, "tie_embeddings": True}))
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text(json.dumps(describe_model(model.config)))
    save_weights(model, tmp_path / "ours" / "model.safetensors")
    run("export", tmp_path / "ours", tmp_path / "out")
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    for told in (theirs.config, theirs.generation_config):
        assert (told.bos_token_id, told.eos_token_id, told.pad_token_id) == (None, None, None)
    assert torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert (theirs(tokens).logits - model.eval()(tokens)).abs().max() < 1e-5


def test_chameleon_must_know_which_ids_are_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Transformer(TransformerConfig(**{**SIZES, "vocab_size": 50}))
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text(json.dumps(describe_model(model.config)))
    save_weights(model, tmp_path / "ours" / "model.safetensors")
    message = fails(capsys, "export", tmp_path / "ours", tmp_path / "out")
    assert "config.json has no vocabulary, and transformers' Chameleon needs to know which ids are codes" in message


@pytest.mark.parametrize("layout", ["transformers", "transformers-4.43", "anole", "meta", "llama"])
def test_every_value_of_the_config_comes_back(layout: str, tmp_path: Path, tokenizers: Path) -> None:
    values = {"rope_theta": 5e5, "norm_eps": 1e-3, "max_seq_len": 333, "qk_norm": layout != "llama"}
    values["norm_placement"] = "pre" if layout == "llama" else "post_sublayer"
    folder = write_own(tmp_path / "ours", tokenizers, **values)
    options = () if layout == "llama" else ("--to", layout)
    options += ("--allow_lossy", "true") if layout == "anole" else ()
    options += ("--allow_lossy", "true", "--num_shards", "1") if layout in ("meta", "transformers-4.43") else ()
    run("export", folder, tmp_path / "out", *options)
    if layout in ("transformers", "llama"):
        from transformers import AutoConfig

        told: Any = AutoConfig.from_pretrained(tmp_path / "out")
        assert told.rope_parameters["rope_theta"] == 5e5
        assert (told.rms_norm_eps, told.max_position_embeddings) == (1e-3, 333)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint is not None
    assert checkpoint.layout.name == layout
    assert asdict(read_shape(checkpoint)) == asdict(mixmodal.load_transformer(folder).config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "lfq"}, "quantizer.kind is lfq"),
        ({"norm_groups": 16}, "autoencoder.norm_groups is 16"),
        ({"mid_blocks": ("res", "res")}, r"autoencoder.mid_blocks is \('res', 'res'\)"),
        ({"num_res_blocks": (1, 2, 2)}, "number of ResBlocks differs"),
        ({"num_decoder_res_blocks": 2}, "num_decoder_res_blocks is 2"),
        ({"decoder_channels": 64}, "decoder_channels is 64"),
        ({"channel_multipliers": (1, 1.5)}, "no whole numbers"),
    ],
)
def test_what_chameleons_vqgan_can_not_be_is_named(changes: dict[str, Any], message: str) -> None:
    quantizer = QuantizerConfig(kind=changes.pop("kind", "vq"))
    assert find_obstacle(AutoencoderConfig(), QuantizerConfig(kind="vq")) is None
    found = find_obstacle(AutoencoderConfig(**changes), quantizer)
    assert found is not None
    assert re.search(message, found)


def test_attention_is_told_by_the_resolutions_where_it_stands() -> None:
    """As taming's encoder counts them: the size of the pictures, halved with every stage."""
    shape = AutoencoderConfig(channels=32, channel_multipliers=(1, 1, 2), attention_stages=(0, 2), latent_channels=8)
    quantizer = QuantizerConfig(kind="vq", codebook_size=40, codebook_dim=8)
    tokenizer = ImageTokenizer(ImageTokenizerConfig(image_size=16, autoencoder=shape, quantizer=quantizer))
    assert describe_vqgan(tokenizer)["attn_resolutions"] == [16, 4]
    assert in_yaml(tokenizer)["model"]["params"]["ddconfig"]["attn_resolutions"] == [16, 4]


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return mixmodal.load_transformer(folder).state_dict()


@pytest.mark.parametrize("layout", ["meta", "transformers", "transformers-4.43", "anole"])
@pytest.mark.parametrize("sharded", [False, True])
def test_folders_come_back_through_every_layout(layout: str, sharded: bool, tmp_path: Path) -> None:
    size = synthetic.SHARDED._replace(shards=1 if layout == "anole" else 4) if sharded else synthetic.SMALL
    write_download(tmp_path / "x", size)
    run("import", tmp_path / "x", "--out", tmp_path / "ours")
    run("export", tmp_path / "ours", tmp_path / "out", "--to", layout)
    vqgan = tmp_path / "x" / "tokenizer" / "vqgan.ckpt"  # transformers drops the decoder
    given = ["--image_tokenizer", vqgan, "--image_size", foreign.SIZE] if layout == "transformers" else []
    run("import", tmp_path / "out", "--out", tmp_path / "again", *given)
    before, after = state_of(tmp_path / "ours"), state_of(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    for name in ("config.json", "image_tokenizer/config.json", "image_tokenizer/model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes(), name
    shards = list((tmp_path / "out").rglob("consolidated*.pth"))
    assert len(shards) == (size.shards if layout == "meta" else 0)
    first, second = (MixedModal.from_pretrained(tmp_path / name) for name in ("ours", "again"))
    texts = ["a red apple </s> <image>", "\u00e4 \u1f34e  two"]
    for text in texts:
        assert first.codec.text_tokenizer.encode(text) == second.codec.text_tokenizer.encode(text)


def test_lossy_and_impossible_shards_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_download(tmp_path / "x", synthetic.SHARDED)
    run("import", tmp_path / "x", "--out", tmp_path / "ours")
    arguments = ["export", tmp_path / "ours", tmp_path / "out", "--to"]
    message = fails(capsys, *arguments, "anole")
    assert "blocks.0.attention.q_norm.weight: heads have QK-norms of their own" in message
    assert "num_shards is 3: layout meta can have 1, 2, 4" in fails(capsys, *arguments, "meta", "--num_shards", 3)
    assert "heads have QK-norms of their own" in fails(capsys, *arguments, "meta", "--num_shards", 2)
    assert not (tmp_path / "out").exists()
    run(*arguments, "anole", "--allow_lossy", "true")
    with pytest.raises(SystemExit) as caught:
        run(*arguments[:2], tmp_path / "no", "--to", "transformers", "--allow_lossy", "true")
    assert caught.value.code == 2
    assert "allow_lossy can not act: transformers has a QK-norm for every head" in capsys.readouterr().err
    assert (tmp_path / "out" / "config.json").is_file()
