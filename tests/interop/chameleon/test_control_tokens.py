"""Control tokens are found in a tokenizer file by their names, and keep their ids in our vocabulary."""

import json
import re
from pathlib import Path

import pytest
from synthetic_tokens import write_tokenizer

from mixmodal.tokenization.control_tokens import read_control_tokens, vocabulary_of
from mixmodal.tokenization.json_text import JsonTextTokenizer
from mixmodal.vocabulary import Vocabulary


def change(path: Path, **names: str) -> None:
    """Swaps the ids of two names: `change(path, a="b")`."""
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    for one, other in names.items():
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    for token in content["added_tokens"]:
        token["id"] = vocabulary[token["content"]]
    path.write_text(json.dumps(content))


def rename(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(json.dumps(old), json.dumps(new)))


def test_every_control_token_is_found(tmp_path: Path) -> None:
    ids = write_tokenizer(tmp_path / "t.json", num_codes=40, num_sentinels=8, num_reserved=4)
    control = read_control_tokens(tmp_path / "t.json")
    assert (control.bos, control.pad, control.eos, control.unk) == (0, 1, 2, 3)
    assert (control.first_code, control.num_codes) == (ids["IMGIMGAZ"], 40) == (4, 40)
    assert (control.end_of_image, control.begin_of_image) == (44, 45)
    assert control.end_of_turn == ids["<reserved08706>"] == 54
    assert control.image_placeholder is None
    assert control.first_piece == 58
    assert control.num_rows == len(ids)


def test_chameleons_own_numbers(tmp_path: Path) -> None:
    ids = write_tokenizer(tmp_path / "t.json", num_codes=8192, num_sentinels=512, num_reserved=130)
    control = read_control_tokens(tmp_path / "t.json")
    assert ids["IMGIMGFDZ"] == 57
    assert (control.end_of_image, control.begin_of_image, control.end_of_turn) == (8196, 8197, 8710)
    assert control.first_piece == 8840
    vocabulary = Vocabulary(vocabulary_of(control, len(ids)))
    assert (vocabulary.break_, vocabulary.end_of_turn, vocabulary.sentinel(511)) == (8197, 8710, 8709)


@pytest.mark.parametrize("marked", [True, False])
def test_the_vocabulary_gives_every_control_token_its_id(tmp_path: Path, marked: bool) -> None:
    """Marked as special or not: the names tell, too."""
    ids = write_tokenizer(tmp_path / "t.json")
    if not marked:
        content = json.loads((tmp_path / "t.json").read_text())
        (tmp_path / "t.json").write_text(json.dumps({**content, "added_tokens": []}))
    vocabulary = Vocabulary(vocabulary_of(read_control_tokens(tmp_path / "t.json"), len(ids)))
    assert (vocabulary.bos, vocabulary.pad, vocabulary.eos, vocabulary.unk) == (0, 1, 2, 3)
    assert vocabulary.to_ids("image", 37) == ids["IMGIMGDHZ"]
    assert (vocabulary.end_of_span, vocabulary.break_) == (ids["<eoss>"], ids["<racm3:break>"])
    assert [vocabulary.sentinel(index) for index in range(8)] == [ids[f"<sentinel:{index}>"] for index in range(8)]
    assert vocabulary.ids("reserved") == range(ids["<reserved08706>"], ids["<reserved08709>"] + 1)
    assert vocabulary.size == len(ids)
    tokenizer = JsonTextTokenizer(tmp_path / "t.json")
    assert vocabulary.config.num_text_pieces == tokenizer.num_pieces
    assert vocabulary.to_ids("text", tokenizer.encode("a")[0]) == ids["a"]


@pytest.mark.parametrize("marked", [True, False])
def test_the_placeholder_of_transformers_is_a_control_token(tmp_path: Path, marked: bool) -> None:
    ids = write_tokenizer(tmp_path / "t.json")
    rename(tmp_path / "t.json", "<reserved08707>", "<image>")
    if not marked:
        content = json.loads((tmp_path / "t.json").read_text())
        (tmp_path / "t.json").write_text(json.dumps({**content, "added_tokens": []}))
    control = read_control_tokens(tmp_path / "t.json")
    assert control.image_placeholder == ids["<reserved08707>"]
    assert vocabulary_of(control, len(ids)).num_reserved == 4


@pytest.mark.parametrize("name", ["<eoss>", "<racm3:break>", "<reserved08706>"])
def test_codes_without_the_tokens_around_them_are_refused(tmp_path: Path, name: str) -> None:
    """All is in the one file, whose hash stands for the ids: a sep_token named in another file is not looked for."""
    write_tokenizer(tmp_path / "tokenizer.json")
    rename(tmp_path / "tokenizer.json", name, "<turn>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"sep_token": "<turn>"}))
    with pytest.raises(ValueError, match=rf"tokenizer\.json: has image codes and no {name}$"):
        read_control_tokens(tmp_path / "tokenizer.json")


def test_added_tokens_without_a_row_are_ignored(tmp_path: Path) -> None:
    """Lumina-mGPT's `<|image|>` is behind the last row of the embedding."""
    ids = write_tokenizer(tmp_path / "t.json")
    content = json.loads((tmp_path / "t.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": len(ids), "content": "<|image|>"})
    (tmp_path / "t.json").write_text(json.dumps(content))
    for vocab_size in (None, len(ids)):
        control = read_control_tokens(tmp_path / "t.json", vocab_size)
        assert control.num_rows == len(ids)
        assert "<|image|>" not in control.names.values()
    assert read_control_tokens(tmp_path / "t.json", len(ids) + 8).names[len(ids)] == "<|image|>"


def test_pieces_without_a_row_are_refused(tmp_path: Path) -> None:
    """A tokenizer of another model: its pieces would be spelled with others."""
    ids = write_tokenizer(tmp_path / "t.json")
    with pytest.raises(
        ValueError, match=rf"t\.json: 3 pieces, such as .* have no row in an embedding of {len(ids) - 3}"
    ):
        read_control_tokens(tmp_path / "t.json", len(ids) - 3)


def test_codes_out_of_order_are_named(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "t.json")
    change(tmp_path / "t.json", IMGIMGFZ="IMGIMGGZ")
    with pytest.raises(ValueError, match=r"t\.json: IMGIMGGZ has the id 9; the 40 .* and IMGIMGFZ at 9"):
        read_control_tokens(tmp_path / "t.json")
    write_tokenizer(tmp_path / "t.json")
    rename(tmp_path / "t.json", "IMGIMGDZ", "IMGIMGJJZ")
    with pytest.raises(ValueError, match=r"IMGIMGJJZ has the id 7"):
        read_control_tokens(tmp_path / "t.json")


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ("<s>", "<pad>", "<s> has the id 1 in the tokenizer file and 0 in this vocabulary"),
        ("<eoss>", "<racm3:break>", "<eoss> has the id 45 in the tokenizer file and 44"),
        ("<sentinel:2>", "<sentinel:5>", "<sentinel:5> has the id 48 in the tokenizer file and 51"),
        ("<sentinel:2>", "the", "id 48 is text in the tokenizer file"),
    ],
)
def test_the_first_token_of_another_order_is_named(tmp_path: Path, one: str, other: str, message: str) -> None:
    ids = write_tokenizer(tmp_path / "t.json")
    change(tmp_path / "t.json", **{one: other})
    with pytest.raises(ValueError, match=message):
        vocabulary_of(read_control_tokens(tmp_path / "t.json"), len(ids))


def test_a_missing_token_is_named(tmp_path: Path) -> None:
    ids = write_tokenizer(tmp_path / "t.json")
    rename(tmp_path / "t.json", "<pad>", "<padding>")
    with pytest.raises(ValueError, match="<pad> is not in the tokenizer file and 1 in this vocabulary"):
        vocabulary_of(read_control_tokens(tmp_path / "t.json"), len(ids))


def test_a_file_of_text_alone_has_no_vocabulary_of_chameleon(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}))
    control = read_control_tokens(tmp_path / "t.json")
    assert (control.first_piece, control.num_codes, control.num_rows) == (0, 0, 1)
    with pytest.raises(ValueError, match="no image codes"):
        vocabulary_of(control, 1)


@pytest.mark.parametrize("content", ['{"model": {"type": "Unigram", "vocab": []}}', "[]", "{}", "{"])
def test_files_of_another_kind_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ValueError, match=r"t\.json"):
        read_control_tokens(tmp_path / "t.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"added_tokens": {"content": "<a>"}}, "added_tokens holds"),
        ({"added_tokens": ["<a>"]}, "added_tokens holds <a>; content and id"),
        ({"added_tokens": [{"content": "<a>", "id": "7"}]}, "added_tokens holds"),
        ({"added_tokens": [{"content": "a", "id": 3}]}, "'a' has the id 0, and among added_tokens 3"),
        ({"vocab": {"a": "0"}}, "'a' has the id '0'"),
        ({"vocab": {"a": None}}, "'a' has the id None"),
        ({"vocab": {"a": 1.0}}, "'a' has the id 1.0"),
        ({"vocab": {"a": -1}}, "'a' has the id -1"),
        ({"vocab": {"a": 1 << 31}}, "'a' has the id 2147483648"),
        ({"vocab": {"a": 0, "b": 0}}, "'a' and 'b' have the same id 0"),
        ({"merges": "ab"}, "merges holds 'ab'"),
        ({"merges": {"a": "b"}}, "merges holds"),
        ({"merges": [None]}, "merges holds 'None', which is no pair"),
        ({"merges": ["ab"]}, "merges holds 'ab', which is no pair"),
        ({"merges": [["a", "b", "ab"]]}, "which is no pair"),
        ({"continuing_subword_prefix": "##"}, "continuing_subword_prefix is '##'"),
        ({"end_of_word_suffix": "</w>"}, "end_of_word_suffix is '</w>'"),
    ],
)
def test_a_file_with_odd_entries_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    content = {"added_tokens": changes.pop("added_tokens", []), "model": {**model, **changes}}
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"t\.json: .*{re.escape(message)}"):
        read_control_tokens(tmp_path / "t.json")
