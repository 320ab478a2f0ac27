"""Models of ours into folders that other software loads: the command `mixmodal export`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mixmodal.files import check_new_folder

Target = Literal["mixmodal", "transformers", "transformers-4.43", "anole", "meta"]
POSITIONS = ("--model", "--out")
"""What the first arguments are where they stand alone."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What to export, and where to: `mixmodal export DIR OUT --to transformers`.

    Networks with QK-norm, of Chameleon's block, become Chameleon models; those without become Llamas. Others, such as
    CM3Leon's, have no class in transformers and are refused. Tensors are copied one by one.

    Args:
        model: folder of a model of ours, such as `runs/NAME/export`, or a hub id.
        out: folder for the export; it must be empty or new.
        adapter: folder of an adapter of the model, as `runs/NAME/adapter`, which is merged into what is written.
        to: `transformers` for what `ChameleonForConditionalGeneration.from_pretrained` and its processor load today,
            `transformers-4.43` as that version stored models (Lumina-mGPT's weights), `anole` as Anole's fork does, or
            `meta` for the files of Chameleon's own code;
            `mixmodal` for an exported folder of ours, with the adapter in its weights.
        num_shards: shards of `meta` and QK-norm sets of `transformers-4.43`; 0 takes as few as the model allows.
        allow_lossy: average QK-norms that the layout can not hold, which changes what the model says.
    """

    model: str
    out: Path
    adapter: Path | None = None
    to: Target = "transformers"
    num_shards: int = 0
    allow_lossy: bool = False

    def __post_init__(self) -> None:
        check_new_folder(self.out, "out")
        if self.allow_lossy and self.to in ("transformers", "mixmodal"):
            raise ValueError(f"allow_lossy can not act: {self.to} has a QK-norm for every head; leave it out")
        if self.to == "mixmodal" and (self.adapter is None or self.num_shards):
            raise ValueError("to is mixmodal, which merges an adapter: give --adapter DIR, and leave num_shards out")
        if self.num_shards < 0:
            raise ValueError(f"num_shards is {self.num_shards}; at least 0 is needed")

    @staticmethod
    def read_arguments(argv: list[str]) -> list[str]:
        """Lets the folders stand alone, in the first places."""
        found = []
        for option in POSITIONS:
            if argv and not argv[0].startswith("-"):
                found += [option, argv[0]]
                argv = argv[1:]
        return [*found, *argv]


def say_shards(number: int) -> str:
    """Shards in words."""
    return "1" if number == 1 else f"{number}, each with QK-norms of its own"


def export_model(config: ExportConfig) -> None:
    """Writes the folder, and says what is in it and what is not.

    Raises:
        ValueError: naming folder and key, for a model that the layout can not hold.
        OSError: where the disk is full.
    """
    from mixmodal.interop.adapter_files import load_adapter, save_merged
    from mixmodal.interop.adapters import MergedWeights
    from mixmodal.interop.chameleon.writing import gather_export, write_exported
    from mixmodal.interop.export import find_export

    folder = find_export(config.model)
    adapter = None if config.adapter is None else load_adapter(config.adapter)
    if adapter and config.to == "mixmodal":
        return say({"layout": config.to, "weights": save_merged(folder, adapter, config.out)}, config.out)
    layout = None if config.to in ("mixmodal", "transformers") else config.to
    found = gather_export(folder, layout, config.num_shards)
    if adapter:
        adapter.check_base(folder)
        found = replace(found, weights=MergedWeights(found.weights, adapter))
    lines: dict[str, str | int] = {"layout": found.layout.name}
    lines["weights"] = write_exported(found, config.out, allow_lossy=config.allow_lossy)
    if found.layout.norms == "shard":
        lines["shards"] = say_shards(found.num_sets)
    for number, one in enumerate(found.missing, 1):
        lines[f"left out {number}" if len(found.missing) > 1 else "left out"] = one
    say(lines, config.out)


def say(lines: Mapping[str, str | int], out: Path) -> None:
    """Prints what is in a folder; numbers are bytes."""
    from mixmodal.weights import say_size

    for name, value in {**lines, "written to": str(out)}.items():
        print(f"{name:>15}  {say_size(value) if isinstance(value, int) else value}")
