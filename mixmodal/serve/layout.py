"""The page in gradio: where things stand and what calls what. What they do is in `studio` and `html`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from html import escape
from importlib import resources
from typing import Any, cast

import gradio as gr  # pyright: ignore[reportMissingImports]

from mixmodal.serve.conversation import Conversation, Turn
from mixmodal.serve.html import EMPTY, LITTLE, WAITING, conversation_html, edit_html, turn_html
from mixmodal.serve.settings import MAX_SEED, Settings, choose_seed, default_sampling
from mixmodal.serve.studio import Studio
from mixmodal.serve.uploads import enlarge

FONT = ("system-ui", "-apple-system", "Segoe UI", "sans-serif")
MONO = ("ui-monospace", "DejaVu Sans Mono", "Menlo", "monospace")
IDLE_S = 3600
"""Seconds after which a conversation that nobody goes on with, and the files of it, are forgotten."""
SETTLE_S = 300
"""Seconds between two looks for such files."""
EDIT_HELP = "Add a picture, paint over what is to be drawn anew, and say what the whole picture shows then."
CALLS = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
"""Of every event that calls the model: one at a time, in the order of the queue."""
LIGHT = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""Of every other event."""


def build_theme() -> Any:
    """Colours and corners of the report page; fonts of the visitor's own machine, so that none is fetched."""
    return gr.themes.Base(
        primary_hue="orange",
        neutral_hue="stone",
        radius_size="lg",
        font=FONT,
        font_mono=MONO,
    )


def read_css() -> str:
    return resources.files("mixmodal.serve").joinpath("style.css").read_text(encoding="utf-8")


def build_page(studio: Studio, title: str) -> Any:
    """The whole page as `gr.Blocks`, with its queue still to be set.

    Args:
        title: what is served, for the head of the page.
    """
    with gr.Blocks(title="mixmodal", analytics_enabled=False, fill_width=True, delete_cache=(SETTLE_S, IDLE_S)) as page:
        conversation = gr.State(Conversation, time_to_live=IDLE_S)
        gr.HTML(_head(studio, title), elem_id="head", padding=False)
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Chat", id="chat"):
                gallery, editor_button = _build_chat(studio, conversation)
            with gr.Tab("Edit", id="edit"):
                editor = _build_edit(studio, conversation, [gallery, editor_button])
        editor_button.click(_picked, conversation, [tabs, editor], **LIGHT)
    return page


def _head(studio: Studio, title: str) -> str:
    grids = studio.model.format.allowed_grids("image")
    codes = max(height * width for height, width in grids)
    facts = [f"{studio.image_size} px pictures", f"{codes} codes each"]
    if len(grids) > 1:
        facts = [f"pictures of {len(grids)} sizes", f"{codes} codes at the most"]
    if studio.has_memory:
        facts.append("reads from a memory")
    spans = "".join(f"<span>{fact}</span>" for fact in facts)
    return f"<h1>{escape(title)}</h1><div>{spans}</div>"


class Controls:
    """The settings of a tab.

    Args:
        studio: its limits are those of the controls.
        of_chat: with all of them; an edit has one output and no documents.
    """

    def __init__(self, studio: Studio, of_chat: bool) -> None:
        limits, start = studio.limits, Settings()
        self.output = gr.Radio(
            [("Picture", "image"), ("Text", "text"), ("Mixed", "mixed")],
            value="image",
            label="Answer with",
            visible=of_chat,
            elem_classes="segments",
        )
        self.num = gr.Slider(1, limits.max_num, value=1, step=1, label="Samples")
        with gr.Row(elem_classes="seed"):
            self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=120)
            self.is_random = gr.Checkbox(True, label="New each time", container=False, min_width=120)
        self.temperature = gr.Slider(
            0, 2, value=start.temperature, step=0.05, label="Temperature", info="0 takes the likeliest"
        )
        self.top_p = gr.Slider(0.05, 1, value=start.top_p, step=0.05, label="Top-p")
        self.guidance = gr.Slider(
            1,
            10,
            value=start.guidance_scale,
            step=0.25,
            label="Guidance",
            info="how closely pictures follow the text; 1 is none",
        )
        self.image_guidance = gr.Slider(
            1, 10, value=1, step=0.25, label="Image guidance", info="the same for added pictures", visible=of_chat
        )
        self.retrieve = gr.Slider(
            0,
            limits.max_retrieve,
            value=min(2, limits.max_retrieve),
            step=1,
            label="Documents read first",
            info="the nearest of the memory",
            visible=of_chat and studio.has_memory,
        )
        self.remember = gr.Slider(
            0, 4, value=0, step=1, label="Earlier turns read first", info="as far as they fit", visible=of_chat
        )
        self.has_memory, self.of_chat = studio.has_memory, of_chat

    @property
    def inputs(self) -> list[Any]:
        """In the order that `settings` takes them."""
        scales = [self.temperature, self.top_p, self.guidance, self.image_guidance]
        return [self.output, self.num, self.seed, *scales, self.retrieve, self.remember]

    def settings(self, values: Sequence[Any]) -> Settings:
        """What the controls say."""
        output, num, seed, temperature, top_p, guidance, image_guidance, retrieve, remember = values
        return Settings(
            output=output,
            temperature=temperature,
            top_p=top_p,
            guidance_scale=guidance,
            image_guidance_scale=image_guidance if self.of_chat else 1.0,
            num=int(num),
            seed=int(seed or 0),
            retrieve=int(retrieve) if self.has_memory and self.of_chat else 0,
            remember=int(remember),
        )


def _build_chat(studio: Studio, conversation: Any) -> tuple[Any, Any]:
    """The tab; gives its gallery and the button that takes a picture of it to the other one."""
    with gr.Row(elem_id="chat", equal_height=False):
        with gr.Column(scale=5, min_width=320):
            with gr.Column(elem_id="talk", elem_classes=_crisp(studio)):
                answer = gr.HTML("", elem_id="answer", padding=False)
                history = gr.HTML(EMPTY, elem_id="history", padding=False)
            prompt, clear, stop, generate = _build_composer(studio)
            gallery = _build_gallery(studio, "Drawn so far", columns=6, elem_id="gallery")
            edit = gr.Button(
                _edit_words(Conversation()), size="sm", variant="secondary", visible=False, elem_id="to-edit"
            )
        with gr.Column(scale=2, min_width=280, elem_classes="side"):
            controls = Controls(studio, of_chat=True)

    def converse(kept: Conversation, asked: dict[str, Any] | None, *values: Any) -> Iterator[tuple[Any, ...]]:
        given = asked or {}
        turns = studio.answer(kept, given.get("text"), given.get("files") or [], controls.settings(values))
        first, turn = True, None
        with closing(cast(Any, turns)):
            for turn in turns:
                if kept.open is not turn:  # whole, or stopped
                    break
                past = conversation_html(kept) if first else gr.skip()
                yield past, turn_html(turn), gr.skip(), gr.skip(), gr.update(visible=True), gr.skip(), gr.skip()
                first = False
        refused = turn is not None and turn.error and not any(turn.samples)
        yield *_settled(kept), gr.skip() if refused else None

    def settle(kept: Conversation) -> tuple[Any, ...]:
        kept.settle()
        return _settled(kept)

    def forget(kept: Conversation) -> tuple[Any, ...]:
        kept.clear()
        return _settled(kept)

    shown = [history, answer, gallery, edit, stop, conversation]  # setting it begins its hour anew
    asking = []
    for trigger in (generate.click, prompt.submit):
        chosen = trigger(_wait, [controls.seed, controls.is_random], [controls.seed, answer, stop], **LIGHT)
        inputs = [conversation, prompt, *controls.inputs]
        asking.append(
            chosen.then(converse, inputs, [*shown, prompt], show_progress="hidden", trigger_mode="once", **CALLS)
        )
        asking[-1].failure(_wait_no_more, None, [answer, stop], **LIGHT)
    stop.click(settle, conversation, shown, cancels=asking, **LIGHT)
    clear.click(forget, conversation, shown, cancels=asking, **LIGHT)
    gallery.select(_pick, conversation, edit, **LIGHT)
    gallery.preview_close(_unpick, conversation, edit, **LIGHT)
    controls.output.change(default_sampling, controls.output, [controls.temperature, controls.top_p], **LIGHT)
    return gallery, edit


def _build_composer(studio: Studio) -> tuple[Any, Any, Any, Any]:
    """The prompt, and the buttons below that clear, stop and generate."""
    with gr.Group(elem_id="composer"):
        prompt = gr.MultimodalTextbox(
            placeholder="a waving hand, flat style",
            show_label=False,
            label="Prompt",
            file_types=["image"],
            file_count="multiple",
            sources=["upload"],
            submit_btn=False,
            autofocus=True,
            max_lines=6,
            elem_id="prompt",
            max_plain_text_length=studio.limits.max_text_chars,
        )
        with gr.Row(elem_id="actions"):
            clear = gr.Button("Clear", variant="secondary", min_width=80, elem_id="clear")
            stop = gr.Button("Stop", variant="secondary", min_width=80, elem_id="stop", visible=False)
            generate = gr.Button("Generate", variant="primary", min_width=120, elem_id="generate")
    return prompt, clear, stop, generate


def _wait(seed: float | None, is_random: bool) -> tuple[Any, ...]:
    """The seed of a request, and what is shown until it is its turn: that it waits, and a stop."""
    return choose_seed(seed, is_random), WAITING, gr.update(visible=True)


def _wait_no_more() -> tuple[Any, ...]:
    """After a request that was turned away; gradio says that the page is busy."""
    return "", gr.update(visible=False)


def _crisp(studio: Studio) -> list[str]:
    """The class that shows little pictures as squares of pixels."""
    return ["crisp"] if studio.image_size <= LITTLE else []


def _build_gallery(studio: Studio, label: str, columns: int, elem_id: str) -> Any:
    """Pictures to look at and to save, hidden until there are some; little ones stay crisp."""
    return gr.Gallery(
        label=label,
        columns=columns,
        fit_columns=False,
        visible=False,
        object_fit="contain",
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id=elem_id,
        elem_classes=_crisp(studio),
    )


def _settled(kept: Conversation) -> tuple[Any, ...]:
    """What stands on the page while nothing is drawn: turns, no answer, gallery, its button, no stop."""
    return conversation_html(kept), "", *_gallery(kept), gr.update(visible=False), kept


def _gallery(kept: Conversation) -> tuple[Any, Any]:
    """The pictures, newest first, with the picked one open as before, and the button below."""
    drawn = [(one.picture, one.caption) for one in reversed(kept.drawn)]
    shown = gr.update(value=drawn, visible=bool(drawn), selected_index=kept.place)
    return shown, gr.update(value=_edit_words(kept), visible=bool(drawn))


def _edit_words(kept: Conversation) -> str:
    return "Edit the latest picture" if kept.place is None else "Edit this picture"


def _pick(kept: Conversation, chosen: gr.SelectData) -> str:
    """The picture that was clicked on is the one to be edited, and the button says so."""
    kept.pick(chosen.index if isinstance(chosen.index, int) else None)
    return _edit_words(kept)


def _unpick(kept: Conversation) -> str:
    kept.pick(None)
    return _edit_words(kept)


def _picked(kept: Conversation) -> tuple[Any, ...]:
    """Opens the other tab with the picture that is picked, where there is one."""
    if kept.picked is None:
        return gr.skip(), gr.skip()
    picture = enlarge(kept.picked)
    return gr.update(selected="edit"), {"background": picture, "layers": [], "composite": picture}


def _build_edit(studio: Studio, conversation: Any, gallery: list[Any]) -> Any:
    """The tab; gives its editor.

    Args:
        gallery: of the other tab, and the button below.
    """
    with gr.Row(elem_id="edit", equal_height=False):
        with gr.Column(scale=5, min_width=320):
            gr.HTML(f"<p>{EDIT_HELP}</p>", elem_id="edit-help", padding=False)
            editor = gr.ImageEditor(
                type="pil",
                format="png",
                image_mode="RGBA",
                sources=["upload", "clipboard"],
                transforms=(),
                layers=False,
                brush=gr.Brush(default_size=48, colors=[("#e8702a", 0.75)], color_mode="fixed"),
                eraser=gr.Eraser(default_size=48),
                canvas_size=(512, 512),
                height=560,
                buttons=[],
                label="Picture to edit",
                show_label=False,
                elem_id="editor",
            )
            prompt = gr.Textbox(
                placeholder="what the whole picture shows; may be empty",
                show_label=False,
                label="Prompt",
                max_length=studio.limits.max_text_chars,
                elem_id="edit-prompt",
            )
            with gr.Row(elem_id="edit-actions"):
                stop = gr.Button("Stop", variant="secondary", min_width=80, elem_id="edit-stop", visible=False)
                redraw = gr.Button("Redraw", variant="primary", min_width=120, elem_id="redraw")
        with gr.Column(scale=2, min_width=280, elem_classes="side"):
            answer = gr.HTML("", elem_id="edit-answer", padding=False, elem_classes=_crisp(studio))
            results = _build_gallery(studio, "Drawn anew", columns=2, elem_id="edits")
            controls = Controls(studio, of_chat=False)

    def edit(kept: Conversation, painting: Any, text: str | None, *values: Any) -> Iterator[tuple[Any, ...]]:
        turns = studio.redraw(kept, painting, text, controls.settings(values))
        turn = None
        with closing(cast(Any, turns)):
            for turn in turns:
                if kept.edit is not turn:  # whole, or stopped
                    break
                yield edit_html(turn), gr.update(visible=False), gr.update(visible=True), *[gr.skip()] * 3
        yield _edited(kept, turn)

    def settle(kept: Conversation) -> tuple[Any, ...]:
        return _edited(kept, kept.settle_edit())

    shown = [answer, results, stop, *gallery, conversation]
    editing = []
    for trigger in (redraw.click, prompt.submit):
        chosen = trigger(_wait, [controls.seed, controls.is_random], [controls.seed, answer, stop], **LIGHT)
        inputs = [conversation, editor, prompt, *controls.inputs]
        editing.append(chosen.then(edit, inputs, shown, show_progress="hidden", trigger_mode="once", **CALLS))
        editing[-1].failure(_wait_no_more, None, [answer, stop], **LIGHT)
    stop.click(settle, conversation, shown, cancels=editing, **LIGHT)
    return editor


def _edited(kept: Conversation, turn: Turn | None) -> tuple[Any, ...]:
    """What stands on the tab while nothing is drawn: how the edit ended, its pictures where it is done, no stop."""
    if turn is None:  # it had waited, or was done already
        return "", gr.skip(), gr.update(visible=False), *[gr.skip()] * 3
    pictures = list(turn.pictures()) if turn.state == "done" else []
    results = gr.update(value=pictures, visible=True) if pictures else gr.skip()
    return edit_html(turn), results, gr.update(visible=False), *_gallery(kept), kept
