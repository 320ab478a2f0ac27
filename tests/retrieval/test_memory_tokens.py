"""A memory gives the tokens of its documents back exactly, and says which vocabulary they are of."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixmodal.retrieval.building import MemoryDocument, write_memory
from mixmodal.retrieval.memory import HAS_TEXT, Memory, open_memory
from mixmodal.retrieval.token_rows import TokenRows

FORMAT = {"name": "cm3leon", "grids": {"image": [4, 4]}}
TOKENS = {
    "vocabulary_digest": "d" * 64,
    "sequence_format": FORMAT,
    "text_tokenizer_sha256": "a" * 64,
    "image_tokenizer_sha256": "b" * 64,
    "num_variants": 3,
}
NUM_DOCUMENTS = 7
EYE = np.eye(8, dtype=np.float32)


def spell(number: int, top: int = 300) -> list[np.ndarray]:
    return [np.random.default_rng((number, variant)).integers(0, top, 1 + number + variant) for variant in range(3)]


def write(folder: Path, read: Callable[[int], Any] = spell, **options: Any) -> Memory:
    entries = [MemoryDocument(str(number), HAS_TEXT, number, read(number)) for number in range(NUM_DOCUMENTS)]
    given = {"encoder_identity": "e" * 64, "dim": 8, "tokens": TOKENS, "encoder": "org/clip", "part_documents": 3}
    write_memory(folder, entries, **{"embed": lambda contents: EYE[contents], **given, **options})
    return open_memory(folder, encoder_identity=None)


@pytest.mark.parametrize(("top", "dtype"), [(300, np.uint16), (65536, np.uint16), (70000, np.uint32)])
def test_tokens_come_back_exactly_in_every_variant(tmp_path: Path, top: int, dtype: type) -> None:
    def read(number: int) -> list[np.ndarray]:
        return [*spell(number, top)[:2], np.array([top - 1, number])]

    memory = write(tmp_path, read)
    assert memory.num_variants == 3
    for number in range(NUM_DOCUMENTS):
        for variant, wanted in enumerate(read(number)):
            found = memory.ids(number, variant)
            assert (found.dtype, found.tolist()) == (np.int64, wanted.tolist())
            assert memory.length(number, variant) == len(wanted)
        assert np.array_equal(memory.ids(number), read(number)[0])
    assert memory.num_tokens == sum(len(ids) for number in range(NUM_DOCUMENTS) for ids in read(number))
    assert {np.load(path).dtype for path in tmp_path.glob("*.tokens.npy")} == {np.dtype(dtype)}
    for place in ((-1, 0), (NUM_DOCUMENTS, 0), (0, 3), (0, -1)):
        with pytest.raises(IndexError, match="no document"):
            memory.ids(*place)
        with pytest.raises(IndexError, match="no document"):
            memory.length(*place)


def test_functions_and_arrays_give_the_same_files(tmp_path: Path) -> None:
    write(tmp_path / "arrays")
    write(tmp_path / "functions", lambda number: partial(spell, number))
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("arrays", "functions")]
    assert files[0] == files[1]


def test_another_vocabulary_format_or_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    memory = write(tmp_path)
    own: dict[str, Any] = {"vocabulary_digest": "d" * 64, "sequence_format": FORMAT}
    memory.check_tokens(**own)
    memory.check_like({**TOKENS, "num_variants": 1, "counts": {}})
    memory.check_tokens(**{**own, "sequence_format": {"name": "cm3leon", "grids": {"image": (4, 4)}}})
    memory.check_tokens(**own, text_tokenizer_sha256="a" * 64, image_tokenizer_sha256="b" * 64)
    manifest = r"manifest\.json: tokens\."
    for key, value, message in (
        (
            "vocabulary_digest",
            "f" * 64,
            r"vocabulary_digest is d{12}\.\.\., not f{12}.* built with another vocabulary;",
        ),
        ("sequence_format", {"name": "chameleon", "grids": {"image": [4, 4]}}, "sequence_format is .*chameleon"),
        ("sequence_format", {"name": "cm3leon", "grids": {"image": [2, 4]}}, "sequence_format is .*another sequence"),
        ("text_tokenizer_sha256", "c" * 64, "text_tokenizer_sha256 is .* another text tokenizer;"),
        ("image_tokenizer_sha256", "c" * 64, "image_tokenizer_sha256 is .* another image tokenizer;"),
    ):
        with pytest.raises(ValueError, match=manifest + message):
            memory.check_tokens(**{**own, key: value})
        with pytest.raises(ValueError, match=manifest + message):
            memory.check_like({**TOKENS, key: value})
        with pytest.raises(ValueError, match=manifest + message):
            write(tmp_path, tokens={**TOKENS, key: value})
    with pytest.raises(ValueError, match=manifest + "num_variants is 3, not 2: .* another number of variants"):
        write(tmp_path, tokens={**TOKENS, "num_variants": 2})


def test_a_memory_and_its_encoder_are_moved_together(tmp_path: Path) -> None:
    encoder = tmp_path / "run" / "encoder" / "export"
    encoder.mkdir(parents=True)
    write(tmp_path / "run" / "memory", encoder=str(encoder))
    (tmp_path / "run").rename(tmp_path / "moved")
    found = Path(open_memory(tmp_path / "moved" / "memory", encoder_identity=None).encoder)
    assert found.samefile(tmp_path / "moved" / "encoder" / "export")
    encoder.mkdir(parents=True)  # where it was, there is one again
    assert open_memory(tmp_path / "moved" / "memory", encoder_identity=None).encoder == str(encoder)
    write(tmp_path / "moved" / "memory", encoder="org/clip")
    assert open_memory(tmp_path / "moved" / "memory", encoder_identity=None).encoder == "org/clip"


def test_a_digest_names_documents_vectors_and_tokens_but_not_the_index(tmp_path: Path) -> None:
    digest = write(tmp_path / "one").digest
    assert len(digest) == 64
    assert write(tmp_path / "one", encoder="elsewhere/clip").digest == digest
    assert open_memory(tmp_path / "one", encoder_identity=None).encoder == "elsewhere/clip"
    path = tmp_path / "one" / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["index"]["version"] = 9
    path.write_text(json.dumps(manifest))
    assert open_memory(tmp_path / "one", encoder_identity=None).digest == digest
    others: list[dict[str, Any]] = [
        {"read": lambda number: spell(number, 299)},
        {"embed": lambda contents: -EYE[contents]},
        {"encoder_identity": "f" * 64},
        {"tokens": {**TOKENS, "vocabulary_digest": "f" * 64}},
    ]
    digests = {write(tmp_path / str(number), **options).digest for number, options in enumerate(others)}
    assert len(digests | {digest}) == 5


def test_other_tokens_of_the_same_documents_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def changed(number: int) -> list[np.ndarray]:
        return [ids + (number == 4) for ids in spell(number)]

    with pytest.raises(ValueError, match="part_00001 holds other tokens of its documents than those given"):
        write(tmp_path, changed)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "part_00001.vectors.npy").unlink()
    with pytest.raises(ValueError, match="part_00001 holds other tokens of its documents than those given"):
        write(tmp_path, changed)


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        (spell(4)[:2], "document '4' has 2 variants of tokens, not 3"),
        ([*spell(4)[:2], np.array([-1])], "document '4': its tokens are no ids"),
        ([*spell(4)[:2], np.array([], np.int64)], "document '4': its tokens are no ids"),
        ([*spell(4)[:2], np.array([0.5])], "document '4': its tokens are no ids"),
        ([*spell(4)[:2], np.array([[1]])], "document '4': its tokens are no ids"),
        ([*spell(4)[:2], np.array([1 << 32])], "tokens up to 4294967296 do not fit 32 bits"),
    ],
)
def test_tokens_that_are_none_name_the_document_and_its_part_is_not_written(
    tmp_path: Path, variants: list[np.ndarray], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path, lambda number: variants if number == 4 else spell(number))
    assert not list(tmp_path.glob("part_00001*"))


def test_tokens_are_read_twice_and_never_kept() -> None:
    read: list[int] = []

    def reading(number: int) -> list[np.ndarray]:
        read.append(number)
        return spell(number)

    rows = TokenRows(list("abc"), [partial(reading, number) for number in range(3)], 3)
    assert read == [0, 1, 2]
    rows.sha256()
    assert read == [0, 1, 2] * 2


def test_documents_are_read_without_faiss_index_and_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write(tmp_path)
    monkeypatch.setitem(sys.modules, "faiss", None)
    for kind in ("index_*", "*.vectors.npy", "*.modalities.npy"):
        for path in tmp_path.glob(kind):
            path.unlink()
    memory = open_memory(tmp_path, encoder_identity=None, searched=False)
    assert (memory.digest, len(memory), memory.num_tokens) == (whole.digest, NUM_DOCUMENTS, whole.num_tokens)
    for number in range(NUM_DOCUMENTS):
        assert memory.keys[number] == str(number)
        assert memory.length(number, 2) == len(memory.ids(number, 2))
        assert np.array_equal(memory.ids(number, 2), spell(number)[2])
    with pytest.raises(ValueError, match="opened for reading alone; open it with searched=True"):
        memory.search(EYE[:1], 3)
    with pytest.raises(ValueError, match=r"vectors\.npy: missing"):
        memory.vectors([0])
    (tmp_path / "part_00001.tokens.npy").unlink()
    with pytest.raises(ValueError, match=r"part_00001\.tokens\.npy: missing, though .*manifest\.json names it"):
        open_memory(tmp_path, encoder_identity=None, searched=False)


@pytest.mark.parametrize("name", ["part_documents", "batch_size"])
def test_parts_and_batches_hold_something(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}( is)? 0"):
        write(tmp_path / "memory", **{name: 0})
