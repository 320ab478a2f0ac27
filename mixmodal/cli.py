"""The console command `mixmodal`: one subcommand a stage, each a dataclass of options and one function.

    mixmodal COMMAND [--config FILE.yaml] [--key value ...] [--print_config] [--debug]

The scripts in tokenizers/, train/ and sample/ call `command` with the same pair, so that both doors lead to one room.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, get_args, get_type_hints

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


class Subcommand(NamedTuple):
    """Where a subcommand lives: imported when it is called, so that `mixmodal --help` answers at once."""

    module: str
    config: str
    function: str
    help: str


COMMANDS: dict[str, Subcommand] = {
    "quickstart": Subcommand(
        "mixmodal.quickstart.stages", "QuickstartConfig", "quickstart", "the whole chain on the demo pictures"
    ),
    "prepare": Subcommand(
        "mixmodal.data.corpora", "PrepareConfig", "prepare", "corpora to shards, then to token shards"
    ),
    "train-text-tokenizer": Subcommand(
        "mixmodal.tokenization.text",
        "TextTokenizerConfig",
        "train_text_tokenizer_from_config",
        "BPE on the texts of shards",
    ),
    "train-image-tokenizer": Subcommand(
        "mixmodal.training.image_tokenizer",
        "ImageTokenizerTraining",
        "train_image_tokenizer",
        "pictures to codes and back",
    ),
    "evaluate-image-tokenizer": Subcommand(
        "mixmodal.evaluation.reconstruction",
        "ReconstructionConfig",
        "evaluate_reconstruction",
        "PSNR, SSIM, codes used",
    ),
    "pretrain": Subcommand("mixmodal.training.pretrain", "PretrainConfig", "pretrain", "train the transformer"),
    "generate": Subcommand(
        "mixmodal.sampling.generate", "GenerateConfig", "generate", "texts and pictures from a prompt"
    ),
    "classify": Subcommand(
        "mixmodal.classification.evaluate", "ClassifyConfig", "classify", "zero-shot, by likelihood"
    ),
    "inspect": Subcommand("mixmodal.data.inspect", "InspectConfig", "inspect", "packed training rows in colour"),
}


class UsageError(ValueError):
    """Arguments or a config file that do not fit the command; the message is one line."""


def main(argv: Sequence[str] | None = None) -> None:
    """The console command: finds the subcommand and leaves the rest to `command`.

    Raises:
        SystemExit: 0 after help, 2 for wrong usage, 1 for a failure.
    """
    arguments = _without_launcher(sys.argv[1:] if argv is None else argv)
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(_overview())
        sys.exit(0 if arguments else 2)
    if name == "--version":
        from importlib.metadata import version

        print(f"mixmodal {version('mixmodal')}")
        sys.exit(0)
    if name not in COMMANDS:
        _fail("mixmodal", f"there is no command {name!r}{_suggestion(name, COMMANDS)}; see mixmodal --help", 2)
    entry = COMMANDS[name]
    module = importlib.import_module(entry.module)
    command(getattr(module, entry.config), getattr(module, entry.function), rest, prog=f"mixmodal {name}")


def command(
    config_type: type[Any],
    function: Callable[[Any], object],
    argv: Sequence[str] | None = None,
    prog: str | None = None,
) -> None:
    """Builds `config_type` from arguments and config file, and calls `function` with it.

    A config type with a class method `read_arguments(argv) -> argv` sees the arguments first; it is for options whose
    order matters, such as the parts of a prompt.

    Raises:
        SystemExit: 2 for wrong usage, 1 for a failure, 130 when interrupted. With `--debug` the error itself.
    """
    arguments = _without_launcher(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    prog = prog or Path(sys.argv[0]).name
    try:
        config = parse(config_type, arguments, prog)
        function(config)
    except BrokenPipeError:  # the reader of our output has gone, as in `mixmodal inspect | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        _fail(prog, "interrupted", 130)
    except Exception as error:
        if debug:
            raise
        _fail(prog, _message(error), 2 if isinstance(error, UsageError) else 1)


def parse(config_type: type[Any], argv: Sequence[str], prog: str = "mixmodal") -> Any:
    """Arguments to an instance of the dataclass `config_type`.

    Raises:
        UsageError: for an unknown key, with the nearest one, and for a value that does not fit its type.
        SystemExit: after `--help` and `--print_config`.
    """
    from jsonargparse import ArgumentError

    arguments = config_type.read_arguments(list(argv)) if hasattr(config_type, "read_arguments") else list(argv)
    known = dict(config_keys(config_type))
    _check_options(arguments, known)
    parser = build_parser(config_type, prog)
    try:
        namespace = parser.instantiate(parser.parse_args(arguments))
        return config_type(**{field.name: namespace[field.name] for field in fields(config_type)})
    except (ArgumentError, ValueError) as error:
        raise UsageError(_readable(str(error))) from error


def load_config(config_type: type[Any], path: Path) -> Any:
    """The config in the YAML file `path`, checked like that of `--config`."""
    return parse(config_type, ["--config", str(path)])


def save_config(config: Any, path: Path) -> None:
    """Writes a config dataclass as YAML; `load_config` is the inverse."""
    import yaml

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(plain(config), sort_keys=False, width=120))


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

    summary = (config_type.__doc__ or "").strip().split("\n\n")[0]
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


def _check_options(argv: Sequence[str], known: Mapping[str, Any]) -> None:
    """Refuses unknown options and unknown keys of `--config` files before the parser words it less clearly."""
    for index, argument in enumerate(argv):
        if not argument.startswith("--") or argument == "--":
            continue
        key, _, value = argument[2:].partition("=")
        if key == "config":
            value = value or (argv[index + 1] if index + 1 < len(argv) else "")
            _check_file(Path(value), known)
        elif key not in ("help", "print_config") and not _is_known(key.removesuffix(".help"), known):
            raise UsageError(f"there is no option --{key}{_suggestion(key, known, '--')}")


def _check_file(path: Path, known: Mapping[str, Any]) -> None:
    import yaml

    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not valid YAML: {_one_line(str(error))}") from error
    if data is not None and not isinstance(data, dict):
        raise UsageError(f"--config {path}: it holds a {type(data).__name__}; keys and values are expected")
    for key in _nested_keys(data or {}):
        if not _is_known(key, known):
            raise UsageError(f"--config {path}: there is no key {key!r}{_suggestion(key, known)}")


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


def _suggestion(key: str, known: Mapping[str, Any], lead: str = "") -> str:
    """`; did you mean ...?` with the nearest key: by its whole name, else by its last part anywhere in the tree."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:
        leaves = {name.rsplit(".", 1)[-1]: name for name in reversed([*known])}
        near = [leaves[leaf] for leaf in difflib.get_close_matches(key.rsplit(".", 1)[-1], leaves, n=1, cutoff=0.6)]
    return f"; did you mean {lead}{near[0]}?" if near else ""


def _without_launcher(argv: Sequence[str]) -> list[str]:
    """Drops `--local_rank=N`, which the deepspeed launcher puts before the arguments; the rank is in RANK."""
    return [argument for argument in argv if not argument.startswith(("--local_rank=", "--local-rank="))]


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {entry.help}" for name, entry in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mixmodal COMMAND [--config FILE.yaml] [--key value ...] [--print_config] [--debug]",
            "",
            "Trains and uses models that read and write text and pictures.",
            "",
            *lines,
            "",
            "`mixmodal COMMAND --help` lists the options of a command.",
        ]
    )


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, (ValueError, OSError)):
        return _one_line(str(error))
    if isinstance(error, ModuleNotFoundError):
        return f"{_one_line(str(error))}; install what is missing with: pip install 'mixmodal[demo]'"
    return f"{type(error).__name__}: {_one_line(str(error))} (--debug shows where)"


def _readable(message: str) -> str:
    message = re.sub(r"<class '([\w.]+)'>", r"\1", re.sub(r'Parser key "([^"]+)":\s*', r"\1: ", message))
    message = re.sub(r"Expected an? (.*)\. Got value: ", r"expected \1, got ", _one_line(message))
    return message.replace("typing.Literal", "one of ")


def _one_line(message: str) -> str:
    return " ".join(message.split()) or "no message"


def _fail(prog: str, message: str, code: int) -> NoReturn:
    print(f"{prog}: error: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
