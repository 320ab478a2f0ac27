"""Captioned pictures: captions stay with their pictures, however the stream is spread, cached or resumed."""

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from mixmodal.data.pairs import PairDataConfig, PairLoader, decode_first_pairs, identify, read_captions
from mixmodal.data.pictures import PictureDataConfig, PictureLoader
from mixmodal.data.shards import PictureFile, Sample, write_shards
from mixmodal.data.skipping import SampleLimits, TooManySkipped
from mixmodal.data.synthetic import synthetic_pairs

SIZE = 16
CAPTIONS = {f"{pair.key}.png": pair.caption for pair in synthetic_pairs(11, SIZE)}

WriteShards = Callable[..., None]


@pytest.fixture(params=[100, 0], ids=["cached", "streamed"])
def config(request: pytest.FixtureRequest, shape_shards: Path) -> PairDataConfig:
    return PairDataConfig(train=(shape_shards,), max_cached_pictures=request.param, shuffle_window=5)


def encode(captions: list[str]) -> torch.Tensor:
    return torch.tensor([list(caption.encode().ljust(60)) for caption in captions])


def build_loader(config: PairDataConfig, size: int = 4, **options: Any) -> PairLoader:
    spelling = options.pop("spelling", {"vocab_size": 256})
    return PairLoader(config, encode, spelling, image_size=SIZE, micro_batch_size=size, **options)


def test_each_picture_comes_with_its_caption(config: PairDataConfig) -> None:
    for batch in islice(build_loader(config), 9):
        for key, row in zip(batch.keys, batch.tokens, strict=True):
            assert bytes(row.tolist()).decode().strip() == CAPTIONS[key.rsplit(":", 1)[1]]


def test_pictures_come_as_they_do_without_captions(config: PairDataConfig) -> None:
    plain = PictureDataConfig(
        train=config.train, max_cached_pictures=config.max_cached_pictures, shuffle_window=config.shuffle_window
    )
    pictures = PictureLoader(plain, SIZE, micro_batch_size=4)
    for found, expected in zip(islice(build_loader(config), 9), pictures):
        assert found.keys == expected.keys
        assert torch.equal(found.pixels, expected.pixels)
        assert torch.equal(found.draws, expected.draws)


def test_a_step_has_the_same_pairs_however_it_is_spread(config: PairDataConfig) -> None:
    whole = list(islice(build_loader(config, size=8), 3))
    loaders = [build_loader(config, 4, rank=rank, world_size=2) for rank in range(2)]
    for step in whole:
        parts = [next(loader) for loader in loaders]
        for name in ("tokens", "caption_ids", "pixels", "draws"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(step, name)), name


@pytest.mark.parametrize("done", [1, 5])
def test_a_resumed_loader_goes_on_with_the_next_batch(config: PairDataConfig, done: int) -> None:
    loader = build_loader(config)
    list(islice(loader, done))
    resumed = build_loader(config)
    resumed.load_state_dict(loader.state_dict())
    for found, wanted in zip(islice(resumed, 3), islice(loader, 3), strict=True):
        assert found.keys == wanted.keys
        assert torch.equal(found.tokens, wanted.tokens)
        assert torch.equal(found.draws, wanted.draws)


def test_a_run_does_not_go_on_with_other_text_tokens(config: PairDataConfig) -> None:
    state = build_loader(config).state_dict()
    with pytest.raises(ValueError, match="vocab_size is 512, but the checkpoint was written with 256"):
        build_loader(config, spelling={"vocab_size": 512}).load_state_dict(state)


def test_equal_tokens_have_one_number_and_others_others() -> None:
    tokens = torch.tensor([[1, 2], [2, 1], [1, 2], [1, 3]])
    numbers = identify(tokens).tolist()
    assert numbers[0] == numbers[2]
    assert len(set(numbers)) == 3


def picture() -> PictureFile:
    return PictureFile(b"", "png", "p.png")


def test_samples_that_are_no_pairs_are_counted_and_too_many_end_the_job(tmp_path: Path) -> None:
    samples = [Sample(f"good{number}", (f"caption {number}", picture())) for number in range(3)]
    samples.append(Sample("turned", (picture(), "caption first")))
    samples.append(Sample("bad", ("one", picture(), "two")))
    write_shards(samples, tmp_path)
    config = PairDataConfig(train=(tmp_path,), limits=SampleLimits(max_skipped_share=0.2))
    assert read_captions(config) == ["caption 0", "caption 1", "caption 2", "caption first"]
    assert read_captions(replace(config, max_tokenizer_captions=2)) == ["caption 0", "caption 1"]
    with pytest.raises(TooManySkipped, match=r"1 of 5 samples are bad .1 no pair.*bad: 2 texts and 1 pictures"):
        read_captions(replace(config, limits=SampleLimits(max_skipped_share=0.1)))


def test_shards_without_captions_are_refused(tmp_path: Path) -> None:
    write_shards([Sample(f"{number}", (picture(),)) for number in range(3)], tmp_path)
    with pytest.raises(TooManySkipped, match=r"3 of 3 samples are bad .3 no pair"):
        read_captions(PairDataConfig(train=(tmp_path,)))
    with pytest.raises(ValueError, match="the shards hold no captioned pictures"):
        read_captions(PairDataConfig(train=(tmp_path,), limits=SampleLimits(max_skipped_share=1.0)))


def test_held_out_pairs_are_the_first_ones(shape_shards: Path) -> None:
    pairs = decode_first_pairs([shape_shards], SIZE, SampleLimits(), 3, "transformers")
    assert [pair.caption for pair in pairs] == list(CAPTIONS.values())[:3]
    assert len(decode_first_pairs([shape_shards], SIZE, SampleLimits(), 100, "transformers")) == 11


def test_config_errors_name_the_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.max_tokenizer_captions is 0"):
        PairDataConfig(train=(tmp_path,), max_tokenizer_captions=0)
    with pytest.raises(ValueError, match=r"data\.train is empty"):
        PairDataConfig(train=())


@pytest.mark.parametrize("until", ["", " "])
def test_captions_can_not_end_before_nothing(config: PairDataConfig, until: str) -> None:
    with pytest.raises(ValueError, match=r"data\.caption_until is empty"):
        replace(config, caption_until=until)


def test_a_run_does_not_go_on_with_captions_of_another_end(config: PairDataConfig) -> None:
    state = build_loader(config).state_dict()
    cut = build_loader(replace(config, caption_until=", "))
    with pytest.raises(ValueError, match="caption_until is , , but the checkpoint was written with None"):
        cut.load_state_dict(state)
    del state["caption_until"]  # as an older version has written it
    build_loader(config).load_state_dict(state)


def test_a_picture_that_stands_in_brings_its_own_caption(tmp_path: Path, shape_shards: Path) -> None:
    write_shards([Sample(f"bad{number}", ("broken", picture())) for number in range(3)], tmp_path)
    limits = SampleLimits(max_skipped_share=0.5)
    config = PairDataConfig(train=(shape_shards, tmp_path), max_cached_pictures=0, limits=limits, shuffle_window=20)
    for batch in islice(build_loader(config), 7):
        found = [bytes(row.tolist()).decode().strip() for row in batch.tokens]
        assert found == [CAPTIONS[key.rsplit(":", 1)[1]] for key in batch.keys]
