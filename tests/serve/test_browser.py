"""The page in a browser: clicks of visitors, and what they see."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import Image

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here"),
]

TIMEOUT_MS = 120_000  # a machine that trains beside takes a minute for the first page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        options = {"executable_path": CHROMIUM, "args": ["--no-sandbox", "--disable-gpu"], "timeout": TIMEOUT_MS}
        found = started.chromium.launch(**options)
        yield found
        found.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """A function of (address, width): a page of a visitor of its own, with the foreign addresses that it called."""
    contexts: list[Any] = []

    def open_page(url: str, width: int = 1280) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, reduced_motion="reduce")
        contexts.append(context)
        context.set_default_timeout(TIMEOUT_MS)
        page = context.new_page()
        page.foreign = []
        page.on("request", lambda request: page.foreign.append(request.url) if is_foreign(request.url, url) else None)
        page.goto(url)
        page.wait_for_selector("#generate")
        return page

    yield open_page
    for context in contexts:
        context.close()


def is_foreign(address: str, url: str) -> bool:
    return not address.startswith((url, "data:", "blob:"))


def generate(page: Any, text: str) -> None:
    page.fill("#prompt textarea", text)
    page.click("#generate")


def test_a_prompt_becomes_a_picture_and_no_other_machine_is_called(
    serve: Callable[..., Any], visit: Callable[..., Any]
) -> None:
    page = visit(serve(0.3).url)
    generate(page, "<i>red</i> apple ${1+1} {{1+1}}")
    page.wait_for_selector("#answer .growing")
    assert page.is_visible("#stop")
    page.wait_for_selector("#history .turn.done .sample img")
    assert page.inner_text("#history .asked") == "<i>red</i> apple ${1+1} {{1+1}}"
    assert page.locator("#history .read li").count() == 2
    assert page.evaluate("getComputedStyle(document.querySelector('.sample img')).imageRendering") == "pixelated"
    page.wait_for_selector("#gallery img")
    assert page.input_value("#prompt textarea") == ""
    assert page.is_hidden("#stop")
    assert page.foreign == []


def test_fixed_seeds_stay_and_text_is_answered(serve: Callable[..., Any], visit: Callable[..., Any]) -> None:
    page = visit(serve().url)
    page.get_by_label("New each time").first.uncheck()
    page.locator(".seed input[type=number]").first.fill("42")
    page.get_by_text("Text", exact=True).first.click()
    page.fill("#prompt textarea", "what is it?")
    page.press("#prompt textarea", "Enter")
    page.wait_for_selector("#history .turn.done .said")
    assert "seed 42" in page.inner_text("#history .meta")
    assert "temperature 0.7" in page.inner_text("#history .meta")


def test_a_refused_prompt_is_told_and_stays_in_the_box(serve: Callable[..., Any], visit: Callable[..., Any]) -> None:
    page = visit(serve().url)
    generate(page, "too long")
    page.wait_for_selector("#history .problem")
    assert "leaves no room" in page.inner_text("#history .problem")
    assert page.input_value("#prompt textarea") == "too long"
    generate(page, "an apple")
    page.wait_for_selector("#history .turn.done img")


def test_stop_and_a_closed_page_end_the_drawing(serve: Callable[..., Any], visit: Callable[..., Any]) -> None:
    server = serve(1.0)
    page = visit(server.url)
    generate(page, "an apple")
    page.wait_for_selector("#answer .growing")
    page.click("#stop")
    page.wait_for_selector("#history .turn.stopped")
    server.wait(lambda found: found["num_closed"] == 1)
    generate(page, "a pear")
    page.wait_for_selector("#answer .growing")
    page.context.close()
    found = server.wait(lambda found: found["num_closed"] == 2)
    assert (found["open"], found["num_finished"]) == (0, 0)


def test_visitors_wait_for_each_other(serve: Callable[..., Any], visit: Callable[..., Any]) -> None:
    server = serve(0.2)
    pages = [visit(server.url) for _ in range(3)]
    for number, page in enumerate(pages):
        generate(page, f"apple {number}")
    for page in pages:
        page.wait_for_selector("#history .turn.done img")
    assert [page.inner_text("#history .asked") for page in pages] == [f"apple {number}" for number in range(3)]
    assert server.wait(lambda found: found["num_finished"] == 3)["most_open"] == 1


def test_who_waits_is_told_and_may_stop_and_who_is_turned_away_too(
    serve: Callable[..., Any], visit: Callable[..., Any]
) -> None:
    server = serve(1.5)
    pages = [visit(server.url) for _ in range(6)]
    for number, page in enumerate(pages):  # one is drawn, four wait
        generate(page, f"apple {number}")
        page.wait_for_selector("#answer .growing" if number == 0 else "#answer .waits")
    pages[5].wait_for_selector("text=currently busy")
    pages[5].wait_for_selector("#answer .waits", state="detached")
    assert pages[5].is_hidden("#stop")
    assert pages[5].input_value("#prompt textarea") == "apple 5"
    pages[1].click("#stop")
    pages[1].wait_for_selector("#answer .waits", state="detached")
    for page in (pages[0], *pages[2:5]):
        page.wait_for_selector("#history .turn.done img")
    assert server.counters()["num_finished"] == 4


def paint(page: Any) -> None:
    """A stroke through the middle of the picture."""
    page.wait_for_selector("#editor canvas")
    page.wait_for_timeout(2000)
    box = page.locator("#editor canvas").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.4)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.6, steps=12)
    page.mouse.up()
    page.wait_for_timeout(500)


def test_a_picture_is_painted_on_and_drawn_anew(serve: Callable[..., Any], visit: Callable[..., Any]) -> None:
    server = serve()
    page = visit(server.url)
    generate(page, "an apple")
    page.wait_for_selector("#to-edit")
    page.click("#to-edit")
    page.wait_for_selector("#editor canvas")
    page.wait_for_timeout(2000)
    page.click("#redraw")
    page.wait_for_selector("#edit-answer .problem")
    assert "nothing is painted" in page.inner_text("#edit-answer")
    paint(page)
    page.fill("#edit-prompt textarea", "a pear")
    page.click("#redraw")
    page.wait_for_selector("#edits img")
    server.wait(lambda found: found["num_infilled"] == 1)
    assert page.locator("#edit-answer article, #edit-answer .problem").count() == 0
    page.get_by_role("tab", name="Chat").click()
    page.locator("#gallery .thumbnail-item").nth(1).wait_for()


def test_an_edit_is_shown_while_it_is_drawn_and_stops(serve: Callable[..., Any], visit: Callable[..., Any]) -> None:
    server = serve(1.0)
    page = visit(server.url)
    generate(page, "an apple")
    page.wait_for_selector("#to-edit")
    page.click("#to-edit")
    paint(page)
    page.click("#redraw")
    page.wait_for_selector("#edit-answer .growing")
    page.click("#edit-stop")
    page.wait_for_selector("#edit-answer .turn.stopped img")
    server.wait(lambda found: (found["num_closed"], found["num_infilled"], found["open"]) == (1, 0, 0))
    assert page.is_hidden("#edit-stop")
    page.click("#redraw")
    page.wait_for_selector("#edit-answer .growing")
    page.wait_for_selector("#edits img")
    page.wait_for_selector("#edit-answer article", state="detached")


def test_the_picture_that_is_opened_in_the_gallery_is_edited(
    serve: Callable[..., Any], visit: Callable[..., Any]
) -> None:
    page = visit(serve().url)
    for number in (1, 2):
        generate(page, f"apple {number}")
        page.locator("#gallery .thumbnail-item").nth(number - 1).wait_for()
    older = page.locator("#gallery .thumbnail-item img").nth(1).get_attribute("src")
    page.locator("#gallery .thumbnail-item").nth(1).click()
    page.wait_for_selector("#to-edit:has-text('Edit this picture')")
    generate(page, "apple 3")
    page.locator("#gallery .preview .thumbnail-item").nth(2).wait_for()
    page.wait_for_selector(f"#gallery .preview .media-button img[src='{older}']")
    assert "apple 1" in page.inner_text("#gallery .preview")
    assert page.inner_text("#to-edit") == "Edit this picture"
    page.click("#gallery button[aria-label='Close']")
    page.wait_for_selector("#to-edit:has-text('Edit the latest picture')")


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_width(serve: Callable[..., Any], visit: Callable[..., Any], width: int) -> None:
    page = visit(serve().url, width)
    generate(page, "apple " * 40)
    page.wait_for_selector("#history .turn.done img")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert Image.open(io.BytesIO(page.screenshot())).width == width
