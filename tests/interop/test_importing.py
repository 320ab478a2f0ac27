"""`mixmodal import` makes a folder that draws and reads, as far as the checkpoint goes, and says what is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import foreign
import pytest
import synthetic_checkpoints as synthetic
import torch
from chameleon.synthetic_tokens import write_tokenizer
from PIL import Image as PIL
from safetensors.torch import load_file, save_file
from synthetic_download import CODES, write_download

import mixmodal
from mixmodal.cli import main
from mixmodal.document import EndOfTurn
from mixmodal.interop.export import ExportError, is_export, load_export
from mixmodal.interop.vqgan import build_vqgan
from mixmodal.pipeline import MixedModal
from mixmodal.vocabulary import Vocabulary

GRID = (4, 4)


def run(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 1
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("download")
    write_download(root)
    run("import", root, "--out", root / "ours")
    return root / "ours"


def test_a_download_becomes_a_model_that_draws_reads_and_scores(imported: Path) -> None:
    model = MixedModal.from_pretrained(imported)
    assert model.format.name == "chameleon"
    assert model.format.grids == {"image": GRID}
    picture = model.generate(["a red apple"], "image", seed=0, guidance_scale=1.0)[0]
    assert isinstance(picture, PIL.Image)
    assert picture.size == (foreign.SIZE, foreign.SIZE)
    text = model.generate([picture, "a"], "text", seed=0, max_new_tokens=5)[0]
    assert isinstance(text, str)
    codes = model.codec.encode_pictures([picture])[0].codes
    tokenizer = build_vqgan(foreign.draw_state("taming"), foreign.SIZE).tokenizer
    assert codes.shape == GRID
    assert torch.equal(torch.from_numpy(codes)[None], tokenizer.encode(model.codec.to_images([picture])))


def test_ids_are_those_of_the_tokenizer_file(imported: Path) -> None:
    names = json.loads((imported / "text_tokenizer.json").read_text())["model"]["vocab"]
    vocabulary = load_export(imported).vocabulary
    assert vocabulary.size == len(names)
    assert vocabulary.ids("image").start == names["IMGIMGAZ"] == 4
    assert (vocabulary.end_of_span, vocabulary.break_) == (names["<eoss>"], names["<racm3:break>"])
    assert vocabulary.end_of_turn == names["<reserved08706>"]
    assert vocabulary.sentinel(0) == names["<sentinel:0>"]


def test_what_is_missing_is_said_and_the_network_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_download(tmp_path / "x")
    shutil.rmtree(tmp_path / "x" / "tokenizer")
    message = fails(capsys, "import", tmp_path / "x", "--out", tmp_path / "ours", "--sequence_format", "lumina")
    assert "sequence_format lumina can not act: " in message
    assert "lacks the text tokenizer" in message
    run("import", tmp_path / "x", "--out", tmp_path / "ours")
    printed = capsys.readouterr().out
    assert "the text tokenizer (tokenizer.json): prompts can not be spelled; give --text_tokenizer" in printed
    assert "the image tokenizer: give --image_tokenizer vqgan.ckpt" in printed
    model = mixmodal.load_transformer(tmp_path / "ours")
    assert model(torch.zeros(1, 3, dtype=torch.int64)).shape[-1] == model.config.vocab_size
    with pytest.raises(ExportError, match=r"not a whole exported model: .*text_tokenizer"):
        load_export(tmp_path / "ours")


def test_without_a_decoder_pictures_are_read_and_none_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = write_tokenizer(tmp_path / "t.json", num_codes=CODES)
    size = synthetic.SMALL._replace(vocab=len(names))
    encoder = foreign.draw_state("taming", with_decoder=False)
    state = {**synthetic.draw_state(size), **{f"model.vqmodel.{name}": tensor for name, tensor in encoder.items()}}
    folder = synthetic.write_transformers(tmp_path / "theirs", state, size, vq_config={"resolution": foreign.SIZE})
    shutil.move(tmp_path / "t.json", folder / "tokenizer.json")
    run("import", folder, "--out", tmp_path / "ours")
    assert "missing  the picture decoder: pictures can be read, and none drawn" in capsys.readouterr().out
    model = MixedModal.from_pretrained(tmp_path / "ours")
    assert model.generate([PIL.new("RGB", (20, 20)), "a"], "text", max_new_tokens=3)
    for output in ("image", "mixed"):  # a mixed sample without a picture would pass by chance
        with pytest.raises(ValueError, match="no decoder"):
            model.generate(["a red apple"], output, max_new_tokens=1 if output == "mixed" else None)
    options = ["--prompt", "a", "--output", "mixed", "--out", tmp_path / "samples"]
    assert "no decoder" in fails(capsys, "generate", "--model", tmp_path / "ours", *options)
    assert not (tmp_path / "samples").exists()
    torch.save(foreign.draw_state("taming"), tmp_path / "vqgan.ckpt")
    run("import", folder, "--out", tmp_path / "whole", "--image_tokenizer", tmp_path / "vqgan.ckpt", "--image_size", 16)
    assert MixedModal.from_pretrained(tmp_path / "whole").generate(["a"], "image", guidance_scale=1.0)
    torch.save(encoder, tmp_path / "half.ckpt")
    message = fails(
        capsys,
        "import",
        folder,
        "--out",
        tmp_path / "no",
        "--image_tokenizer",
        tmp_path / "half.ckpt",
        "--image_size",
        16,
    )
    assert "half.ckpt: the picture decoder is missing, there are no decoder.* weights" in message
    assert not (tmp_path / "no").exists()


def test_parts_of_two_models_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_download(tmp_path / "x")
    write_tokenizer(tmp_path / "other.json", num_codes=CODES - 3)
    arguments = ["import", tmp_path / "x", "--out", tmp_path / "no"]
    message = fails(capsys, *arguments, "--text_tokenizer", tmp_path / "other.json")
    assert f"other.json names {CODES - 3} codes" in message
    content = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
    (tmp_path / "text.json").write_text(json.dumps(content))
    message = fails(capsys, *arguments, "--text_tokenizer", tmp_path / "text.json")
    assert "text.json names no image codes (IMGIMG...Z), and" in message
    message = fails(capsys, *arguments, "--layout", "transformers")
    assert "layout transformers has a tensor model.embed_tokens.weight, which the checkpoint has not" in message
    message = fails(capsys, *arguments, "--norm_placement", "post_sublayer")
    assert "params.json: norms stand at pre" in message
    write_tokenizer(tmp_path / "more.json", num_codes=CODES, num_reserved=40)
    message = fails(capsys, *arguments, "--text_tokenizer", tmp_path / "more.json")
    assert "more.json: " in message
    assert "have no row in an embedding of" in message
    (tmp_path / "t.model").touch()
    assert "t.model is no tokenizer.json" in fails(capsys, *arguments, "--text_tokenizer", tmp_path / "t.model")
    message = fails(capsys, *arguments, "--image_tokenizer", tmp_path / "none.ckpt")
    assert "none.ckpt does not exist" in message
    assert not list(tmp_path.glob("*no*"))


def test_what_is_no_foreign_checkpoint_is_named(
    imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert is_export(imported)
    assert not is_export(imported / "image_tokenizer")
    PIL.new("RGB", (8, 8)).save(tmp_path / "a.png")
    save_file({"transformer.wte.weight": torch.zeros(2, 2)}, tmp_path / "gpt.safetensors")
    for source, words in (
        (imported, "is a folder of mixmodal's own"),
        (imported / "image_tokenizer", "is a folder of mixmodal's own"),
        (tmp_path / "a.png", "a.png is no file of weights"),
        (tmp_path / "gpt.safetensors", "gpt.safetensors: no image tokenizer of the VQGAN family"),
    ):
        assert words in fails(capsys, "import", source, "--out", tmp_path / "no")
    with pytest.raises(SystemExit):
        run("import", tmp_path / "a.png", "--out", tmp_path / "no", "--image_size", 0)
    assert "image_size is 0" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_models_are_found_from_any_folder_of_a_download(tmp_path: Path) -> None:
    write_download(tmp_path / "x")
    for number, source in enumerate(("x", "x/models", "x/models/7b", "x/models/7b/consolidated.pth")):
        run("import", tmp_path / source, "--out", tmp_path / str(number))
        assert (tmp_path / str(number) / "text_tokenizer.json").is_file()


def test_options_of_models_are_refused_for_an_image_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(foreign.draw_state("taming"), tmp_path / "a.safetensors")
    arguments = ["import", tmp_path / "a.safetensors", "--out", tmp_path / "no"]
    assert "layout can be given" in fails(capsys, *arguments, "--image_size", 16, "--layout", "meta").replace(
        "alone ", ""
    )
    assert "give --image_size" in fails(capsys, *arguments)


@pytest.mark.parametrize(("inside", "source"), [("", "x"), ("x", "."), ("x/models", "7b"), ("x/models/7b", ".")])
def test_a_download_is_found_from_wherever_it_is_named(
    inside: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_download(tmp_path / "x")
    monkeypatch.chdir(tmp_path / inside)
    run("import", source, "--out", tmp_path / "ours")
    assert load_export(tmp_path / "ours").format.name == "chameleon"
    assert "# 7b in mixmodal's format" in (tmp_path / "ours" / "README.md").read_text()


def test_what_fails_while_weights_are_copied_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = write_download(tmp_path / "x")
    path = tmp_path / "x" / "models" / "7b" / "consolidated.pth"
    state = torch.load(path)
    torch.save({**state, "output.weight": torch.ones(size.vocab, 7)}, path)
    message = fails(capsys, "import", tmp_path / "x", "--out", tmp_path / "ours")
    assert f"output.weight have shape [({size.vocab}, 7)]" in message
    assert [one.name for one in tmp_path.iterdir()] == ["x"]


def test_what_can_not_act_or_be_loaded_again_is_refused(
    tmp_path: Path, tokenizers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_download(tmp_path / "x")
    arguments = ["import", tmp_path / "x", "--out", tmp_path / "no"]
    assert "seed 3 can not act" in fails(capsys, *arguments, "--seed", 3)
    given = [*arguments, "--image_tokenizer", tokenizers / "image"]
    assert "and preprocess meta, not 17 and meta; leave both out" in fails(capsys, *given, "--image_size", 17)
    assert "not None and transformers; leave both out" in fails(capsys, *given, "--preprocess", "transformers")
    message = fails(capsys, *arguments, "--text_tokenizer", tokenizers / "text.model")
    assert "text.model is no tokenizer.json" in message
    path = tmp_path / "x" / "tokenizer" / "text_tokenizer.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "normalizer": {"type": "Unheard"}}))
    assert "text_tokenizer.json: the `tokenizers` library can not read it" in fails(capsys, *arguments)
    (tmp_path / "x" / "tokenizer" / "vqgan.ckpt").unlink()
    assert "text_tokenizer.json: the `tokenizers` library can not read it" in fails(capsys, *arguments)
    assert not list(tmp_path.glob("*no*"))


@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_gets_rows_for_pictures(tied: bool, tmp_path: Path, tokenizers: Path) -> None:
    from chameleon.synthetic_tokens import text_pieces, tokenizer_json
    from transformers import LlamaConfig, LlamaForCausalLM

    pieces, merges = text_pieces("byte_level")
    names = {name: index for index, name in enumerate(["<unk>", "<s>", "</s>", *pieces])}
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": tied}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(names), bos_token_id=1, eos_token_id=2, **sizes)).eval()
    llama.save_pretrained(tmp_path / "llama")
    file = json.dumps(tokenizer_json("byte_level", names, merges, ["<unk>", "<s>", "</s>"]))
    (tmp_path / "llama" / "tokenizer.json").write_text(file)
    run("import", tmp_path / "llama", "--out", tmp_path / "ours", "--image_tokenizer", tokenizers / "image")
    model = MixedModal.from_pretrained(tmp_path / "ours")
    text = model.format.vocabulary.ids("text")
    tokens = torch.randint(len(names), (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, found = llama(tokens).logits, model.model(tokens + text.start)[..., text.start : text.stop]
    assert (wanted - found).abs().max() < 1e-5  # worst seen: 0
    assert model.format.vocabulary.config.codebook_sizes == {"image": 75}
    rows = model.model.embedding.weight
    assert torch.equal(rows[0], llama.model.embed_tokens.weight[1])  # <s>
    assert torch.equal(rows[2], llama.model.embed_tokens.weight[2])  # </s>
    assert model.generate(["a red apple"], "image", guidance_scale=1.0)


def test_bfloat16_and_shards_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixmodal.interop.chameleon import reading

    size = synthetic.SHARDED
    folder = synthetic.write_meta(tmp_path / "x", synthetic.draw_state(size, torch.bfloat16), size)
    run("import", folder, "--out", tmp_path / "whole")
    write = reading.write_weights
    monkeypatch.setattr(reading, "write_weights", lambda folder, tensors: write(folder, tensors, 10_000))
    run("import", folder, "--out", tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("model-*-of-*.safetensors"))) > 3
    whole, shards = (mixmodal.load_transformer(tmp_path / name).state_dict() for name in ("whole", "shards"))
    assert whole.keys() == shards.keys()
    assert all(torch.equal(shards[name], tensor) for name, tensor in whole.items())
    assert {tensor.dtype for tensor in whole.values()} == {torch.bfloat16}
    assert load_file(tmp_path / "whole" / "model.safetensors").keys() == whole.keys()


def test_a_checkpoint_is_imported_with_pictures_of_several_sizes(tmp_path: Path) -> None:
    write_download(tmp_path, num_reserved=Vocabulary.reserved_for_sizes(4))
    said = "model: {params: {ddconfig: {resolution: 64}}}"
    (tmp_path / "tokenizer" / "vqgan.yaml").write_text(said)
    run("import", tmp_path, "--out", tmp_path / "ours", "--sequence_format", "lumina")
    model = MixedModal.from_pretrained(tmp_path / "ours")
    settings = {"name": "lumina", "grids": {"image": [16, 16]}, "codes_per_unit": 8}
    assert model.format.settings == settings
    names = json.loads((tmp_path / "ours" / "text_tokenizer.json").read_text())["model"]["vocab"]
    assert model.format.vocabulary.newline == names["<reserved08799>"]
    assert model.format.vocabulary.size_token(2) == names["<reserved08802>"]
    (picture,) = model.codec.encode_pictures([PIL.new("RGB", (20, 5))])
    assert picture.codes.shape == (8, 32)
    prompt = model.format.spell_prompt(model.codec.to_document(["a", EndOfTurn()]), "image", (8, 32)).tolist()
    wanted = ["<reserved08706>", "<racm3:break>", "<reserved08801>", "<reserved08804>"]
    assert prompt[-4:] == [names[name] for name in wanted]


def test_a_checkpoint_without_tokens_of_sizes_is_not_imported_with_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_download(tmp_path)
    (tmp_path / "tokenizer" / "vqgan.yaml").write_text("model: {params: {ddconfig: {resolution: 64}}}")
    message = fails(capsys, "import", tmp_path, "--out", tmp_path / "ours", "--sequence_format", "lumina")
    assert "there is no size of 2 units: num_reserved is 4" in message
