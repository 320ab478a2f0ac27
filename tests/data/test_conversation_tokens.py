"""The files of docs/finetune.md, from JSON lines to what is trained on."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixmodal.data.corpora import CorpusConfig, PrepareConfig, prepare
from mixmodal.data.inspect import InspectConfig, inspect
from mixmodal.data.pretokenize import TokensConfig
from mixmodal.data.token_shards import TokenShards
from mixmodal.objectives.causal_masked import CausalMaskedConfig

PAGE = (Path(__file__).parents[2] / "docs" / "finetune.md").read_text(encoding="utf-8")


def block(kind: str) -> str:
    """What stands on the page in the only block of a kind."""
    (found,) = re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)
    return found


@pytest.fixture
def corpus(tmp_path: Path) -> CorpusConfig:
    """The file of the page, with pictures of four shades beside it."""
    for name, shades in (("apple", (200, 120, 160, 240)), ("dark", (40, 8, 24, 56))):
        pixels = np.array(shades, np.uint8).reshape(2, 2).repeat(2, 0).repeat(2, 1)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    (tmp_path / "conversations.jsonl").write_text(block("jsonl"))
    return CorpusConfig(kind="conversations", path=tmp_path / "conversations.jsonl")


def test_the_page_shows_what_is_printed(
    corpus: CorpusConfig,
    tmp_path: Path,
    write_tokens: Callable[..., TokenShards],
    text_tokenizer_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepare(PrepareConfig(corpora=(corpus,), out=tmp_path / "out"))
    assert "3 conversations; tasks: 1 editing, 1 questions, 1 reasoning;" in capsys.readouterr().out
    shards = write_tokens([tmp_path / "out" / "shards"], sequence_format="chameleon")
    plain = CausalMaskedConfig(min_masks=0, max_masks=0)
    options = {"data": shards.folder, "text_tokenizer": text_tokenizer_path, "num_rows": 1, "objective": plain}
    inspect(InspectConfig(**options, image_first_share=0, caption_dropout=0))  # type: ignore[arg-type]
    printed = capsys.readouterr().out
    documents = re.findall(r"^ *(\d{9}#0)\n(.*?) *$", printed, re.MULTILINE)
    assert "\n".join(f"{key}\n{line}" for key, line in sorted(set(documents))) + "\n" == block("text")
    inspect(InspectConfig(**options, image_first_share=0, caption_dropout=0, loss_on="all"))  # type: ignore[arg-type]
    printed = capsys.readouterr().out.partition("\nrow ")[2]  # without the legend
    assert printed.count("*0") == printed.count("<s>*0") >= 3  # nothing else is without loss


def test_the_page_becomes_token_shards_with_pictures_of_several_sizes(
    corpus: CorpusConfig, tmp_path: Path, lumina_tokenizers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = TokensConfig(
        text_tokenizer=lumina_tokenizers / "text.model",
        image_tokenizer=lumina_tokenizers / "image",
        sequence_format="lumina",
    )
    report = prepare(PrepareConfig(corpora=(corpus,), out=tmp_path / "out", tokens=tokens))
    shards = TokenShards(tmp_path / "out" / "tokens")
    losses = [shards.loss(index) for index in range(len(shards))]
    assert report["tokens"]["loss_tokens"] == sum(int(loss.sum()) for loss in losses if loss is not None)
    assert report["tokens"]["image_loss_tokens"] == 2 * 4  # of four pictures two are answers
    assert "loss on" in capsys.readouterr().out
