"""What the web page does under load: a thousand visitors at once, and a thousand requests that are all answered.

    python benchmarks/serve_load.py [--requests 1000] [--max_queue 16] [--model EXPORT] [--dry]

`mixmodal serve` runs in a process of its own with a tiny random model, or with `--model`. Needs gradio.

- at once: every visitor sends one request at the same moment. Each must end with an answer, or with the error that the
  page shows as busy (status 503 of a full queue); then one more request must be answered.
- served: as many visitors as may wait, each request from a new one, until as many requests are answered; every tenth
  visitor leaves half-way, behind the first preview. The resident memory of the process after the first tenth, and after
  all.

Ends with an error where any request ends in another way.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from record import record

from mixmodal.document import CM3LeonFormat
from mixmodal.interop.export import save_export
from mixmodal.models.transformer import Transformer, TransformerConfig
from mixmodal.tokenization.autoencoder import AutoencoderConfig
from mixmodal.tokenization.image import ImageTokenizer, ImageTokenizerConfig
from mixmodal.tokenization.quantizer_base import QuantizerConfig
from mixmodal.tokenization.text import TextTokenizer, train_text_tokenizer
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

ANSWERED, BUSY, LEFT = "answered", "busy", "left"
LEAVERS = 10
"""One visitor of so many leaves half-way."""
TIMEOUT_S, START_S = 600, 300


def write_export(folder: Path) -> Path:
    """A random model of pictures of 32 pixels, 64 codes each."""
    torch.manual_seed(0)
    train_text_tokenizer(["a red apple", "a green apple", "a blue pear, flat style"] * 5, folder / "text.model", 300)
    autoencoder = AutoencoderConfig(channels=8, channel_multipliers=(1, 1, 1), num_res_blocks=1, norm_groups=4)
    image = ImageTokenizerConfig(image_size=32, autoencoder=autoencoder, quantizer=QuantizerConfig(levels=(5, 5, 3)))
    ImageTokenizer(image).save(folder / "image")
    pieces = TextTokenizer.load(folder / "text.model").num_pieces
    sizes = VocabularyConfig(codebook_sizes={"image": 75}, num_text_pieces=pieces, num_sentinels=8)
    form = CM3LeonFormat(Vocabulary(sizes), {"image": (8, 8)})
    shape = {"dim": 32, "num_layers": 2, "num_heads": 4, "ffn_dim": 64, "max_seq_len": 256}
    model = Transformer(TransformerConfig(vocab_size=form.vocabulary.size, **shape))
    card = {"title": "random", "data": ["none"], "attribution": "nobody", "figures": {"loss": 0.0}}
    save_export(folder / "export", model, form, folder / "text.model", folder / "image", card)
    return folder / "export"


class Page:
    """A page that is served, as its visitors see it."""

    def __init__(self, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        self.port, self.process, self.log = port, process, log
        config = self._get("/config")
        self.event = next(one["id"] for one in config["dependencies"] if one["api_name"] == "converse")

    def _get(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=TIMEOUT_S) as answer:
            return json.load(answer)

    def rss_mb(self) -> float:
        """Resident memory of the process."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def ask(self, visitor: str, *, leaves: bool = False) -> str:
        """How the request of a visitor ends.

        Args:
            leaves: closes the connection behind the first preview.

        Raises:
            RuntimeError: where it ends neither with an answer nor with the busy error.
        """
        prompt = {"text": f"an apple for {visitor}", "files": []}
        data = [None, prompt, "image", 1, 0, 1.0, 0.9, 2.0, 1.0, 0, 0]  # the page's state, the prompt, the controls
        body = json.dumps({"data": data, "fn_index": self.event, "session_hash": visitor})
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        try:
            link.request("POST", "/gradio_api/queue/join", body, {"Content-Type": "application/json"})
            joined = link.getresponse()
            told = joined.read().decode()
            if joined.status == 503 and "Queue is full" in told:
                return BUSY
            if joined.status != 200:
                raise RuntimeError(f"status {joined.status}: {told}")
            link.request("GET", f"/gradio_api/queue/data?session_hash={visitor}")
            return self._read(link.getresponse(), leaves)
        finally:
            link.close()

    def _read(self, stream: http.client.HTTPResponse, leaves: bool) -> str:
        for line in stream:
            message = json.loads(line[5:]) if line.startswith(b"data:") else {"msg": ""}
            if leaves and message["msg"] == "process_generating":
                return LEFT
            if message["msg"] == "process_completed":
                history = str(message["output"]["data"][0]) if message["success"] else ""
                if "turn done" not in history:
                    raise RuntimeError(f"no answer: {str(message)[:300]}")
                return ANSWERED
        raise RuntimeError("the connection ended without an answer")


@contextmanager
def serve(model: Path, folder: Path, max_queue: int) -> Iterator[Page]:
    """A page in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log, end = folder / "serve.log", time.monotonic() + START_S
    command = [sys.executable, "-m", "mixmodal.cli", "serve", "--model", str(model), "--port", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen([*command, "--max_queue", str(max_queue)], stdout=out, stderr=out)
    try:
        while "serving" not in log.read_text():
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the page does not start:\n{log.read_text()}")
            time.sleep(0.2)
        yield Page(port, process, log)
    finally:
        process.terminate()
        process.wait(60)


class Tally:
    """How requests ended, and how long it took, seconds."""

    def __init__(self) -> None:
        self.ends: Counter[str] = Counter()
        self.seconds: dict[str, list[float]] = {ANSWERED: [], BUSY: [], LEFT: []}
        self.failures: list[str] = []
        self._lock = threading.Lock()

    def add(self, page: Page, visitor: str, *, leaves: bool = False) -> None:
        """A visitor asks; how that ends is counted."""
        started = time.monotonic()
        try:
            end, failure = page.ask(visitor, leaves=leaves), ""
        except (RuntimeError, OSError, http.client.HTTPException) as error:
            end, failure = "failed", f"{type(error).__name__}: {error}"
        with self._lock:
            self.ends[end] += 1
            if failure:
                self.failures.append(failure)
            else:
                self.seconds[end].append(time.monotonic() - started)

    def check(self) -> None:
        """Raises:
        SystemExit: where a request ended in another way than it should.
        """
        if self.failures:
            raise SystemExit(f"{len(self.failures)} requests failed; the first: {self.failures[0]}")


def ask_at_once(page: Page, count: int) -> Tally:
    """One request of each of many visitors, all at the same moment."""
    tally, gate = Tally(), threading.Barrier(count)

    def visit(number: int) -> None:
        gate.wait()
        tally.add(page, f"crowd{number}")

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tally


def ask_in_turn(page: Page, count: int, at_a_time: int, told: Callable[[int], None]) -> Tally:
    """Requests of new visitors until `count` are answered, `at_a_time` waiting; every tenth visitor leaves.

    Args:
        told: is called with the number of answered ones, after each.
    """
    tally, lock, numbers = Tally(), threading.Lock(), iter(range(10 * count))

    def visit() -> None:
        while tally.ends[ANSWERED] + len(tally.failures) < count:
            with lock:
                number = next(numbers)
            tally.add(page, f"visitor{number}", leaves=number % LEAVERS == 0)
            with lock:
                told(tally.ends[ANSWERED])

    threads = [threading.Thread(target=visit) for _ in range(at_a_time)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tally


def measure(options: argparse.Namespace, write: Callable[..., Any] = record) -> None:
    """Measures both and writes the figures.

    Raises:
        SystemExit: where a request ended in another way than it should.
    """
    config = {"requests": options.requests, "max_queue": options.max_queue, "model": options.model or "tiny, random"}
    config["gradio"] = metadata.version("gradio")

    def put(subject: str, value: float, unit: str) -> None:
        write("serve_load", subject, [value], unit, "cpu", config)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = Path(options.model) if options.model else write_export(folder)
        with serve(model, folder, options.max_queue) as page:
            crowd = ask_at_once(page, options.requests)
            crowd.check()
            if page.ask("late") != ANSWERED:
                raise SystemExit("behind the crowd no request is answered")
            for end in (ANSWERED, BUSY):
                put(f"at once: {end}", crowd.ends[end], "requests")
                put(f"at once: longest until {end}", max(crowd.seconds[end], default=0.0), "s")
            sizes: dict[int, float] = {}

            def note(answered: int) -> None:
                for mark in (options.requests // 10, options.requests):
                    if answered >= mark:
                        sizes.setdefault(mark, page.rss_mb())

            started = time.monotonic()
            queued = ask_in_turn(page, options.requests, options.max_queue, note)
            seconds = time.monotonic() - started
            queued.check()
            put("served: answered a second", queued.ends[ANSWERED] / seconds, "requests/s")
            put("served: visitors that left half-way", queued.ends[LEFT], "visitors")
            for mark, size in sizes.items():
                put(f"served: memory after {mark} answers", size, "MB")
            if "Traceback" in page.log.read_text():
                raise SystemExit(f"the log of the server has an error:\n{page.log.read_text()[-3000:]}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--max_queue", type=int, default=16)
    parser.add_argument("--model", help="folder of an exported model; a tiny random one where it is left out")
    parser.add_argument("--dry", action="store_true", help="print instead of recording")
    return parser


if __name__ == "__main__":
    arguments = build_parser().parse_args()
    measure(arguments, print if arguments.dry else record)
