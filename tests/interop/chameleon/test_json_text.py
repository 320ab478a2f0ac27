"""Tokenizer files of foreign models give text back, and what a user types stays text."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_tokens import KINDS, Kind, control_names, text_pieces, tokenizer_json, write_tokenizer
from tokenizers import Tokenizer

from mixmodal.tokenization.json_text import JsonTextTokenizer

TYPED = ["</s>", "<s>", "<unk>", "<racm3:break>", "IMGIMGAZ", "<image>", "<reserved08706>", "<sentinel:0>", "<|image|>"]
TEXTS = [
    "a red apple",
    " in front",
    "  two  spaces ",
    "behind  ",
    "1234.5",
    "a\nb\n\n",
    "\t",
    "\u4e2d\U0001f34e\u00e9",
    "",
]


def write_llama(path: Path) -> dict[str, int]:
    """A file of text alone: `<unk> <s> </s>`, bytes, pieces; some that merges make of typed letters."""
    pieces, merges = text_pieces("metaspace")
    special = ["<unk>", "<s>", "</s>"]
    vocabulary = {name: index for index, name in enumerate([*special, *pieces, "<s", "</", "s>"])}
    merges += [("<", "s"), ("<s", ">"), ("<", "/"), ("s", ">"), ("</", "s>")]
    path.write_text(json.dumps(tokenizer_json("metaspace", vocabulary, merges, special)))
    return vocabulary


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> JsonTextTokenizer:
    path = tmp_path_factory.mktemp("tokens") / "tokenizer.json"
    write_tokenizer(path, kind=request.param)
    return JsonTextTokenizer(path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> JsonTextTokenizer:
    path = tmp_path_factory.mktemp("llama") / "tokenizer.json"
    write_llama(path)
    return JsonTextTokenizer(path)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_every_string_survives(tokenizer: JsonTextTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", [*TEXTS, *TYPED, *(f"a {typed} b" for typed in TYPED)])
def test_texts_survive_and_are_pieces_alone(tokenizer: JsonTextTokenizer, llama: JsonTextTokenizer, text: str) -> None:
    for one in (tokenizer, llama):
        pieces = one.encode(text)
        assert one.decode(pieces) == text
        assert all(0 <= piece < one.num_pieces for piece in pieces)
        assert not {piece + one.first_piece for piece in pieces} & one.control.names.keys()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_those_of_the_library_behind_first_piece(tmp_path: Path, kind: Kind, text: str) -> None:
    write_tokenizer(tmp_path / "t.json", kind=kind)
    tokenizer = JsonTextTokenizer(tmp_path / "t.json")
    expected = Tokenizer.from_file(str(tmp_path / "t.json")).encode(text, add_special_tokens=False).ids
    assert [piece + tokenizer.first_piece for piece in tokenizer.encode(text)] == expected


def test_a_name_that_merges_would_make_stays_text(tmp_path: Path, llama: JsonTextTokenizer) -> None:
    """The library itself gives the control token, once it is no added token any more."""
    ids = write_llama(tmp_path / "t.json")
    content = json.loads((tmp_path / "t.json").read_text())
    library = Tokenizer.from_str(json.dumps({**content, "added_tokens": []}))
    assert ids["</s>"] in library.encode("</s>", add_special_tokens=False).ids
    assert llama.encode("</s>") == [ids[piece] for piece in ("\u2581", "</", "s>")]


def test_a_vocabulary_that_is_looked_up_before_merging_gives_no_control_token(tmp_path: Path) -> None:
    """`ignore_merges`, as in Llama 3's file."""
    ids = write_tokenizer(tmp_path / "t.json")
    content = json.loads((tmp_path / "t.json").read_text())
    content["model"]["ignore_merges"] = True
    (tmp_path / "t.json").write_text(json.dumps(content))
    library = Tokenizer.from_str(json.dumps({**content, "added_tokens": []}))
    assert library.encode("IMGIMGAZ", add_special_tokens=False).ids == [ids["IMGIMGAZ"]]
    tokenizer = JsonTextTokenizer(tmp_path / "t.json")
    assert tokenizer.decode(tokenizer.encode("IMGIMGAZ")) == "IMGIMGAZ"
    assert len(tokenizer.encode("IMGIMGAZ")) == 8


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from("red apple \u00e9\U0001f34e\n<>s/"), min_size=1))
def test_bytes_of_the_pieces_add_up_to_those_of_a_text(tokenizer: JsonTextTokenizer, text: str) -> None:
    """And to one more where the file puts a space in front."""
    in_front = len(tokenizer.decode([*tokenizer.encode("a"), *tokenizer.encode("a")])) - 2
    bytes_of = [tokenizer.piece_bytes[piece] for piece in tokenizer.encode(text)]
    assert sum(bytes_of) == len(text.encode()) + in_front


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_metaspace_as_a_step_of_its_own(tmp_path: Path, scheme: str) -> None:
    """The newer spelling of Llama's file."""
    write_tokenizer(tmp_path / "t.json", kind="metaspace")
    step = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}
    content = json.loads((tmp_path / "t.json").read_text()) | {"normalizer": None, "pre_tokenizer": step}
    content["decoder"]["decoders"] = content["decoder"]["decoders"][: 3 if scheme == "never" else 4]
    (tmp_path / "t.json").write_text(json.dumps(content))
    tokenizer, in_front = JsonTextTokenizer(tmp_path / "t.json"), scheme != "never"
    for text in [text for text in TEXTS if text]:
        pieces = tokenizer.encode(text)
        # a space that is there already is not doubled by these steps
        kept = text[1:] if in_front and text.startswith(" ") else text
        assert tokenizer.decode(pieces) == kept
        assert sum(tokenizer.piece_bytes[piece] for piece in pieces) == len(kept.encode()) + in_front


def test_pieces_of_the_middle_join(tmp_path: Path) -> None:
    """Byte-level files decode stretches to what they are; those with a space in front lose one space of it."""
    found = {}
    for kind in KINDS:
        write_tokenizer(tmp_path / "t.json", kind=kind)
        tokenizer = JsonTextTokenizer(tmp_path / "t.json")
        pieces = tokenizer.encode("a red apple")
        found[kind] = [tokenizer.decode(pieces[:2]), tokenizer.decode(pieces[2:])]
    assert found == {"byte_level": ["a red", " apple"], "metaspace": ["a red", "apple"]}


def test_control_tokens_and_unnamed_rows_among_the_pieces_decode_to_nothing(tmp_path: Path) -> None:
    ids = write_tokenizer(tmp_path / "t.json")
    content = json.loads((tmp_path / "t.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": len(ids), "content": "<late>"})
    (tmp_path / "t.json").write_text(json.dumps(content))
    tokenizer = JsonTextTokenizer(tmp_path / "t.json", vocab_size=len(ids) + 4)
    late = len(ids) - tokenizer.first_piece
    assert tokenizer.num_pieces == late + 4
    assert tokenizer.decode([*tokenizer.encode("a"), late, late + 1, *tokenizer.encode("b")]) == "ab"
    assert tokenizer.piece_bytes[late:] == [0] * 4
    assert tokenizer.decode(tokenizer.encode("<late>")) == "<late>"


def test_a_file_of_text_alone_has_all_its_ids_as_pieces(tmp_path: Path, llama: JsonTextTokenizer) -> None:
    ids = write_llama(tmp_path / "t.json")
    assert (llama.first_piece, llama.num_pieces) == (0, len(ids))
    assert llama.encode("a red")[0] == ids["\u2581a"]  # no <s>
    assert llama.decode([ids["<s>"], *llama.encode("a red"), ids["</s>"]]) == "a red"


def test_the_file_is_kept_byte_for_byte(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "t.json")
    tokenizer = JsonTextTokenizer.load(tmp_path / "t.json")
    tokenizer.save(tmp_path / "folder" / "copy.json")
    assert (tmp_path / "folder" / "copy.json").read_bytes() == (tmp_path / "t.json").read_bytes()
    assert JsonTextTokenizer(tmp_path / "folder" / "copy.json").sha256 == tokenizer.sha256


def test_a_character_without_a_piece_is_refused_not_dropped(tmp_path: Path) -> None:
    names = control_names(2, 1, 1)
    vocabulary = {name: index for index, name in enumerate([*names, "a", "b"])}
    for kind in KINDS:
        content = tokenizer_json(kind, vocabulary, [], names)
        content["normalizer"] = content["model"]["unk_token"] = None
        content["model"]["byte_fallback"] = False
        (tmp_path / "t.json").write_text(json.dumps(content))
        tokenizer = JsonTextTokenizer(tmp_path / "t.json")
        assert tokenizer.encode("ab") == [0, 1]
        with pytest.raises(ValueError, match=r"t\.json: a character of 'a!' has no piece"):
            tokenizer.encode("a!")


def test_a_file_without_a_decoder_joins_its_pieces(tmp_path: Path) -> None:
    """The library alone would put spaces between them."""
    letters = {letter: index for index, letter in enumerate(" abc")}
    (tmp_path / "t.json").write_text(json.dumps({"version": "1.0", "model": {"vocab": letters, "merges": []}}))
    tokenizer = JsonTextTokenizer(tmp_path / "t.json")
    assert tokenizer.decode(tokenizer.encode("ab  c")) == "ab  c"
    assert tokenizer.piece_bytes == [1, 1, 1, 1]


def test_lone_surrogates_and_foreign_indices_are_refused(tokenizer: JsonTextTokenizer) -> None:
    with pytest.raises(ValueError, match="lone surrogate at character 1"):
        tokenizer.encode("a\ud800")
    for piece in (-1, tokenizer.num_pieces):
        with pytest.raises(ValueError, match=r"must lie in 0 \.\."):
            tokenizer.decode([piece])


def test_a_missing_file_and_a_missing_library_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"absent\.json: no text tokenizer there"):
        JsonTextTokenizer(tmp_path / "absent.json")
    write_tokenizer(tmp_path / "t.json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"t\.json: a text tokenizer in JSON needs tokenizers: pip install"):
        JsonTextTokenizer(tmp_path / "t.json")


def test_a_file_that_truncates_and_pads_does_neither_to_texts(tmp_path: Path) -> None:
    """Files that were saved in training have both."""
    write_tokenizer(tmp_path / "t.json")
    plain = JsonTextTokenizer(tmp_path / "t.json")
    content = json.loads((tmp_path / "t.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None}
    content["padding"] |= {"pad_id": 1, "pad_type_id": 0, "pad_token": "<pad>"}
    (tmp_path / "t.json").write_text(json.dumps(content))
    tokenizer = JsonTextTokenizer(tmp_path / "t.json")
    for text in ("a", "a red apple and a pear"):
        assert tokenizer.encode(text) == plain.encode(text)


def test_an_added_token_without_a_row_is_never_given(tmp_path: Path) -> None:
    """Not even where it stands in the vocabulary of the BPE, which is looked up as a whole with `ignore_merges`."""
    ids = write_tokenizer(tmp_path / "t.json")
    content = json.loads((tmp_path / "t.json").read_text())
    content["model"]["vocab"]["late"] = len(ids)
    content["model"]["ignore_merges"] = True
    content["added_tokens"].append({**content["added_tokens"][0], "id": len(ids), "content": "late", "special": False})
    (tmp_path / "t.json").write_text(json.dumps(content))
    tokenizer = JsonTextTokenizer(tmp_path / "t.json", len(ids))
    assert max(tokenizer.encode("late")) < tokenizer.num_pieces
    assert tokenizer.decode(tokenizer.encode("late")) == "late"


def test_a_merge_of_pieces_that_are_not_there_is_refused_not_dropped(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "t.json")
    content = json.loads((tmp_path / "t.json").read_text())
    content["model"]["merges"].append(["zz", "yy"])
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"t\.json: the `tokenizers` library can not read it: .*zz"):
        JsonTextTokenizer(tmp_path / "t.json")
