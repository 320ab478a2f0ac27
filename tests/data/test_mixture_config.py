"""Configs of mixtures: what can not act or does not belong together is refused, with its key."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixmodal.config import UsageError, load_config
from mixmodal.data.mixture import StageConfig
from mixmodal.data.pipeline import DataConfig, open_sources
from mixmodal.data.source import SourceConfig
from mixmodal.data.token_shards import TokenShards, build_manifest, write_token_shard
from mixmodal.document import Run, build_format
from mixmodal.manifests import write_manifest
from mixmodal.training.pretrain import PretrainConfig
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

VOCABULARY = Vocabulary(VocabularyConfig(codebook_sizes={"image": 8}, num_text_pieces=30, num_sentinels=20))


def mixed(weights: dict[str, float]) -> DataConfig:
    return DataConfig(
        sources={name: SourceConfig(tokens=Path(name), weight=w) for name, w in weights.items()}, seq_len=60
    )


EVEN = mixed({"web": 1, "pairs": 1, "pages": 1})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: replace(EVEN, tokens=Path("web")), "either tokens, .* or sources"),
        (lambda: replace(EVEN, sources={}), "either tokens, .* or sources"),
        (lambda: mixed({"web": -1}), "a weight is -1"),
        (
            lambda: SourceConfig(tokens=Path("a"), image_first_share=2),
            r"sources: image_first_share is 2; it must",
        ),
        (lambda: mixed({"web": 0}), "from step 0, all weights are 0"),
        (lambda: mixed({"web": 1, "pairs": 0}), r"sources\.pairs: its weight is 0 from start to end"),
        (lambda: mixed({"a b": 1}), "'a b' must be made of letters"),
        (lambda: replace(EVEN, stages=(StageConfig(from_step=0, weights={"web": 2}),)), "from_step 0 must be above 0"),
        (lambda: replace(EVEN, stages=(StageConfig(from_step=3, weights={"wep": 2}),)), "'wep' is no source"),
        (lambda: replace(EVEN, stages=(StageConfig(from_step=3, weights={"web": 1}),)), "are those before it"),
        (lambda: replace(EVEN, stages=(StageConfig(from_step=3, weights={"web": -1}),)), "the weight of web is -1"),
        (
            lambda: DataConfig(tokens=Path("x"), seq_len=9, stages=(StageConfig(from_step=3, weights={"x": 2}),)),
            "there are none, since data.tokens is given",
        ),
    ],
)
def test_mixtures_that_can_not_act_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_mixture_is_read_from_a_config_file(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    body = """
trainer: {run_dir: run, max_steps: 9, micro_batch_size: 1}
data:
  seq_len: 128
  sources:
    web: {tokens: a, weight: 0.5, when_done: drop}
    pairs: {tokens: b, caption_dropout: 0.25}
  stages:
    - from_step: 4
      weights: {web: 2}
"""
    path.write_text(body)
    data = load_config(PretrainConfig, path).data
    assert data.sources == {
        "web": SourceConfig(tokens=Path("a"), weight=0.5, when_done="drop"),
        "pairs": SourceConfig(tokens=Path("b"), caption_dropout=0.25),
    }
    assert data.shares(data.sources["web"]) == {"image_first_share": 0.5, "caption_dropout": 0.1}
    assert data.shares(data.sources["pairs"]) == {"image_first_share": 0.5, "caption_dropout": 0.25}
    assert data.weights_at(3) == {"web": 0.5, "pairs": 1.0}
    assert data.weights_at(4) == {"web": 2.0, "pairs": 1.0}
    path.write_text(body.replace("when_done: drop", "when_done: explode"))
    with pytest.raises(UsageError, match="explode"):
        load_config(PretrainConfig, path)
    path.write_text(body.replace("weight: 0.5", "wieght: 0.5"))
    with pytest.raises(UsageError, match="wieght"):
        load_config(PretrainConfig, path)


def write_source(folder: Path, **changed: Any) -> None:
    spelled = build_format(changed.pop("format", "cm3leon"), VOCABULARY, {"image": (2, 3)})
    text = Run("text", np.asarray(VOCABULARY.ids("text"))[:4])
    document = spelled.join([text, Run("image", np.arange(4, 10))])
    entry = write_token_shard(folder, "shard_00000", [document] * 3, list("abc"), VOCABULARY.size)
    made_with = {"text_tokenizer_sha256": "a" * 64, "image_tokenizer_sha256": "b" * 64, **changed}
    write_manifest(folder, build_manifest(spelled, [entry], counts={"documents": 3}, **made_with))


@pytest.mark.parametrize(
    ("changed", "key"),
    [({"text_tokenizer_sha256": "c" * 64}, "text_tokenizer_sha256"), ({"format": "chameleon"}, "sequence_format")],
)
def test_sources_that_do_not_belong_together_are_refused(tmp_path: Path, changed: dict[str, Any], key: str) -> None:
    for name in ("web", "pairs"):
        (tmp_path / name).mkdir()
    write_source(tmp_path / "web")
    write_source(tmp_path / "pairs")
    config = replace(EVEN, sources={name: SourceConfig(tokens=tmp_path / name) for name in ("web", "pairs")})
    opened = open_sources(config)
    assert list(opened) == ["web", "pairs"]
    assert all(isinstance(shards, TokenShards) for shards in opened.values())
    write_source(tmp_path / "pairs", **changed)
    with pytest.raises(ValueError, match=rf"pairs/manifest\.json: {key}"):
        open_sources(config)
