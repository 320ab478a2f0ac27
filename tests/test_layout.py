"""The shape of the house: floors, script folders, file sizes, configs that load and fields that are read."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from mixmodal.cli import COMMANDS
from mixmodal.config import load_config, parse

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mixmodal"
TOP_LEVEL = {
    *("pyproject.toml", "mixmodal", "tokenizers", "train", "sample", "tests", "configs"),
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "SECURITY.md", "CITATION.cff"),
    *("Makefile", "constraints.txt", "mkdocs.yml", "Dockerfile", "benchmarks", "docs"),
}
SCRIPT_FOLDERS = ("tokenizers", "train", "sample")
FLOORS = {
    "environment": 0,
    "extras": 0,
    "files": 0,
    "hub": 0,
    "ragged": 0,
    "vocabulary": 0,
    "weights": 0,
    "config": 1,
    "manifests": 1,
    "document": 1,
    "records": 1,
    "models": 1,
    "tokenization": 2,
    "retrieval": 2,
    "objectives": 2,
    "data": 3,
    "classification": 4,
    "sampling": 4,
    "evaluation": 5,
    "interop": 5,
    "training": 6,
    "pipeline": 7,
    "serve": 8,
    "quickstart": 9,
    "cli": 10,
}
# configs/FOLDER/*.yaml holds the config of this command, unless the file's stem is listed with another
CONFIG_TYPES = {
    "train": "pretrain",
    "data": "prepare",
    "sample": "generate",
    "classify": "classify",
    "train/demo_encoder": "train-encoder",
    "train/demo_diffusion": "train-diffusion",
    "train/diffusion_classes": "train-diffusion",
    "train/finetune_chameleon": "finetune",
    "train/finetune_cm3leon": "finetune",
    "train/finetune_lora": "finetune",
    "train/dpo_chameleon": "finetune",
    "train/scenes": "finetune",
    "sample/evaluate": "evaluate",
    "sample/evaluate_scenes": "evaluate",
    "sample/prefer": "prefer",
    "tokenizers/train_text": "train-text-tokenizer",
    "tokenizers/train_image": "train-image-tokenizer",
    "tokenizers/evaluate_image": "evaluate-image-tokenizer",
}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Full names that a file imports from the package, those inside functions and for types alone too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] == "mixmodal")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mixmodal":
            yield from (f"{node.module}.{name.name}" for name in node.names)


def room(name: str) -> str | None:
    """The room of a full module name; None for the package itself, which offers names of several."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FLOORS else None


def test_the_top_level_holds_what_it_should() -> None:
    """Others may lie about on a machine where the tree is worked in: of those, files that git would take are seen."""
    missing = {name for name in TOP_LEVEL if not (ROOT / name).exists()}
    stray = {path.name for path in ROOT.iterdir() if path.suffix in (".md", ".py", ".toml", ".yml", ".yaml", ".cfg")}
    assert (missing, stray - TOP_LEVEL) == (set(), set())


def test_every_room_has_a_floor() -> None:
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in sources()} - {"__init__"}
    assert rooms <= set(FLOORS)


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_a_room_imports_only_from_floors_below_it(path: Path) -> None:
    own = room(module_name(path))
    if own is None:
        return
    wrong = [
        name for name in imports(path) if (other := room(name)) not in (None, own) and FLOORS[other] >= FLOORS[own]
    ]
    assert not wrong, f"{own} (floor {FLOORS[own]}) imports {wrong}"


def test_no_import_cycles() -> None:
    modules = {module_name(path): path for path in sources()}
    edges: dict[str, set[str]] = {}
    for name, path in modules.items():
        found = {other if other in modules else other.rsplit(".", 1)[0] for other in imports(path)}
        edges[name] = {other for other in found if other in modules and other != name}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in edges[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in edges:
        visit(name, ())


@pytest.mark.parametrize(
    "path", [*sources(), *ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/*.py")], ids=module_name
)
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 400


def test_no_rooms_for_odds_and_ends() -> None:
    assert not [path for path in sources() if path.stem in ("utils", "util", "helpers", "misc", "common")]


def test_only_the_engine_imports_deepspeed() -> None:
    users = [path for path in sources() if any(name.split(".")[0] == "deepspeed" for name in foreign_imports(path))]
    assert [path.relative_to(PACKAGE).as_posix() for path in users] in ([], ["training/engine.py"])


def foreign_imports(path: Path) -> Iterator[str]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_script_folders_hold_short_scripts_and_nothing_importable() -> None:
    libraries = {"types", "profile", "sentencepiece", "deepspeed", "torch", "numpy", *sys.stdlib_module_names}
    for folder in SCRIPT_FOLDERS:
        assert (ROOT / folder).is_dir(), folder
        for path in (ROOT / folder).rglob("*"):
            if "__pycache__" in path.parts:
                continue
            assert path.suffix == ".py", path
            assert path.name != "__init__.py", path
            assert not path.stem.startswith("test"), path
            assert path.stem not in libraries, path
            assert len(path.read_text().splitlines()) <= 40, path
            assert ast.get_docstring(tree(path)), f"{path}: no docstring with the command line"
    assert not list((ROOT / "configs").rglob("*.py"))


def config_type(command: str) -> type[Any]:
    entry = COMMANDS[command]
    return getattr(importlib.import_module(entry.module), entry.config)


def yaml_files() -> list[Path]:
    return sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", yaml_files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_config_file_loads(path: Path) -> None:
    name = path.relative_to(ROOT / "configs").with_suffix("").as_posix()
    if name.startswith("model/"):
        from mixmodal.models.transformer import TransformerConfig

        load_config(TransformerConfig, path)
        return
    if name.startswith("tasks/"):
        from mixmodal.data.tasks import TaskTemplates

        TaskTemplates.load(path)
        return
    if name.startswith("tokenizers/") and name not in CONFIG_TYPES:
        command = "train-image-tokenizer"
    else:
        command = CONFIG_TYPES.get(name) or CONFIG_TYPES.get(name.split("/")[0])
    assert command, f"{path}: say in CONFIG_TYPES which command reads it"
    parse(config_type(command), ["--config", str(path), *missing(config_type(command), path)])


def missing(config: type[Any], path: Path) -> list[str]:
    """Values for the required keys that the command line of a file's first comment gives."""
    given = yaml.safe_load(path.read_text())
    required = [field.name for field in fields(config) if field.default is field.default_factory is MISSING]
    return [argument for name in required if name not in given for argument in (f"--{name}", "given")]


def test_every_recipe_file_loads(tmp_path: Path) -> None:
    from mixmodal.quickstart.recipe import ENTRIES, TUNING, load_recipe

    for entries in (ENTRIES, TUNING):
        assert load_recipe(tmp_path, entries=entries)


def test_deepspeed_files_are_json() -> None:
    import json

    for path in (ROOT / "configs" / "deepspeed").iterdir():
        assert isinstance(json.loads(path.read_text()), dict), path


def nested(config: type[Any]) -> Iterator[type[Any]]:
    yield config
    for annotation in get_type_hints(config).values():
        for option in (annotation, *get_args(annotation)):
            if isinstance(option, type) and is_dataclass(option):
                yield from nested(option)


@cache
def names_read() -> frozenset[str]:
    """Every name that is read as an attribute somewhere in the package."""
    found = set()
    for path in sources():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
    return frozenset(found)


def config_types() -> list[type[Any]]:
    """Of the commands and of the files of the quickstart's recipe."""
    from mixmodal.quickstart.recipe import ENTRIES, TUNING

    entries = (*ENTRIES.values(), *TUNING.values())
    files = [getattr(importlib.import_module(entry.module), entry.config) for entry in entries]
    return list(dict.fromkeys([*(config_type(command) for command in COMMANDS), *files]))


CONFIGS = pytest.mark.parametrize("config", config_types(), ids=lambda config: config.__name__)


def test_the_recipe_has_config_types_that_no_command_has() -> None:
    commands = {config_type(command) for command in COMMANDS}
    assert {"SamplesConfig", "ClassesConfig", "DemoCorpusConfig"} <= {
        config.__name__ for config in config_types() if config not in commands
    }


@CONFIGS
def test_every_config_field_is_read(config: type[Any]) -> None:
    unread = {
        f"{part.__name__}.{field.name}"
        for part in nested(config)
        for field in fields(part)
        if field.name not in names_read()
    }
    assert not unread


@CONFIGS
def test_every_config_field_is_documented(config: type[Any]) -> None:
    for part in nested(config):
        lines = [line for kind in part.__mro__ for line in (kind.__doc__ or "").splitlines()]
        documented = {line.strip().split(":")[0] for line in lines if ":" in line}
        assert {field.name for field in fields(part)} <= documented, part.__name__


def test_importing_the_package_pulls_no_heavy_library() -> None:
    import subprocess

    heavy = {"torch", "deepspeed", "transformers", "huggingface_hub"}
    program = f"import sys, mixmodal; assert not {heavy} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
