"""The console command `mixmodal`: one subcommand a stage, each a dataclass of options and one function.

    mixmodal COMMAND [--config FILE.yaml] [--key value ...] [--print_config] [--debug]

The scripts in tokenizers/, train/ and sample/ call `command` with the same pair, so that both doors lead to one room.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from mixmodal.config import UsageError, one_line, parse, suggestion


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
        "mixmodal.training.text_tokenizer",
        "TextTokenizerTrainingConfig",
        "train_text_tokenizer_on_shards",
        "BPE with byte fallback on the texts of shards",
    ),
    "train-image-tokenizer": Subcommand(
        "mixmodal.training.image_tokenizer",
        "ImageTokenizerTrainingConfig",
        "train_image_tokenizer",
        "pictures to codes and back",
    ),
    "evaluate-image-tokenizer": Subcommand(
        "mixmodal.evaluation.reconstruction",
        "ImageTokenizerEvaluationConfig",
        "evaluate_image_tokenizer",
        "PSNR, SSIM, distances of networks, share of codes used",
    ),
    "pretrain": Subcommand("mixmodal.training.pretrain", "PretrainConfig", "pretrain", "trains the transformer"),
    "finetune": Subcommand(
        "mixmodal.training.finetune", "FinetuneConfig", "finetune", "tunes a trained one on conversations"
    ),
    "train-encoder": Subcommand(
        "mixmodal.training.contrastive",
        "EncoderTrainingConfig",
        "train_encoder",
        "texts and pictures to one space of vectors",
    ),
    "train-diffusion": Subcommand(
        "mixmodal.training.diffusion",
        "DiffusionTrainingConfig",
        "train_diffusion",
        "denoisers that are told classes or texts",
    ),
    "index": Subcommand(
        "mixmodal.data.indexing", "MemoryConfig", "build_memory", "a memory that documents are retrieved from"
    ),
    "retrieve": Subcommand(
        "mixmodal.data.retrieving", "RetrieveConfig", "retrieve", "the candidates of each training document"
    ),
    "plan": Subcommand("mixmodal.training.plan", "PlanConfig", "plan", "memory of a training on each GPU, beforehand"),
    "generate": Subcommand(
        "mixmodal.pipeline.generate", "GenerateConfig", "generate", "texts and pictures; fills holes"
    ),
    "prefer": Subcommand(
        "mixmodal.pipeline.prefer", "PreferConfig", "prefer", "pairs of answers by best-of-N and a judge"
    ),
    "classify": Subcommand("mixmodal.pipeline.classify", "ClassifyConfig", "classify", "zero-shot, by likelihood"),
    "match": Subcommand(
        "mixmodal.pipeline.match", "MatchConfig", "match", "pictures with captions of the same words in another order"
    ),
    "evaluate": Subcommand(
        "mixmodal.pipeline.evaluate", "EvaluateConfig", "evaluate", "metrics of pictures, captions, answers, texts"
    ),
    "evaluate-retrieval": Subcommand(
        "mixmodal.pipeline.evaluate_retrieval",
        "RetrievalEvaluationConfig",
        "evaluate_retrieval",
        "what documents of a memory are worth",
    ),
    "serve": Subcommand("mixmodal.serve.server", "ServeConfig", "serve", "a web page: chat with pictures, and editing"),
    "import": Subcommand(
        "mixmodal.interop.importing",
        "ImportConfig",
        "import_checkpoint",
        "models and image tokenizers of other projects",
    ),
    "export": Subcommand(
        "mixmodal.interop.exporting", "ExportConfig", "export_model", "models as other software loads them"
    ),
    "inspect": Subcommand("mixmodal.data.inspect", "InspectConfig", "inspect", "packed training rows in colour"),
}


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
        _fail("mixmodal", f"there is no command {name!r}{suggestion(name, COMMANDS)}; see mixmodal --help", 2)
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
        return one_line(str(error))
    if isinstance(error, ModuleNotFoundError):
        return f"{one_line(str(error))}; install what is missing with: pip install 'mixmodal[demo]'"
    if isinstance(error, AssertionError) and "not compiled with CUDA" in str(error):
        return "the torch that is installed here has no CUDA, which the chosen device needs; choose cpu"
    return f"{type(error).__name__}: {one_line(str(error))} (--debug shows where)"


def _fail(prog: str, message: str, code: int) -> NoReturn:
    print(f"{prog}: error: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
