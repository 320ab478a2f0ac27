"""Repeats of training code sequences: planted ones are found, in memory and on token shards."""

from pathlib import Path

import numpy as np
import pytest
import torch

import mixmodal.evaluation.memorisation as memorisation
from mixmodal.data.token_shards import TokenShards, build_manifest, write_token_shard
from mixmodal.document import Document, Image, build_format
from mixmodal.evaluation.memorisation import CodeBlock, find_repeats, in_blocks, training_codes
from mixmodal.manifests import write_manifest
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

CODES = 16


def draw(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 64, size=(count, CODES))


@pytest.fixture
def planted() -> tuple[np.ndarray, np.ndarray]:
    """Samples and training: sample 3 is picture 41, sample 5 all but one code of picture 7."""
    samples, training = draw(10, 0), draw(50, 1)
    samples[3] = training[41]
    samples[5] = training[7]
    samples[5, 2] = (samples[5, 2] + 1) % 64
    return samples, training


@pytest.mark.parametrize(("size", "samples_at_a_time"), [(100, 256), (7, 3)])
def test_planted_duplicates_are_found_whatever_the_blocks(
    planted: tuple[np.ndarray, np.ndarray], size: int, samples_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memorisation, "SAMPLES_AT_A_TIME", samples_at_a_time)
    samples, training = planted
    found = find_repeats(samples, in_blocks(training, size=size))
    assert (found.exact, found.near, found.threshold, found.num_training) == (0.1, 0.2, 0.9, 50)
    same = (samples[:, None] == training[None]).mean(axis=2)
    assert found.equal == pytest.approx(same.max(axis=1))
    assert found.nearest.tolist() == same.argmax(axis=1).tolist()
    assert found.keys == [str(number) for number in found.nearest]
    assert np.array_equal(found.codes, training[found.nearest])
    assert (found.equal[3], found.equal[5]) == (1.0, 15 / 16)


def test_the_threshold_is_the_least_share_of_equal_codes(planted: tuple[np.ndarray, np.ndarray]) -> None:
    samples, training = planted
    shares = [find_repeats(samples, in_blocks(training), threshold=share).near for share in (15 / 16, 0.95, 1.0)]
    assert shares == [0.2, 0.1, 0.1]


def test_codes_keep_their_places(planted: tuple[np.ndarray, np.ndarray]) -> None:
    samples, training = planted
    moved = np.roll(samples[3:4], 1, axis=1)
    assert find_repeats(moved, in_blocks(training)).near == 0  # stated: what is moved is not found


def test_a_grid_is_flattened_and_tensors_are_taken(planted: tuple[np.ndarray, np.ndarray]) -> None:
    samples, training = planted
    found = find_repeats(torch.from_numpy(samples).reshape(10, 4, 4), [CodeBlock(["x"] * 50, training)])
    assert found.exact == 0.1
    assert found.keys == ["x"] * 10


def test_large_codes_stay_apart() -> None:
    codes = np.array([[memorisation.LARGEST_CODE - 1, 5]])
    assert find_repeats(codes, in_blocks(codes - [[1, 0]])).equal.tolist() == [0.5]


def write_shards(folder: Path, grids: list[np.ndarray]) -> TokenShards:
    """Token shards of documents with one picture each."""
    vocabulary = Vocabulary(VocabularyConfig(codebook_sizes={"image": 64}, num_text_pieces=8, num_sentinels=2))
    spelling = build_format("cm3leon", vocabulary, {"image": (4, 4)})
    pictures = [Image(codes.reshape(4, 4)) for codes in grids]
    documents = [spelling.spell(Document([picture])) for picture in pictures]
    keys = [f"p{number}#0" for number in range(len(grids))]
    entry = write_token_shard(folder, "shard_00000", documents, keys, vocabulary.size)
    counts = {"documents": len(documents), "tokens": entry["tokens"], "skipped": {}}
    hashes = {"text_tokenizer_sha256": "t" * 64, "image_tokenizer_sha256": "i" * 64}
    write_manifest(folder, build_manifest(spelling, [entry], counts=counts, **hashes))
    return TokenShards.open(folder)


def test_a_duplicate_in_token_shards_is_found_by_its_key(
    tmp_path: Path, planted: tuple[np.ndarray, np.ndarray]
) -> None:
    samples, training = planted
    shards = write_shards(tmp_path, list(training))
    blocks = list(training_codes(shards, CODES, size=20))
    assert [len(block.keys) for block in blocks] == [20, 20, 10]
    assert np.array_equal(np.concatenate([block.codes for block in blocks]), training)
    found = find_repeats(samples, training_codes(shards, CODES))
    assert (found.exact, found.keys[3], found.keys[5]) == (0.1, "p41#0", "p7#0")
    with pytest.raises(ValueError, match=r"manifest\.json: none of its 50 documents has a picture of 9 codes"):
        list(training_codes(shards, 9))


def test_what_can_not_be_compared_is_named() -> None:
    codes = draw(3, 0)
    for threshold in (0.0, 1.5):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            find_repeats(codes, in_blocks(codes), threshold=threshold)
    with pytest.raises(ValueError, match="no training picture"):
        find_repeats(codes, [])
    with pytest.raises(ValueError, match="samples have 16 codes, training pictures 4"):
        find_repeats(codes, in_blocks(codes[:, :4]))
    for wrong in (codes[0], codes[:0], codes.astype(float)):
        with pytest.raises(ValueError, match="samples must be integer codes"):
            find_repeats(wrong, in_blocks(codes))
    for wrong in (-codes - 1, codes + memorisation.LARGEST_CODE):
        with pytest.raises(ValueError, match="codes of training must lie in"):
            find_repeats(codes, in_blocks(wrong))
