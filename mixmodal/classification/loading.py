"""Diffusion models from folders and from the hub, as adapters."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from mixmodal.classification.adapter_base import Adapter, Conditions
from mixmodal.classification.adapters import Labelled, find_family
from mixmodal.classification.denoiser import DESCRIPTION, load_denoiser
from mixmodal.files import read_object
from mixmodal.hub import HUB_ID, find_folder, reason_of
from mixmodal.models.denoiser import import_diffusers

UNETS = ("UNet2DModel", "UNet2DConditionModel")
BARE_FILES = ("denoiser.json", "classes.txt", "text_*", "unet/*.json", "unet/*.safetensors", "scheduler/*.json")
"""Of folders that name no pipeline."""
KIND = "a pipeline of diffusers or a denoiser"


class LoadedModel(NamedTuple):
    """A model ready to score.

    Args:
        adapter: in evaluation mode, on its device.
        name: the folder or hub id that it was asked for by.
        revision: what tells versions of a name apart: the commit of a hub's snapshot, or a hash of the folder's files
            by name, size and time of change.
    """

    adapter: Adapter
    name: str
    revision: str


def load_model(
    source: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    image_size: int | None = None,
    names: dict[str, int] | None = None,
    encode: Callable[[Sequence[str]], Conditions] | None = None,
) -> LoadedModel:
    """A diffusion model from safetensors alone; no code of its folder is run.

    Three layouts are known. A pipeline of diffusers has a `model_index.json`, which names the class of the pipeline
    and its parts. What `mixmodal train-diffusion` exports has a `denoiser.json`, see `load_denoiser`. A bare denoiser
    has

        unet/config.json            of a UNet2DModel or UNet2DConditionModel, in pixels
        unet/diffusion_pytorch_model.safetensors
        scheduler/scheduler_config.json

    and is told numbers of classes (`num_class_embeds`), or features of texts that `encode` makes.

    Args:
        source: a folder, or `OWNER/NAME` or `OWNER/NAME@REVISION` on the Hugging Face hub.
        dtype: of the denoiser and the text encoders; the autoencoder stays in float32, since some overflow in float16.
        image_size: side of the pictures in pixels; None for what the model was made for.
        names: of a bare denoiser's classes, or of DiT's.
        encode: for a bare denoiser that reads texts: prompts to what its U-Net is called with beside pictures and
            times, each with the prompts in the first dimension.

    Raises:
        ValueError: naming the source: not there, of an unknown family, or without safetensors; or where diffusers is
            not installed.
    """
    import_diffusers()
    folder = find_pipeline(source)
    try:
        if (folder / "model_index.json").is_file():
            family = read_object(folder / "model_index.json").get("_class_name")
            build = find_family(str(family))
            if build is not Labelled and (names is not None or encode is not None):
                raise ValueError(f"names and encode are for bare denoisers and DiT; {family} encodes text itself")
            pipe = load_pipeline(folder, str(family), dtype).to(device)
        elif (folder / DESCRIPTION).is_file():
            if names is not None or encode is not None:
                raise ValueError(f"names and encode are for bare denoisers; the folder of a {DESCRIPTION} has its own")
            loaded = load_denoiser(folder, device)
            build, encode = Labelled, loaded.encode
            pipe = SimpleNamespace(unet=torch.nn.Module.to(loaded.unet, dtype), scheduler=loaded.scheduler)
        else:
            build, pipe = Labelled, load_bare(folder, dtype, device)
        for part in vars(pipe).values():
            if isinstance(part, torch.nn.Module):
                part.eval().requires_grad_(False)
        if build is Labelled:
            adapter: Adapter = Labelled(pipe, image_size, names, encode)
        else:
            adapter = build(pipe, image_size)
    except (OSError, ValueError) as error:
        raise ValueError(f"diffusion model {source}: {reason_of(error)}") from error
    return LoadedModel(adapter, str(source), revision_of(folder))


def find_pipeline(source: Path | str) -> Path:
    """A local folder as it is; else the snapshot of a hub id, of the files that its pipeline needs.

    Raises:
        ValueError: where there is neither, or the pipeline is of an unknown family.
    """
    if Path(source).is_dir() or not HUB_ID.fullmatch(str(source)):
        return find_folder(source, BARE_FILES, KIND)
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    name, _, revision = str(source).partition("@")
    try:
        index = hf_hub_download(name, "model_index.json", revision=revision or None)
    except EntryNotFoundError:
        return find_folder(source, BARE_FILES, KIND)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"there is no folder {source}, and the Hugging Face hub does not give it: {reason_of(error)}"
        ) from error
    find_family(str(read_object(Path(index)).get("_class_name")))  # before gigabytes are fetched
    try:
        return Path(DiffusionPipeline.download(name, revision=revision or None, use_safetensors=True))
    except (OSError, ValueError) as error:
        raise ValueError(f"the Hugging Face hub does not give the pipeline {source}: {reason_of(error)}") from error


def load_pipeline(folder: Path, family: str, dtype: torch.dtype) -> Any:
    """The pipeline of a folder, without its safety checker."""
    import diffusers

    spared = {}
    if family == "StableDiffusionPipeline":
        spared = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = getattr(diffusers, family).from_pretrained(
        folder,
        dtype={"vae": torch.float32, "default": dtype},
        use_safetensors=True,
        local_files_only=True,
        **spared,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_bare(folder: Path, dtype: torch.dtype, device: torch.device | str) -> Any:
    """The U-Net and scheduler of a folder that names no pipeline.

    Raises:
        ValueError: where the folder has neither layout.
    """
    import diffusers

    config = folder / "unet" / "config.json"
    if not config.is_file() or not (folder / "scheduler" / "scheduler_config.json").is_file():
        raise ValueError(
            "there is neither model_index.json, nor denoiser.json, nor unet/config.json with "
            "scheduler/scheduler_config.json"
        )
    name = read_object(config).get("_class_name")
    if name not in UNETS:
        raise ValueError(f"unet/config.json is of the class {name}; known are {' and '.join(UNETS)}")
    scheduler = str(read_object(folder / "scheduler" / "scheduler_config.json").get("_class_name"))
    if not (scheduler.endswith("Scheduler") and hasattr(diffusers, scheduler)):
        raise ValueError(f"scheduler/scheduler_config.json is of the class {scheduler}, which diffusers does not have")
    unet = getattr(diffusers, name).from_pretrained(
        folder / "unet", dtype=dtype, use_safetensors=True, low_cpu_mem_usage=False
    )
    return SimpleNamespace(
        unet=unet.to(device),
        scheduler=getattr(diffusers, scheduler).from_pretrained(folder / "scheduler"),
    )


def revision_of(folder: Path) -> str:
    """The commit of a hub's snapshot, else a SHA-256 of the names, sizes and times of change of the folder's files."""
    if folder.parent.name == "snapshots":
        return folder.name
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            status = os.stat(path)
            digest.update(f"{path.relative_to(folder)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
