"""Which pictures are scored, and the digest that names them."""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mixmodal.data.shards import PictureFile, Sample, write_shards
from mixmodal.data.skipping import SampleLimits, TooManySkipped
from mixmodal.evaluation.reference import ReferencePictures

Draw = Callable[..., torch.Tensor]
WriteShards = Callable[..., None]


@pytest.fixture
def shards(tmp_path: Path, write_shape_shards: WriteShards) -> Path:
    write_shape_shards(tmp_path / "shards", 12, size=8)
    return tmp_path / "shards"


def build(*folders: Path, share: float = 0.05, **fields: int) -> ReferencePictures:
    limits = SampleLimits(max_skipped_share=share)
    return ReferencePictures(folders, 8, limits, **{"max_pictures": 100, **fields})  # type: ignore[arg-type]


def test_all_pictures_come_in_the_order_of_the_shards(shards: Path, draw_shapes: Draw) -> None:
    batches = list(build(shards, batch_size=5))
    assert [len(batch) for batch in batches] == [5, 5, 2]
    assert torch.equal(torch.cat(batches), draw_shapes(12, 8))


def test_the_seed_chooses_among_too_many(shards: Path, draw_shapes: Draw) -> None:
    everything = list(draw_shapes(12, 8))
    chosen = []
    for seed in (0, 0, 1):
        pixels = torch.cat(list(build(shards, max_pictures=5, seed=seed)))
        numbers = [next(n for n, one in enumerate(everything) if torch.equal(one, two)) for two in pixels]
        assert numbers == sorted(numbers)
        assert len(numbers) == 5
        chosen.append(numbers)
    assert chosen[0] == chosen[1] != chosen[2]
    assert set(chosen[0]) != set(range(5))


def test_the_digest_names_the_pixels_and_not_their_order(
    shards: Path, tmp_path: Path, write_shape_shards: WriteShards
) -> None:
    write_shape_shards(tmp_path / "many", 12, size=8, shard_size=5)
    write_shape_shards(tmp_path / "other", 12, size=8, seed=1)
    digests = []
    for pictures in (build(shards, batch_size=5), build(tmp_path / "many"), build(tmp_path / "other")):
        pixels = torch.cat(list(pictures))
        digests.append(pictures.sha256())
    assert digests[0] == digests[1] != digests[2]
    ordered = sorted(hashlib.sha256(one.numpy().tobytes()).digest() for one in pixels)
    assert digests[2] == hashlib.sha256(b"".join(ordered)).hexdigest()
    forward, backward = build(shards, tmp_path / "other"), build(tmp_path / "other", shards)
    assert not torch.equal(torch.cat(list(forward)), torch.cat(list(backward)))
    assert forward.sha256() == backward.sha256()


def write_with_broken(folder: Path, num_broken: int) -> None:
    from mixmodal.data.synthetic import synthetic_pairs

    samples = []
    for number, pair in enumerate(synthetic_pairs(10, 8, 0)):
        data = io.BytesIO()
        pair.picture.save(data, "png")
        whole = data.getvalue()
        samples.append(Sample(pair.key, (PictureFile(whole[:60] if number < num_broken else whole, "png", pair.key),)))
    write_shards(iter(samples), folder, 1000)


def test_bad_pictures_are_left_out_up_to_the_share(tmp_path: Path) -> None:
    write_with_broken(tmp_path / "broken", 2)
    assert len(torch.cat(list(build(tmp_path / "broken", share=0.3)))) == 8
    with pytest.raises(TooManySkipped):
        list(build(tmp_path / "broken", share=0.1))


def test_shards_without_good_pictures_are_refused(tmp_path: Path) -> None:
    write_with_broken(tmp_path / "broken", 10)
    with pytest.raises(ValueError, match="broken: the shards hold no pictures"):
        list(build(tmp_path / "broken", share=1.0))
