"""The one id space."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from mixmodal.vocabulary import Vocabulary, VocabularyConfig


def build(**sizes: object) -> Vocabulary:
    settings = {"codebook_sizes": {"image": 16}, "num_text_pieces": 40, "num_sentinels": 4, "num_reserved": 2, **sizes}
    return Vocabulary(VocabularyConfig(**settings))  # type: ignore[arg-type]


def test_chameleon_sizes_give_chameleon_ids() -> None:
    vocabulary = build(codebook_sizes={"image": 8192}, num_sentinels=512, num_reserved=93, num_text_pieces=56733)
    assert (vocabulary.bos, vocabulary.pad, vocabulary.eos, vocabulary.unk) == (0, 1, 2, 3)
    assert vocabulary.ids("image") == range(4, 8196)
    assert (vocabulary.end_of_span, vocabulary.break_, vocabulary.sentinel(0)) == (8196, 8197, 8198)
    assert (vocabulary.sentinel(511), vocabulary.end_of_turn, vocabulary.ids("text").start) == (8709, 8710, 8803)
    assert vocabulary.size == 65536


@pytest.mark.parametrize("codebooks", [{}, {"image": 16}, {"image": 16, "audio": 3, "box": 5}, {"audio": 3}])
def test_ranges_are_disjoint_and_fill_the_vocabulary(codebooks: dict[str, int]) -> None:
    vocabulary = build(codebook_sizes=codebooks)
    names = ["special", "control", "sentinel", "reserved", *vocabulary.modalities]
    assert sorted(i for name in names for i in vocabulary.ids(name)) == list(range(vocabulary.size))
    assert len({vocabulary.name(i) for i in range(vocabulary.size)}) == vocabulary.size


def test_a_further_modality_moves_no_id() -> None:
    before, after = build(), build(codebook_sizes={"image": 16, "audio": 5})
    assert after.ids("audio") == range(before.size, before.size + 5)
    for name in ("special", "image", "control", "sentinel", "reserved", "text"):
        assert before.ids(name) == after.ids(name)


def test_image_codes_come_first_however_the_file_orders_its_keys() -> None:
    sizes = {"image": 16, "audio": 5}
    assert build(codebook_sizes=dict(sorted(sizes.items()))).digest == build(codebook_sizes=sizes).digest


@pytest.mark.parametrize("as_array", [int, np.asarray, torch.tensor])
def test_ids_and_indices_are_inverse_for_ints_arrays_and_tensors(as_array) -> None:
    vocabulary = build()
    for name in vocabulary.modalities:
        last = len(vocabulary.ids(name)) - 1
        ids = vocabulary.to_ids(name, as_array(last))
        assert int(ids) == vocabulary.ids(name)[-1]
        assert int(vocabulary.from_ids(name, ids)) == last
        assert bool(vocabulary.contains(name, ids))
        assert bool(vocabulary.is_content(ids))
        assert not bool(vocabulary.contains(name, ids + 1))


def test_content_is_every_modality_and_nothing_else() -> None:
    vocabulary = build(codebook_sizes={"image": 16, "audio": 5})
    every = np.arange(vocabulary.size)
    content = np.flatnonzero(vocabulary.is_content(every)).tolist()
    assert content == sorted(i for name in ("text", "image", "audio") for i in vocabulary.ids(name))


def test_json_keeps_the_layout() -> None:
    vocabulary = build(codebook_sizes={"image": 16, "audio": 5})
    again = Vocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict(), sort_keys=True)))
    assert again.digest == Vocabulary.from_dict(vocabulary.to_dict()).digest == vocabulary.digest


@pytest.mark.parametrize("other", [{"num_text_pieces": 41}, {"num_sentinels": 5}, {"codebook_sizes": {"audio": 16}}])
def test_digest_tells_layouts_apart(other: dict[str, object]) -> None:
    assert build(**other).digest != build().digest


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_text_pieces": 0}, "text pieces is 0"),
        ({"codebook_sizes": {"image": -1}}, "image is -1"),
        ({"num_sentinels": 0}, "sentinels is 0"),
        ({"codebook_sizes": {"text": 5}}, "text"),
        ({"codebook_sizes": {"image": 5, "control": 5}}, "control"),
    ],
)
def test_impossible_sizes_and_names_are_refused(sizes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**sizes)


@pytest.mark.parametrize("index", [-1, 4])
def test_a_sentinel_that_does_not_exist_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match=f"<mask:{index}>"):
        build().sentinel(index)


def test_unknown_names_and_ids_are_refused() -> None:
    vocabulary = build()
    with pytest.raises(ValueError, match="no range 'video'"):
        vocabulary.ids("video")
    for token in (-1, vocabulary.size):
        with pytest.raises(ValueError, match="outside"):
            vocabulary.name(token)
