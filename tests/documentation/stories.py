"""Which commands of the pages are run, with what in the place of the reader's own, and which need more than is here.

One story is a page, or a folder of configs: its commands and Python blocks are run in order in a world of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import tiny_world as world
from documented import CONFIGS, ROOT, Block, Shown, blocks, commands_of
from PIL import Image

from mixmodal import MixedModal

CHECKED = ("make", "pip", "docker")
"""Programs whose commands are held to the Makefile, to pyproject.toml and to the Dockerfile's page, and not run."""


class Need(NamedTuple):
    """Commands that are not run here.

    Args:
        pattern: of the command.
        reason: what it needs.
        said: what its reader is told, a pattern found within a few lines of it, or in the head of the config.
    """

    pattern: str
    reason: str
    said: str


NEEDS = (
    Need(r"^deepspeed --num_gpus 8 ", "a machine with 8 GPUs", r"GPU"),
    Need(r"^deepspeed --hostfile ", "several machines", r"GPUs|machines"),
    Need(r"^deepspeed tokenizers/train_image.py ", "a machine with GPUs", r"Hardware: .*GPUs"),
    Need(r"^python -m mixmodal.pipeline.lm_eval_model ", "data sets from the network", r"fetches its data sets"),
)
MEASURED = Need(
    r"^(python benchmarks/|mixmodal (quickstart|evaluate))", "minutes to hours", r"; commit [0-9a-f]{9}; python "
)
"""How a figure was measured, as its footnote tells; the footnote has the machine, the date and the commit."""


def needs_of(shown: Shown) -> list[Need]:
    """Why a command is not run; an empty list for one that is."""
    line = (ROOT / shown.page).read_text(encoding="utf-8").splitlines()[shown.line - 1]
    found = [need for need in NEEDS if re.search(need.pattern, shown.text)]
    return found + ([MEASURED] if re.search(MEASURED.said, line) and re.search(MEASURED.pattern, shown.text) else [])


class Story(NamedTuple):
    """How a page is run.

    Args:
        made: what is put into the world before.
        links: names that stand on the page, and what they are in the world.
        first: patterns of commands that are run before the others, in their order: a page does not tell all in order.
        given: names that Python blocks use and a page leaves to its reader.
        leaves: files that are there in the end, as the page says.
        modules: without which the story is skipped.
        slow: whether `make slow` runs it, and not `make test`.
    """

    made: tuple[Callable[..., None], ...] = ()
    links: tuple[tuple[str, str], ...] = ()
    first: tuple[str, ...] = ()
    given: Callable[[Path], dict[str, Any]] = lambda root: {}
    leaves: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    slow: bool = False


EXPORT = "runs/quickstart/export"
PREPARED_AND_TUNED = (r"^mixmodal (import|prepare|train-text-tokenizer|train-image-tokenizer) ",)


def picture(name: str, root: Path) -> Any:
    with Image.open(root / name) as found:
        return found.convert("RGB")


def names_of_sampling(root: Path) -> dict[str, Any]:
    shown: list[Any] = []
    apple, more = picture("apple.png", root), picture("more.png", root)
    return {
        "picture": apple,
        "first": apple,
        "second": more,
        "show": shown.append,
        "keep": lambda *one: shown.append(one),
    }


STORIES: dict[str, Story] = {
    "README.md": Story(
        leaves=(
            "runs/quickstart/report.html",
            "runs/quickstart/summary.json",
            "runs/own/samples/results.json",
        ),
        made=(
            *(world.own_pictures, world.prompt_files, world.labelled_pictures, world.compositions),
            *(world.meta_download, world.conversations),
        ),
        given=lambda root: {"other_image": picture("apple.png", root)},
    ),
    "docs/tutorial.md": Story(
        leaves=(
            "runs/own/tokens/manifest.json",
            "runs/own/pretrain/metrics.jsonl",
            "runs/own/samples/contact_sheet.png",
            "runs/mine/samples/results.json",
        ),
    ),
    "docs/api.md": Story(given=lambda root: {"MixedModal": MixedModal}),
    "docs/api_configs.md": Story(),
    "docs/checkpoints.md": Story(
        leaves=(
            "data/pairs/tokens/manifest.json",
            "runs/text_base/export/config.json",
            "out/model.safetensors",
        ),
        made=(
            world.own_pictures,
            world.meta_download,
            world.other_downloads,
            world.yaml_of_checkpoints,
            world.base_tokens,
        ),
        links=(("runs/NAME", "runs/quickstart"), ("runs/image_tokenizer", "runs/quickstart/image_tokenizer")),
        first=(r"^mixmodal (import|export) ",),
    ),
    "docs/classifiers.md": Story(
        leaves=(
            "under_shift/shift/records.jsonl",
            "under_shift/cues/records.jsonl",
            "under_shift/confusion.png",
            "weighted/measured.json",
            "matched/summary.json",
        ),
        slow=True,
        made=(world.labelled_pictures, world.compositions, world.diffusers_folder),
        modules=("diffusers",),
        links=(("EXPORT", EXPORT), ("CLIP_FOLDER", "runs/quickstart/encoder/export")),
        given=lambda root: {"pictures": [picture("PICTURES/circle/0.png", root)]},
    ),
    "docs/configs.md": Story(made=(world.own_pictures,), links=(("runs/own/tokens", "runs/quickstart/tokens/train"),)),
    "docs/data.md": Story(
        leaves=(
            "runs/memory/part_00000.vectors.npy",
            "runs/candidates/manifest.json",
        ),
        links=(
            ("runs/shards", "runs/quickstart/data/train"),
            ("runs/tokens", "runs/quickstart/tokens/train"),
            ("runs/encoder", "runs/quickstart/encoder"),
        ),
    ),
    "docs/evaluation.md": Story(
        leaves=(
            "runs/NAME/evaluation/evaluation.html",
            "runs/NAME/evaluation/evaluation.json",
        ),
        slow=True,
        links=(("runs/NAME", "runs/quickstart"),),
    ),
    "docs/extending.md": Story(),
    "docs/finetune.md": Story(
        leaves=(
            "runs/quickstart/finetune.html",
            "runs/finetune_lora/adapter/rows.safetensors",
            "runs/dpo_chameleon/reference.json",
            "runs/preferences/preferences.jsonl",
        ),
        slow=True,
        made=(world.chameleon, world.conversations),
        first=(
            r"^mixmodal prepare",
            r"configs/train/finetune_",
            r"^mixmodal prefer ",
            r"^mixmodal finetune",
        ),
        given=lambda root: {"MixedModal": MixedModal},
    ),
    "docs/formats.md": Story(),
    "docs/launching.md": Story(
        slow=True,
    ),
    "docs/retrieval.md": Story(
        leaves=(
            "worth.json",
            "samples/results.json",
        ),
        made=(world.labelled_pictures, world.training_file),
        links=(
            ("EXPORT", EXPORT),
            ("DIR", "runs/quickstart/data/train"),
            ("TOKENS", "runs/quickstart/tokens/train"),
            ("ENCODER", "runs/quickstart/encoder/export"),
            ("HELD_OUT_DIR", "runs/quickstart/data/heldout"),
            ("HELD_OUT", "runs/quickstart/tokens/heldout"),
            ("FILE", "classes.txt"),
        ),
    ),
    "docs/sampling.md": Story(
        leaves=(
            "samples/results.jsonl",
            "samples/apple_0000.png",
            "filled/results.json",
        ),
        slow=True,
        made=(world.prompt_files, world.lumina),
        links=(("EXPORT", EXPORT),),
        given=names_of_sampling,
    ),
    "docs/serve.md": Story(slow=True, modules=("gradio",)),
    "docs/stability.md": Story(
        slow=True,
    ),
    "docs/tokenizers.md": Story(made=(world.other_downloads,)),
    "configs/classify": Story(made=(world.labelled_pictures,), links=(("runs/NAME", "runs/quickstart"),)),
    "configs/data": Story(
        made=(world.own_pictures, world.chameleon, world.conversations, world.scenes),
        links=(
            ("my_pictures", "pictures"),
            ("MY_PICTURES", "pictures"),
            ("cc12m", "runs/quickstart/data/train"),
            ("runs/text_tokenizer", "runs/quickstart/text_tokenizer"),
            ("runs/image_tokenizer", "runs/quickstart/image_tokenizer"),
        ),
    ),
    "configs/sample": Story(
        slow=True,
        made=(
            *(world.prompt_files, world.lumina, world.chameleon, world.conversations, world.conversation_shards),
            world.scenes,
        ),
        links=(("runs/NAME", "runs/quickstart"), ("runs/scenes/tuned", "runs/quickstart")),
    ),
    "configs/tasks": Story(made=(world.chameleon, world.conversations)),
    "configs/tokenizers": Story(
        made=(world.other_downloads,),
        links=(
            ("shards", "runs/quickstart/data"),
            ("runs/shards/train", "runs/quickstart/data/train"),
            ("runs/shards/held_out", "runs/quickstart/data/heldout"),
        ),
        first=(r"^python benchmarks/",),
    ),
    "configs/train": Story(
        slow=True,
        made=(world.meta_download, world.conversations, world.shards_of_classes, world.scene_tokens),
        links=(
            ("MODEL", "models/chameleon_7b"),
            ("TOKENS", "runs/quickstart/tokens/train"),
            ("runs/own/tokens", "runs/quickstart/tokens/train"),
            ("runs/finetune_chameleon/export", "models/chameleon_7b"),
        ),
        first=(r"^mixmodal train-encoder", r"^python benchmarks/", r"^mixmodal (prepare|import)"),
    ),
}


def pages_of(name: str) -> list[str]:
    """The pages of a story: itself, or the configs of a folder."""
    inside = [path.relative_to(ROOT).as_posix() for path in CONFIGS if path.parent == ROOT / name]
    return inside or [name]


def in_order(name: str) -> list[Shown | Block]:
    """What a story runs: commands and Python blocks of its pages, in the order that they need."""
    found: list[Shown | Block] = []
    for page in pages_of(name):
        runs = [one for one in commands_of(page) if one.words[0] not in CHECKED and not needs_of(one)]
        code = [block for block in blocks(page) if block.language == "python"]
        found += sorted([*runs, *code], key=lambda one: one.line)

    def place(one: Shown | Block) -> int:
        patterns = STORIES[name].first
        matched = [number for number, pattern in enumerate(patterns) if re.search(pattern, one.text)]
        return matched[0] if matched else len(patterns)

    return sorted(found, key=place)
