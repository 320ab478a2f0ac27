"""The serve command: loads a model and answers browsers until it is interrupted."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

from mixmodal.config import check_least
from mixmodal.pipeline.drawing_config import DTYPES
from mixmodal.pipeline.mixed_modal import MixedModal
from mixmodal.serve.studio import Studio
from mixmodal.serve.uploads import Limits

SESSIONS = 64
"""Conversations that are kept at a time; the oldest are forgotten."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Serves a web page on which a model is asked for texts and pictures, and pictures are edited.

    One request is answered at a time; the others wait in a queue. The page has no password: whoever reaches the
    address may use it, so by default it is reached from this machine alone.

    Args:
        model: folder of an exported model, or an id on the Hugging Face hub.
        adapter: folder of an adapter of the model, as `runs/NAME/adapter`, which is merged into it; null is none.
        memory: folder of a memory, which `mixmodal index` writes, for documents that are read first; null is none.
        encoder: folder or hub id of the memory's encoder; null is where the memory says that it was.
        host: address that the page is reached at; 0.0.0.0 is every one of this machine.
        port: of it.
        max_queue: requests that may wait; more are turned away.
        max_upload_mb: largest file that may be uploaded, MB.
        max_pixels: largest picture that may be uploaded, width times height.
        max_num: most samples of a request.
        preview_every: codes after which an unfinished picture is shown again; null shows it 16 times.
        turns: whether a prompt ends its turn and earlier ones stand before it in one conversation; null does so where
            the model was tuned on conversations. Otherwise earlier turns are documents that are read first.
        batch_size: samples in one forward; they do not depend on it.
        device: `auto` takes the accelerator where there is one.
        dtype: of the weights.
    """

    model: str
    adapter: Path | None = None
    memory: Path | None = None
    encoder: str | None = None
    host: str = "127.0.0.1"
    port: int = 7860
    max_queue: int = 16
    max_upload_mb: int = 10
    max_pixels: int = 1 << 25
    max_num: int = 4
    preview_every: int | None = None
    turns: bool | None = None
    batch_size: int = 64
    device: str = "auto"
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"

    def __post_init__(self) -> None:
        check_least(self, 1, "max_queue", "max_upload_mb", "max_pixels", "max_num", "preview_every", "batch_size")
        if not 0 < self.port < 1 << 16:
            raise ValueError(f"port is {self.port}; it must lie in 1 .. 65535")
        if self.encoder is not None and self.memory is None:
            raise ValueError("encoder can not act without memory; give --memory DIR, or leave it out")


def serve(config: ServeConfig) -> None:
    """Loads the model and serves the page until it is interrupted.

    Raises:
        ValueError: where gradio is missing, the memory is not the model's, or the port is taken.
    """
    check_gradio()
    how = config.device, DTYPES[config.dtype], config.batch_size, config.adapter
    model = MixedModal.from_pretrained(config.model, *how)
    if config.memory is not None:
        model.attach_memory(config.memory, config.encoder)
    limits = Limits(max_pixels=config.max_pixels, max_num=config.max_num)
    launch(Studio(model, limits, config.preview_every, turns=config.turns), config)


def check_gradio() -> None:
    """Raises:
    ValueError: saying how gradio is installed, where it is missing.
    """
    try:
        import gradio  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ValueError("the web page needs gradio; install it with: pip install 'mixmodal[serve]'") from error


def launch(studio: Studio, config: ServeConfig) -> None:
    """Serves the page; the files of visitors lie in a folder of their own that is gone in the end."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = max(1, config.max_pixels // 2)  # PIL refuses from twice as many on, before decoding
    with tempfile.TemporaryDirectory(prefix="mixmodal-serve-") as folder:
        os.environ.update(quiet_environment(Path(folder)))
        from mixmodal.serve.layout import build_page, build_theme, read_css

        page = build_page(studio, title_of(config.model))
        page.queue(max_size=config.max_queue, default_concurrency_limit=1, api_open=False)
        if not is_local(config.host):
            print(f"anyone who reaches {config.host}:{config.port} may use this page: it has no password", flush=True)
        page.launch(**launch_options(config), theme=build_theme(), css=read_css(), prevent_thread_lock=True)
        print(f"serving {config.model} on http://{config.host}:{config.port} (Ctrl-C ends it)", flush=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the folder goes, too
        try:
            page.block_thread()
        finally:
            page.close()


def quiet_environment(folder: Path) -> dict[str, str]:
    """Variables that keep gradio from calling other machines, reading paths that we do not give it, and counting."""
    return {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_ANALYTICS_MAX_EVENTS": "16",  # gradio goes through all that it keeps behind every request
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "GRADIO_ALLOWED_PATHS": "",
        "GRADIO_SHARE": "False",
        "GRADIO_TEMP_DIR": str(folder),
    }


def launch_options(config: ServeConfig) -> dict[str, Any]:
    """What gradio's server is started with."""
    return {
        "server_name": config.host,
        "server_port": config.port,
        "max_file_size": f"{config.max_upload_mb}mb",
        "allowed_paths": [],
        "share": False,
        "inbrowser": False,
        "show_error": True,
        "quiet": True,
        "footer_links": [],
        "run_history": False,
        "enable_monitoring": False,
        "mcp_server": False,
        "ssr_mode": False,
        "pwa": False,
        "state_session_capacity": SESSIONS,
    }


def title_of(model: str) -> str:
    """What the page is headed by: the run's name where the folder is its `export`."""
    path = Path(model)
    return path.parent.name if path.name == "export" and path.parent.name else path.name


def is_local(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
