"""Pictures of several sizes from a folder to samples: token shards, packed rows, a model that learns their sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PIL
from shapes import tiny_config

from mixmodal import MixedModal
from mixmodal.data.augment import AugmentConfig
from mixmodal.data.corpora import CorpusConfig, PrepareConfig, prepare
from mixmodal.data.inspect import InspectConfig, inspect
from mixmodal.data.pipeline import DataConfig, PackedDocuments, open_sources
from mixmodal.data.pretokenize import TokensConfig
from mixmodal.data.skipping import SampleLimits
from mixmodal.data.token_shards import TokenShards
from mixmodal.document import Image, LuminaFormat, Text
from mixmodal.objectives.causal_masked import CausalMasked, CausalMaskedConfig
from mixmodal.tokenization.codec import Codec
from mixmodal.tokenization.image import ImageTokenizer
from mixmodal.tokenization.text import TextTokenizer
from mixmodal.training.pretrain import pretrain
from mixmodal.training.sample_sheet import SampleSheet
from mixmodal.vocabulary import Vocabulary

COLORS = ("red", "green", "blue", "white")
SHAPES = {"square": (40, 40), "wide": (80, 20), "tall": (20, 80)}
GRIDS = {"square": (2, 2), "wide": (1, 4), "tall": (4, 1)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of three shapes in four colours, each with a caption that names both."""
    folder = tmp_path_factory.mktemp("pictures")
    for color, (shape, size) in product(COLORS, SHAPES.items()):
        PIL.new("RGB", size, color).save(folder / f"{color}_{shape}.png")
        (folder / f"{color}_{shape}.txt").write_text(f"a {color} {shape}")
    return folder


@pytest.fixture(scope="module")
def prepared(corpus: Path, lumina_tokenizers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with their token shards as `tokens`."""
    out = tmp_path_factory.mktemp("prepared")
    prepare(config_of(corpus, lumina_tokenizers, out))
    return out


def config_of(corpus: Path, tokenizers: Path, out: Path, **options: Any) -> PrepareConfig:
    files = {"text_tokenizer": tokenizers / "text.model", "image_tokenizer": tokenizers / "image"}
    tokens = TokensConfig(**files, sequence_format="lumina", num_sentinels=8, **options)
    limits = SampleLimits(max_skipped_share=0.0)
    return PrepareConfig(corpora=(CorpusConfig(kind="folder", path=corpus),), out=out, limits=limits, tokens=tokens)


def test_token_shards_hold_what_the_codec_gives(prepared: Path, corpus: Path, lumina_tokenizers: Path) -> None:
    tokens = TokenShards(prepared / "tokens")
    settings = {"name": "lumina", "grids": {"image": [2, 2]}, "codes_per_unit": 1}
    assert tokens.manifest["sequence_format"] == settings
    assert tokens.vocabulary.config.num_reserved == Vocabulary.reserved_for_sizes(4)
    text = TextTokenizer.load(lumina_tokenizers / "text.model")
    form = tokens.build_format(text)
    assert isinstance(form, LuminaFormat)
    codec = Codec(text, ImageTokenizer.load(lumina_tokenizers / "image"), form)
    assert len(tokens) == 12
    for index in range(12):
        caption, image = sorted(form.parse(tokens[index]).parts, key=lambda part: part.modality, reverse=True)
        assert isinstance(caption, Text)
        _, color, shape = caption.text.split()
        (wanted,) = codec.encode_pictures([PIL.open(corpus / f"{color}_{shape}.png")])
        assert image == wanted
        assert isinstance(image, Image)
        assert image.codes.shape == GRIDS[shape]
    assert tokens.manifest["counts"]["image_tokens"] == 12 * 4


def test_batches_and_variants_keep_pictures_of_all_sizes(
    prepared: Path, corpus: Path, lumina_tokenizers: Path, tmp_path: Path
) -> None:
    expected = TokenShards(prepared / "tokens")
    options = {"num_variants": 2, "augment": AugmentConfig(flip_share=1.0, crop_share=1.0), "batch_size": 5}
    prepare(config_of(corpus, lumina_tokenizers, tmp_path, **options))
    tokens = TokenShards(tmp_path / "tokens")
    form = tokens.build_format(TextTokenizer.load(lumina_tokenizers / "text.model"))
    for index in range(12):
        assert np.array_equal(tokens[2 * index], expected[index])
        assert [len(run.ids) for run in form.split(tokens[2 * index + 1])][-1] == 4


def test_squares_for_several_sizes_are_refused(corpus: Path, lumina_tokenizers: Path, tmp_path: Path) -> None:
    config = config_of(corpus, lumina_tokenizers, tmp_path)
    with pytest.raises(ValueError, match="image_size is 64, which makes all pictures squares"):
        replace(config, image_size=64)


def test_a_tokenizer_of_one_size_is_refused(corpus: Path, tokenizers: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no square of whole units of 32 pixels"):  # 16 px
        prepare(config_of(corpus, tokenizers, tmp_path))


def test_inspect_prints_sizes_and_rows(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = CausalMaskedConfig(min_masks=0, max_masks=0, poisson_rate=0)
    options = {"seq_len": 96, "num_rows": 3, "image_first_share": 0.0, "caption_dropout": 0.0}
    inspect(InspectConfig(data=prepared / "tokens", objective=plain, **options))
    printed = capsys.readouterr().out
    assert "<break> <size:1> <size:4> [image " in printed
    assert "<break> <size:4> <size:1> [image " in printed
    assert " <newline> <eoss> </s>" in printed


@pytest.mark.parametrize("options", [{"caption_dropout": 0.0, "image_first_share": 1.0}, {"caption_dropout": 1.0}])
def test_documents_are_turned_and_masked_within_rows(prepared: Path, options: dict[str, float]) -> None:
    data = DataConfig(tokens=prepared / "tokens", seq_len=96, **options)
    sources = open_sources(data)
    shards = next(iter(sources.values()))
    form, vocabulary = shards.build_format(), shards.vocabulary
    masks = 0.0 if options["caption_dropout"] else 2.0
    objective = CausalMasked(CausalMaskedConfig(min_masks=0, max_masks=4, poisson_rate=masks), vocabulary)
    rows, seen = PackedDocuments(sources, form, objective, data, micro_batch_size=2, seed=0), 0
    masked = 0
    for _, batch in zip(range(6), rows):
        for row, segments in zip(batch.tokens.numpy(), batch.segment_ids.numpy()):
            for segment in range(1, segments.max() + 1):
                ids = row[segments == segment]
                is_dropped = bool(options["caption_dropout"])
                runs = form.split(ids if is_dropped else objective.restore(ids))
                assert [run.modality for run in runs] == (["text", "image"] if is_dropped else ["image", "text"])
                assert vocabulary.contains("sentinel", runs[0].ids).all() == is_dropped
                masked += int(vocabulary.contains("sentinel", ids).sum()) - is_dropped
                seen += 1
    assert seen > 20
    assert bool(masked) == bool(masks)


def test_pretraining_learns_sizes_and_draws_the_one_that_is_asked_for(
    prepared: Path, lumina_tokenizers: Path, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, max_steps=90, log_every=15)
    data = replace(config.data, tokens=prepared / "tokens", image_first_share=0.0, caption_dropout=0.0)
    plain = CausalMaskedConfig(min_masks=0, max_masks=0, poisson_rate=0.0)
    files = {"text_tokenizer": lumina_tokenizers / "text.model", "image_tokenizer": lumina_tokenizers / "image"}
    pretrain(replace(config, data=data, objective=plain, **files))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    # nats a token; which of 12 documents it is takes log(12) / 21 = 0.12, and the uniform loss is 6.2
    assert losses[-1] < 0.3  # seen: 0.14
    model = MixedModal.from_pretrained(tmp_path / "run/export", "cpu")
    for shape, (h, w) in GRIDS.items():  # words say the size
        (picture,) = model.generate(f"a blue {shape}", temperature=0.0, guidance_scale=1.0)
        assert picture.size == (32 * w, 32 * h)
    for size in ((64, 64), (128, 32), (32, 128)):  # and so may the user, whatever the words are
        (picture,) = model.generate("a blue wide", size=size)
        assert picture.size == size
    form, vocabulary = model.format, model.format.vocabulary
    prompt = form.spell_prompt(model.codec.to_document(["a red tall"]), "image", (4, 1))
    (drawn,) = model.generator.generate([model.generator.request(prompt, 0, "image")])
    document = form.parse(np.concatenate([prompt, drawn, [vocabulary.eos]]))
    assert [part.modality for part in document.parts] == ["text", "image"]
    sheet = SampleSheet(TokenShards(prepared / "tokens"), *files.values(), count=4, max_len=96).draw(model.model)
    assert min(sheet.size) > 64
