"""Runs what a page shows: commands in this process, launchers and servers in one of their own, Python blocks."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from documented import ROOT, Shown, known_command, script_of

from mixmodal.cli import COMMANDS, main

SMALL = {
    "quickstart": "--recipe FOLDER",
    "pretrain": "--trainer.max_steps 2",
    "finetune": "--trainer.max_steps 2 --data.seq_len 512 --trainer.micro_batch_size 1 --trainer.global_batch_size 2",
    "train-image-tokenizer": "--trainer.max_steps 2 --trainer.micro_batch_size 2",
    "train-encoder": "--trainer.max_steps 2 --trainer.micro_batch_size 4 --model.vocab_size 400",
    "train-diffusion": "--trainer.max_steps 2 --trainer.micro_batch_size 2",
    "prefer": "--num 2",
}
"""What is added to each command of a kind."""
OF_CHAMELEON = (
    "--image_size 16 --tokens.text_tokenizer MODEL/text_tokenizer.json --tokens.image_tokenizer MODEL/image_tokenizer"
)
ADDED = {
    "--stage finetune": "--recipe TUNED",
    "lumina-mgpt.yaml": "--model LUMINA --size 64x32",
    "--size 768x512": "--model LUMINA --size 64x32 --prompt 'a red apple' --out sized",
    "configs/data/(conversations|tasks).yaml": OF_CHAMELEON,
    "import (FILE|Lumina)": "--image_size 64",
    "--config pairs.yaml": "--image_size 16",
    "train/scenes.yaml": "--data.seq_len 128",
    "text_base.yaml --init_from": "--data.seq_len 128 --trainer.micro_batch_size 1 --trainer.global_batch_size 2",
    "img2dataset.yaml": "--tokens.device cpu",
    "demo_64px_64.yaml": "--adversarial.start_step 1",
    "demo_retrieval.yaml": "--data.stages '[{from_step: 1, weights: {pairs: 1.0, twice: 0.15}}]'",
    "train_text.yaml": "--vocab_size 400",
    "sample/evaluate.py": "--out out/shared",
    "sample/classify.py": "--model EXPORT --data PICTURES --classes classes.txt --out out/shared",
    r"sample/generate.py \.\.\.": "--model EXPORT --prompts prompts.jsonl --out out/shared",
    "--diffusion.weighting": "--model DIFFUSERS_FOLDER --data PICTURES --classes classes.txt --out weighted "
    "--diffusion.fit_pictures 2",
    "--diffusion.times": "--model DIFFUSERS_FOLDER --data PICTURES --classes classes.txt --out timed "
    "--diffusion.pilot_pictures 2",
    "--num_gpus 2 ": "--trainer.run_dir out/two",
    "--init_from FOLDER": "--trainer.run_dir out/base",
    "benchmarks/stability.py": "--steps 2 --seeds 1 --no_record",
    "diffusion_classes.yaml": "--model.block_channels [32,32] --model.attention_levels [1] --model.head_dim 16",
}
"""What is added to the commands in which a pattern is found."""
FILLED = {
    ("", "--model", "DIR"): "runs/quickstart/export",
    ("", "--classes", "FILE"): "classes.txt",
    ("", "--task", "FILE"): "task.jsonl",
    ("", "--image", "FILE"): "apple.png",
    ("", "--model", "..."): "runs/quickstart/export",
    ("", "--prompts", "..."): "prompts.jsonl",
    ("generate", "--image", "pictures/apple.png"): "pictures/000000.png",
    ("quickstart", "--out", "DIR"): "runs/quickstart",
    ("import", "", "SOURCE"): "chameleon/data",
    ("import", "", "FILE"): "vqgan.ckpt",
    ("export", "", "DIR"): "runs/quickstart/export",
    ("prefer", "--prompts", "FILE"): "conversations/drawn.jsonl",
    ("plan", "--config", "FILE"): "configs/train/demo.yaml",
    ("plan of docs/finetune.md", "--config", "FILE"): "runs/finetune_chameleon/config.yaml",
    ("pretrain", "--config", "FILE"): "configs/train/demo.yaml",
    ("pretrain", "--init_from", "FOLDER"): "runs/quickstart/export",
    ("finetune", "--init_from", "DIR"): "MODEL",
    ("finetune", "--data.tokens", "DIR"): "runs/conversations/tokens",
    ("evaluate", "--config", "FILE"): "configs/sample/evaluate.yaml",
    ("inspect", "--data", "DIR"): "runs/quickstart/tokens/train",
    ("classify", "--data", "DIR"): "PICTURES",
    ("classify", "--diffusion.fit", "PICTURES"): "FEW_PICTURES",
}
"""What stands for a word of the reader's own: by command (or any), the option before it (or none), and the word."""
OUT = "--out"


def arguments_of(shown: Shown, number: int) -> list[str]:
    """The words of a command with what the reader would put there, and with small sizes behind them.

    Args:
        number: of the command in its story: names the folder of an `--out DIR`.
    """
    words = [*shown.words]
    command, arguments = ("", []) if "COMMAND" in words else known_command(words) or ("", [])
    head = words[: len(words) - len(arguments)]
    if command and shown.in_text and not arguments and (shown.page, command) not in RUN_BY_NAME:
        return [*head, "--help"]
    filled: list[str] = []
    for word in arguments:
        before = filled[-1] if filled and filled[-1].startswith("--") else ""
        if word == "..." and not before:
            continue
        own = f"out/{number}" if before == OUT and word in ("DIR", "...") else word
        keys = [(who, before, word) for who in (f"{command} of {shown.page}", command, "")]
        filled.append(next((FILLED[key] for key in keys if key in FILLED), own))
    if not command:
        filled = words[len(head) :]
    added = [SMALL.get(command, "")] if filled != ["--help"] else []
    added += [more for pattern, more in ADDED.items() if re.search(pattern, shown.text)]
    return [*head, *filled, *shlex.split(" ".join(added))]


RUN_BY_NAME = {("README.md", "quickstart"), ("docs/finetune.md", "quickstart")}
"""Commands that a page gives by their name alone to be run so; of others so named the help is asked for."""


def execute(words: Sequence[str], variables: Sequence[str] = ()) -> None:
    """Runs a command.

    Raises:
        RuntimeError: with what it printed, where its exit code is not 0.
    """
    program, *rest = words
    if program in ("torchrun", "deepspeed"):
        launch(words, variables)
    elif program == "mixmodal" and rest[0] == "serve" and "--help" not in rest:
        serve(rest)
    elif program == "mixmodal" and rest[0] == "COMMAND":
        for name in COMMANDS:
            in_this_process([name, *rest[1:]])
    elif program == "mixmodal":
        in_this_process(rest)
    else:
        run_script(*script_of(words))


def in_this_process(arguments: Sequence[str]) -> None:
    try:
        main(arguments)
    except SystemExit as end:
        if end.code not in (0, None):
            raise RuntimeError(f"exit code {end.code}") from end


def run_script(script: Path, arguments: Sequence[str]) -> None:
    """As `python SCRIPT` does: its folder is the first of the path."""
    argv, path = sys.argv, [*sys.path]
    sys.argv, sys.path[:0] = [str(script), *arguments], [str(script.parent)]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if end.code not in (0, None):
            raise RuntimeError(f"exit code {end.code}") from end
    finally:
        sys.argv, sys.path[:] = argv, path


def environment(variables: Sequence[str] = ()) -> dict[str, str]:
    """Ours on the CPU, with the repository as what is imported."""
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    paths = os.pathsep.join(filter(None, (str(ROOT), own.get("PYTHONPATH"))))
    given = dict(variable.split("=", 1) for variable in variables)
    return {**own, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **given}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(words: Sequence[str], variables: Sequence[str]) -> None:
    """A launcher with two processes, whatever it is asked for."""
    program, *rest = words
    module = {"torchrun": "torch.distributed.run", "deepspeed": "deepspeed.launcher.runner"}[program]
    for option in ("--nproc_per_node", "--num_gpus"):
        if option in rest:
            rest[rest.index(option) + 1] = "2"
    command = [sys.executable, "-m", module, "--master_port", str(free_port()), *rest]
    done = subprocess.run(command, env=environment(variables), capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stdout[-1500:]}{done.stderr[-3000:]}")


def serve(arguments: Sequence[str]) -> None:
    """Serves on a free port, asks for the page, and ends it."""
    if find_spec("gradio") is None:
        return  # tests/serve has the page, and skips in the same way
    port = str(free_port())
    command = [sys.executable, "-m", "mixmodal.cli", *arguments, "--port", port]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    ) as page:
        try:
            end = time.monotonic() + 180
            while True:
                assert page.poll() is None, page.stdout and page.stdout.read()
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=60) as answer:
                        assert answer.status == 200
                        assert b"<html" in answer.read().lower()
                    break
                except OSError:
                    assert time.monotonic() < end, "the page did not come"
                    time.sleep(0.2)
        finally:
            page.terminate()
            page.wait(60)


def shorten_quickstart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the demo pictures it sees few, and what it launches runs here: in a tenth of the time all else is as it is."""
    from mixmodal.quickstart import corpus
    from mixmodal.quickstart import launch as launching

    find = corpus.find_emoji

    def find_few(*tones: Any) -> list[Any]:
        found = [entry for entry in find(*tones) if len(entry.files) == 2]
        some = [[entry for entry in found if entry.category == category][:14] for category in FEW]
        return [*some[0], *some[1], *(entry for entry in found if re.search(FAMILIES, entry.concept))]

    def run(command: Sequence[str], num_processes: int = 1) -> None:
        in_this_process(command[command.index("mixmodal.cli") + 1 :])

    monkeypatch.setattr(corpus, "find_emoji", find_few)
    monkeypatch.setattr(launching, "launch", run)


def bring_the_hub_here(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    """Any id of the Hugging Face hub is this model, and what is pushed goes nowhere."""
    import huggingface_hub

    class Hub:
        def __init__(self, **_: Any) -> None: ...

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, folder_path: Path, **_: Any) -> str:
            assert (Path(folder_path) / "config.json").is_file()
            return "https://huggingface.co/OWNER/NAME/commit/1"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(model))
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)


FEW = ("food & drink", "travel & places")
FAMILIES = r"^((wo)?man )?(farmer|singer)|^(thumbs up|raised fist)"
"""People and hands in tones of the skin, which the demo tasks ask about."""
SMALLER = {"synthetic_pairs(500, ": "synthetic_pairs(12, "}
"""What is put into Python blocks in the place of large numbers."""


def run_block(code: str, names: dict[str, Any], where: str) -> None:
    """A Python block with the names that blocks before it have left."""
    for large, small in SMALLER.items():
        code = code.replace(large, small)
    exec(compile(code, where, "exec"), names)
