"""Configs as dataclasses: from arguments and YAML files, and back. A wrong key is named with the nearest one."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from mixmodal.files import write_whole

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


SHORT_NAMES = {"deepspeed": "trainer.deepspeed"}
"""Options by a shorter name, in commands that have the longer one."""


class UsageError(ValueError):
    """Arguments or a config file that do not fit the command; the message is one line."""


def parse(config_type: type[Any], argv: Sequence[str], prog: str = "mixmodal") -> Any:
    """Arguments to an instance of the dataclass `config_type`.

    Raises:
        UsageError: for an unknown key, with the nearest one, and for a value that does not fit its type.
        SystemExit: after `--help` and `--print_config`.
    """
    from jsonargparse import ArgumentError

    known = dict(config_keys(config_type))
    parser = build_parser(config_type, prog)
    try:
        arguments = spell_options(argv, known)
        if hasattr(config_type, "read_arguments"):
            arguments = config_type.read_arguments(arguments)
        _check_options(arguments, known)
        namespace = parser.instantiate(parser.parse_args(arguments))
        return config_type(**{field.name: namespace[field.name] for field in fields(config_type)})
    except UsageError:
        raise
    except (ArgumentError, ValueError) as error:
        raise UsageError(_readable(str(error))) from error


def load_config(config_type: type[Any], path: Path) -> Any:
    """The config in the YAML file `path`, checked like that of `--config`."""
    return parse(config_type, ["--config", str(path)])


def save_config(config: Any, path: Path) -> None:
    """Writes a config dataclass as YAML; `load_config` is the inverse."""
    import yaml

    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, yaml.safe_dump(plain(config), sort_keys=False, width=120).encode())


def plain(value: Any) -> Any:
    """Dataclasses, paths and tuples to what YAML and JSON can hold."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def build_parser(config_type: type[Any], prog: str) -> ArgumentParser:
    """A parser with one option a config key, `--config` and `--print_config`."""
    from jsonargparse import ArgumentParser

    summary = inspect.cleandoc((config_type.__doc__ or "").partition("Args:")[0])
    parser = ArgumentParser(prog=prog, description=summary, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below; later options win.")
    parser.add_class_arguments(config_type, as_group=False)
    return parser


def config_keys(config_type: type[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names of all keys of a config type, those of nested dataclasses too, each with its annotation."""
    hints = get_type_hints(config_type)
    for field in fields(config_type):
        annotation = hints[field.name]
        yield prefix + field.name, annotation
        for option in (annotation, *get_args(annotation)):
            if isinstance(option, type) and is_dataclass(option):
                yield from config_keys(option, f"{prefix}{field.name}.")


def spell_options(argv: Sequence[str], known: Mapping[str, Any]) -> list[str]:
    """Options in full: `--gpu-memory` is `--gpu_memory`, and `--deepspeed` is `--trainer.deepspeed`.

    Raises:
        UsageError: for an option that is given by both of its names.
    """
    spelled, names = [], [argument.partition("=")[0] for argument in argv]
    for argument, name in zip(argv, names):
        key = name.removeprefix("--")
        full = SHORT_NAMES.get(key, key)
        if full != key and full in known and f"--{full}" in names:
            raise UsageError(f"{name} and --{full} are the same option; give one of them")
        full = full.replace("-", "_")
        rewritten = name.startswith("--") and key not in known and full in (*known, "print_config")
        spelled.append(f"--{full}{argument[len(name) :]}" if rewritten else argument)
    return spelled


def _check_options(argv: Sequence[str], known: Mapping[str, Any]) -> None:
    """Refuses unknown options and unknown keys of `--config` files before the parser words it less clearly."""
    for index, argument in enumerate(argv):
        if not argument.startswith("--") or argument == "--":
            continue
        key, _, value = argument[2:].partition("=")
        if key == "config":
            value = value or (argv[index + 1] if index + 1 < len(argv) else "")
            if not value or value.startswith("--"):
                raise UsageError("--config needs a value, a YAML file")
            _check_file(Path(value), known)
        elif key not in ("help", "print_config") and not _is_known(key.removesuffix(".help"), known):
            raise UsageError(f"there is no option --{key}{suggestion(key, known, '--')}")


def read_yaml(path: Path, option: str = "") -> dict[str, Any]:
    """The keys and values of a YAML file; none of an empty one.

    Args:
        option: that gave the file, for messages.

    Raises:
        UsageError: naming the file, where it can not be read or holds something else.
    """
    import yaml

    name = f"{option} {path}".strip()
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{name}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{name}: not valid YAML: {one_line(str(error))}") from error
    if data is not None and not isinstance(data, dict):
        raise UsageError(f"{name}: it holds a {type(data).__name__}; keys and values are expected")
    return data or {}


def _check_file(path: Path, known: Mapping[str, Any]) -> None:
    for key in _nested_keys(read_yaml(path, "--config")):
        if not _is_known(key, known):
            raise UsageError(f"--config {path}: there is no key {key!r}{suggestion(key, known)}")


def _nested_keys(data: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    for key, value in data.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _nested_keys(value, f"{prefix}{key}.")


def _is_known(key: str, known: Mapping[str, Any]) -> bool:
    """Whether `key` is a key, or lies inside one whose type takes any keys (a mapping) or a list (`key+`)."""
    key = key.removesuffix("+")
    if key in known:
        return True
    parents = [name for name in known if key.startswith(f"{name}.")]
    return any("dict" in str(known[name]).lower() or "mapping" in str(known[name]).lower() for name in parents)


def suggestion(key: str, known: Mapping[str, Any], lead: str = "") -> str:
    """`; did you mean ...?` with the nearest key: by its whole name, else by its last part anywhere in the tree."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:
        leaves = {name.rsplit(".", 1)[-1]: name for name in reversed([*known])}
        near = [leaves[leaf] for leaf in difflib.get_close_matches(key.rsplit(".", 1)[-1], leaves, n=1, cutoff=0.6)]
    return f"; did you mean {lead}{near[0]}?" if near else ""


def check_least(config: Any, least: int, *names: str, section: str = "") -> None:
    """Whether fields of a config are at least so large; null is not compared.

    Args:
        section: that the config is of, with its dot, for the message.

    Raises:
        ValueError: naming the first that is not.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{section}{name} is {value}; it must be at least {least}")


OPTIONAL = re.compile(
    r"Does not validate against any of the Union subtypes Subtypes: .*? Errors: - (.*) - Expected a NoneType "
    r"Given value type: .*? Given value: (.*)$"
)
"""How jsonargparse words what is wrong with a value that may be null."""


def _readable(message: str) -> str:
    message = one_line(re.sub(r'Parser key "([^"]+)":\s*', r"\1: ", message))
    message = re.sub(r"<class '([\w.]+)'>", r"\1", message)
    while found := OPTIONAL.search(message):
        is_section = re.match(r"(Namespace|NestedArg)\(", found[2])  # of which the key at fault is named
        message = message[: found.start()] + found[1] + ("" if is_section else f". Got value: {found[2]}")
    message = re.sub(r"Problem with given class_path '[\w.]+': ", "", message)
    message = re.sub(r"Expected an? (.*)\. Got value: ", r"expected \1, got ", message)
    return message.replace("typing.Literal", "one of ")


def one_line(message: str) -> str:
    return " ".join(message.split()) or "no message"
