"""The server itself over HTTP: what it refuses, and that it does not grow. Slow, for gradio takes seconds to start."""

from __future__ import annotations

import json
import signal
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

NUM_REQUESTS = 1000
NUM_SESSIONS = 100


def fetch(url: str, data: Any = None, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    """Status and body; an object is sent as JSON."""
    if data is not None and not isinstance(data, bytes):
        data, headers = json.dumps(data).encode(), {"Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers or {}), timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def upload(url: str, name: str, content: bytes) -> tuple[int, bytes]:
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\nContent-Type: image/png\r\n\r\n'
    body = head.encode() + content + b"\r\n--x--\r\n"
    return fetch(f"{url}/gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"})


def find_event(url: str, name: str) -> dict[str, Any]:
    """An event of the page by the name of its function."""
    events = json.loads(fetch(f"{url}/config")[1])["dependencies"]
    return next(event for event in events if event["api_name"] == name)


def ask(url: str, event: dict[str, Any], session: str, data: list[Any]) -> dict[str, Any]:
    """The last message about one request."""
    joined = {"data": data, "fn_index": event["id"], "session_hash": session}
    status, body = fetch(f"{url}/gradio_api/queue/join", joined)
    assert status == 200, body
    last: dict[str, Any] = {}
    with urllib.request.urlopen(f"{url}/gradio_api/queue/data?session_hash={session}", timeout=60) as stream:
        for line in stream:
            if line.startswith(b"data:"):
                message = json.loads(line[5:])
                last = message if message["msg"] == "process_completed" else last
                if message["msg"] == "close_stream":
                    break
    return last


def question(text: str, files: list[Any], seed: int = 0, num: int = 1) -> list[Any]:
    """What the page sends: its state, the prompt and the controls in their order."""
    return [None, {"text": text, "files": files}, "image", num, seed, 1.0, 0.9, 1.0, 1.0, 2, 1]


def test_no_file_outside_the_uploads_is_reached(serve: Callable[..., Any], tmp_path: Path) -> None:
    server = serve()
    url, here = server.url, Path(__file__)
    for path in ("/etc/passwd", here, here.parents[2] / "README.md", f"{tmp_path}/../../etc/passwd", tmp_path):
        for route in (
            "gradio_api/file=",
            "file=",
            "gradio_api/file/",
            "static/../../../../../..",
            "custom_component/..",
        ):
            status, body = fetch(f"{url}/{route}{path}")
            assert status in (403, 404), (route, path, status)
            assert b"root:" not in body
    event = find_event(url, "converse")
    stolen = {"path": "/etc/passwd", "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
    assert not ask(url, event, "thief", question("", [stolen]))["success"]
    done = ask(url, event, "other", question("an apple", []))
    assert done["success"]
    assert b"share" not in fetch(f"{url}/monitoring/summary")[1]


def test_uploads_have_a_limit_and_are_reached_again(serve: Callable[..., Any], photo: str) -> None:
    server = serve()
    status, body = upload(server.url, "a.png", Path(photo).read_bytes())
    assert status == 200
    (path,) = json.loads(body)
    assert fetch(f"{server.url}/gradio_api/file={path}")[0] == 200
    assert upload(server.url, "b.png", b"x" * 1_100_000)[0] == 413
    given = {"path": path, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
    done = ask(server.url, find_event(server.url, "converse"), "one", question("what is it?", [given]))
    assert done["success"]
    folder = Path(path).parents[1]
    assert folder.is_dir()
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(30)
    assert not folder.exists()


def test_what_the_model_refuses_is_a_message_and_the_next_request_goes_on(serve: Callable[..., Any]) -> None:
    url = serve().url
    event = find_event(url, "converse")
    for text in ("too long", "fail", "an apple"):
        done = ask(url, event, "one", question(text, []))
        assert done["success"], text
    history = done["output"]["data"][0]
    assert "leaves no room" in history
    assert "the model failed (RuntimeError)" in history
    assert "secret" not in history
    assert history.count("turn done") == 1


def test_more_requests_than_may_wait_are_turned_away(serve: Callable[..., Any]) -> None:
    server = serve(2.0)
    joined = {"data": question("an apple", []), "fn_index": find_event(server.url, "converse")["id"]}

    def join(number: int) -> int:
        return fetch(f"{server.url}/gradio_api/queue/join", {**joined, "session_hash": f"visitor{number}"})[0]

    assert join(0) == 200
    server.wait(lambda found: found["open"] == 1)
    assert [join(number) for number in range(1, 7)] == [200] * 4 + [503] * 2


def test_a_thousand_requests_do_not_grow_the_server(serve: Callable[..., Any]) -> None:
    server = serve()
    event, sizes = find_event(server.url, "converse"), []
    for number in range(NUM_REQUESTS):
        text = f"apple {number % 50}"
        assert ask(server.url, event, f"visitor{number % NUM_SESSIONS}", question(text, [], number % 50))["success"]
        if number % 100 == 99:
            sizes.append(server.counters()["rss_mb"])
    found = server.wait(lambda found: found["num_finished"] == NUM_REQUESTS)
    print("MB after every hundred requests:", [round(size, 1) for size in sizes], found)
    assert found["open"] == 0
    assert sizes[-1] - sizes[3] < 25, sizes  # the first hundreds fill the conversations that are kept
