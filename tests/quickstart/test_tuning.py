"""The stages of the tuning, and the page that tells of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mixmodal.config import load_config
from mixmodal.quickstart.chain import QuickstartConfig
from mixmodal.quickstart.recipe import GROUPS_OF_TASKS, TUNING, load_recipe
from mixmodal.quickstart.stages import quickstart
from mixmodal.quickstart.tuning import TuningChain
from mixmodal.quickstart.tuning_report import rows_of, write_tuning_report

MAKING = {"name": "tuning", "seconds": 1.0, "peak_memory_bytes": 1 << 30, "command": "a command"}


def test_tuning_without_a_finished_chain_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"{tmp_path}/run/export/config.json is missing.*quickstart --out {tmp_path}/run"
    ):
        quickstart(QuickstartConfig(out=tmp_path / "run", stage="finetune"))


def test_resolved_configs_are_what_the_printed_commands_load(tmp_path: Path) -> None:
    recipe = load_recipe(tmp_path, entries=TUNING, num_processes=2)
    assert set(recipe.configs) == set(TUNING)
    finetune = recipe.configs["finetune"]
    assert load_config(type(finetune), tmp_path / "configs" / "finetune.yaml") == finetune
    assert finetune.init_from == tmp_path / "export"
    for group in GROUPS_OF_TASKS:
        (corpus,) = recipe.configs[group].corpora
        assert corpus.path == tmp_path / "finetune" / "records" / f"train_{group}.jsonl"
        assert corpus.templates == tmp_path / "configs" / "templates.yaml"
        assert finetune.data.sources[group].tokens == recipe.configs[group].out / "tokens"
    head = (tmp_path / "configs" / "finetune.yaml").read_text().splitlines()[0]
    assert head == f"# deepspeed --num_gpus 2 --module mixmodal.cli finetune --config {tmp_path}/configs/finetune.yaml"


def test_files_of_the_chain_are_no_part_of_the_tuning(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "pretrain.yaml").write_text("{}")
    with pytest.raises(ValueError, match=r"pretrain.yaml is not part of the recipe; its files are answers.yaml"):
        load_recipe(tmp_path / "run", tmp_path / "own", entries=TUNING)


def test_stages_read_earlier_ones_and_those_of_the_chain(tmp_path: Path) -> None:
    chain = TuningChain(QuickstartConfig(out=tmp_path, stage="finetune"), load_recipe(tmp_path, entries=TUNING))
    names = ["data", "image tokenizer", "pretraining"]
    for stage in chain.runner.stages:
        assert set(stage.inputs) <= set(names), stage.name
        names.append(stage.name)
    commands = {stage.name: stage.command for stage in chain.runner.stages}
    assert commands["tuning"].startswith("deepspeed --num_gpus 1 ")
    assert commands["answers"] == f"mixmodal quickstart --out {tmp_path} --stage finetune"


def items_of(run: Path) -> list[dict[str, Any]]:
    """An edit, a question and a comparison, of held-out and trained pairs."""
    (run / "finetune" / "records").mkdir(parents=True)
    for name in ("a", "b"):
        Image.new("RGB", (8, 8), "red").save(run / "finetune" / "records" / f"{name}.png")
    Image.new("RGB", (8, 8), "blue").save(run / "drawn.png")
    edit = {"image1": "a.png", "edit": "Draw it in <i>outline</i> style.", "caption": "b", "image2": "b.png"}
    right = {"concept_right": True, "style_right": False, "both_right": False}
    found: list[dict[str, Any]] = []
    for heldout in (True, False):
        found += [
            {"task": "style", "heldout": heldout, "record": edit, "text": "b", "image": "drawn.png", **right},
            {"task": "style", "heldout": heldout, "record": edit, "text": "", **right},
            {
                "task": "category",
                "heldout": heldout,
                "record": {"image": "a.png", "answer": "plant"},
                "text": "sweet",
                "right": False,
            },
            {
                "task": "which",
                "heldout": heldout,
                "record": {"image1": "a.png", "image2": "b.png", "name": "b", "answer": "second"},
                "text": "second",
                "right": True,
            },
        ]
    return found


def test_the_page_shows_held_out_answers_beside_what_was_given(tmp_path: Path) -> None:
    from mixmodal.quickstart.answers import summarise

    items = items_of(tmp_path)
    rates = {
        split: summarise([item for item in items if item["heldout"] == heldout])
        for split, heldout in (("heldout", True), ("trained", False))
    }
    summary = {
        "seconds": 60.0,
        "peak_memory_bytes": 1 << 30,
        "tasks": {"before": rates, "after": rates},
        "tokens_per_second_train": 1000.0,
        "commit": "abc",
        "versions": {"device": "a device"},
    }
    text = write_tuning_report(tmp_path, summary, items, [MAKING]).read_text()
    assert "Draw it in &lt;i&gt;outline&lt;/i&gt; style." in text
    assert "it is: plant" in text
    assert "Which is b?" in text
    assert text.count("<img") == (3 + 2) + 1 + 2  # given, drawn and held out, once nothing drawn; one; two
    assert "http" not in text.replace("https://creativecommons.org", "")
    assert rows_of(summary)[0] == ["In the other style", "concept", *["100 % (2 of 2)"] * 4]
