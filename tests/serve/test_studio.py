"""Prompts in, growing answers out: with a stub model and without a page."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path
from typing import Any, cast

import pytest
from PIL import Image
from stub_model import StubModel

from mixmodal.document import EndOfTurn
from mixmodal.serve.conversation import Conversation, Turn
from mixmodal.serve.html import conversation_html, edit_html
from mixmodal.serve.settings import Settings
from mixmodal.serve.studio import Studio
from mixmodal.serve.uploads import Limits


def build(model: StubModel, **options: Any) -> Studio:
    return Studio(cast(Any, model), **{"interval_s": 0.0, **options})


def ask(
    studio: Studio, text: str, files: tuple[str, ...] = (), talk: Conversation | None = None, **chosen: Any
) -> Turn:
    """The last view of an answer."""
    *_, turn = studio.answer(Conversation() if talk is None else talk, text, list(files), Settings(**chosen))
    return turn


def test_an_answer_grows_until_its_pictures_are_whole(stub: StubModel) -> None:
    talk, states = Conversation(), []
    for turn in build(stub).answer(talk, "an apple", [], Settings(num=2, seed=7)):
        states.append((turn.state, sum(map(len, turn.samples)), len(list(turn.pictures()))))
    assert states[0] == ("drawing", 0, 0)
    assert ("drawing", 2, 0) in states
    assert states[-1] == ("done", 2, 2)
    assert [turn.state for turn in talk.turns] == ["done"]
    assert [one.caption for one in talk.drawn] == ["an apple \N{MIDDLE DOT} seed 7"] * 2
    assert stub.calls[-1]["preview_every"] == 1  # a sixteenth of 4 x 4 codes


def test_pictures_stand_before_the_text_and_are_as_the_encoder_takes_them(stub: StubModel, photo: str) -> None:
    turn = ask(build(stub), "  what is this? ", (photo,), output="text")
    picture, text = stub.calls[-1]["prompt"]
    assert picture.size == (32, 32)
    assert text == "what is this?"
    assert turn.samples == [["word " * 4]]


def test_guidance_that_can_not_act_is_left_out_and_told(stub: StubModel, photo: str) -> None:
    def scales() -> tuple[float, float]:
        return stub.calls[-1]["guidance_scale"], stub.calls[-1]["image_guidance_scale"]

    chosen = {"guidance_scale": 3.0, "image_guidance_scale": 4.0}
    assert ask(build(stub), "an apple", **chosen).notes == ["image guidance not used: the prompt has no picture"]
    assert scales() == (3, 1)
    assert ask(build(stub), "", (photo,), **chosen).notes == ["guidance not used: the prompt has no text"]
    assert scales() == (1, 4)
    assert len(ask(build(stub), "an apple", (photo,), output="text", **chosen).notes) == 2
    assert scales() == (1, 1)
    assert ask(build(stub), "an apple", output="text").notes == []  # nobody has asked for what the page starts with
    assert Settings(**chosen).describe(["an apple"]).endswith("guidance 3")


def test_retrieved_documents_are_read_behind_earlier_turns_and_shown() -> None:
    stub, talk = StubModel(has_memory=True), Conversation()
    ask(build(stub), "one", talk=talk)
    ask(build(stub), "two", talk=talk)
    turn = ask(build(stub), "three", talk=talk, retrieve=2, remember=1)
    earlier, *found = stub.calls[-1]["before"]
    assert earlier[0] == "two"
    assert isinstance(earlier[1], Image.Image)
    assert [one.key for one in found] == ["key 0", "key 1"]
    assert [one.parts[1] for one in turn.documents] == ["document 0", "document 1"]
    assert "before" not in stub.calls[0]


def test_a_tuned_model_is_asked_in_turns(photo: str) -> None:
    """The photo is wide: whole within borders in a turn, cropped otherwise."""
    stub, talk = StubModel(conversations=True), Conversation()
    for text in ("one", "two", "three"):
        ask(build(stub), text, talk=talk, output="text", remember=0)
    assert stub.calls[-1]["prompt"] == ["three", EndOfTurn()]
    ask(build(stub), "four", (photo,), talk=talk, output="text", remember=2)
    said = stub.calls[-1]["prompt"]
    picture = said.pop(4)
    assert said == ["three", EndOfTurn(), "word " * 4, EndOfTurn(), "four", EndOfTurn()]  # all three do not fit
    assert "before" not in stub.calls[-1]
    ask(build(stub, turns=False), "five", (photo,), talk=talk, output="text", remember=1)
    cropped, *rest = stub.calls[-1]["prompt"]
    assert rest == ["five"]
    assert stub.calls[-1]["before"] == [[picture, "four", "word " * 4]]
    assert picture.getpixel((0, 0)) == (255, 255, 255) != cropped.getpixel((0, 0))
    assert stub.calls[-1]["prompt"][0].size == picture.size


def test_without_a_memory_none_is_asked(stub: StubModel) -> None:
    assert not ask(build(stub), "one", retrieve=2).documents


@pytest.mark.parametrize(
    ("text", "chosen", "message"),
    [
        ("", {}, "the prompt is empty"),
        ("x" * 2001, {}, "2001 characters; 2000 are allowed"),
        ("a prompt that is too long", {}, "leaves no room"),
        ("an apple", {"num": 9}, "9 samples are asked for; 4 are allowed"),
        ("an apple", {"retrieve": 9}, "9 documents are asked for"),
    ],
)
def test_what_is_refused_is_told_and_the_next_request_goes_on(
    stub: StubModel, text: str, chosen: dict[str, Any], message: str
) -> None:
    talk = Conversation()
    turn = ask(build(stub), text, talk=talk, **chosen)
    assert message in turn.error
    assert not talk.drawn
    assert ask(build(stub), "an apple", talk=talk).state == "done"
    assert [one.state for one in talk.turns] == ["stopped", "done"]


def test_a_broken_or_huge_picture_is_told(stub: StubModel, photo: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(photo).read_bytes()[:80])
    assert "picture 2" in ask(build(stub), "", (photo, str(broken))).error
    assert "max_pixels" in ask(build(stub, limits=Limits(max_pixels=100)), "", (photo,)).error
    assert "4 are allowed" in ask(build(stub), "", (photo,) * 5).error
    assert not stub.calls


def test_a_failure_of_the_model_shows_no_inside_of_it(stub: StubModel, caplog: pytest.LogCaptureFixture) -> None:
    turn = ask(build(stub), "fail")
    assert turn.error.startswith("the model failed (RuntimeError)")
    assert "secret" not in turn.error
    assert "a secret path" in caplog.text
    assert not list(turn.pictures())  # what there was is a preview


def test_an_answer_that_nobody_waits_for_stops_the_model(stub: StubModel) -> None:
    talk = Conversation()
    answer = cast(Any, build(stub).answer(talk, "an apple", [], Settings()))
    while not any(next(answer).samples):
        pass
    assert stub.open == 1
    answer.close()
    assert (stub.open, stub.num_closed) == (0, 1)
    assert [turn.state for turn in talk.turns] == ["stopped"]
    assert not talk.drawn
    assert talk.open is None


def test_a_turn_that_is_settled_meanwhile_stops_the_model_and_is_there_once(stub: StubModel) -> None:
    talk = Conversation()
    answer = cast(Any, build(stub).answer(talk, "an apple", [], Settings()))
    while not any(next(answer).samples):
        pass
    talk.settle()
    *_, turn = answer
    assert (stub.open, stub.num_closed, stub.num_finished) == (0, 1, 0)
    assert (turn.state, len(talk.turns)) == ("stopped", 1)


def test_a_thousand_requests_keep_no_more_than_a_few_do(stub: StubModel) -> None:
    studio, talk = build(stub), Conversation()

    def ask_many(count: int) -> int:
        for number in range(count):
            ask(studio, f"apple {number}", talk=talk, num=2, seed=number)
            conversation_html(talk)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before, after = ask_many(40), ask_many(160)
    finally:
        tracemalloc.stop()
    assert len(talk.turns) == talk.turns.maxlen
    assert after - before < 20_000  # bytes; the slow test counts a thousand


def painted(size: int = 512, box: tuple[int, int, int, int] = (0, 0, 256, 512)) -> dict[str, Any]:
    background = StubModel().picture(5, 0.5).resize((size, size), Image.Resampling.NEAREST)
    layer = Image.new("RGBA", (size, size))
    layer.paste((232, 112, 42, 190), box)
    return {"background": background, "layers": [layer], "composite": background}


def redraw(studio: Studio, painting: Any, text: str, talk: Conversation | None = None, **chosen: Any) -> Turn:
    """The last view of an edit."""
    *_, turn = studio.redraw(Conversation() if talk is None else talk, painting, text, Settings(**chosen))
    return turn


def test_the_painted_region_is_drawn_anew_at_the_size_of_the_model(stub: StubModel) -> None:
    talk = Conversation()
    turn = redraw(build(stub), painted(), "a pear", talk, num=2, seed=3, guidance_scale=2.0)
    call = stub.calls[-1]
    assert (turn.error, turn.state) == ("", "done")
    assert len(list(turn.pictures())) == 2
    assert call["picture"].tobytes() == StubModel().picture(5, 0.5).tobytes()
    assert (call["region"].mode, call["region"].size, call["region"].getbbox()) == ("L", (32, 32), (0, 0, 16, 32))
    assert (call["prompt"], call["seed"], call["guidance_scale"]) == (["a pear"], 3, 2.0)
    assert [one.caption for one in talk.drawn] == ["a pear \N{MIDDLE DOT} seed 3"] * 2
    assert not talk.turns


def test_an_edit_grows_until_its_pictures_are_whole(stub: StubModel) -> None:
    talk = Conversation()
    views = [(len(edit_html(turn)) > 0, turn.state) for turn in build(stub).redraw(talk, painted(), "", Settings())]
    assert views == [(True, "drawing")] * 5 + [(False, "done")]  # the pictures are in the gallery then
    assert [one.caption for one in talk.drawn] == ["redrawn \N{MIDDLE DOT} seed 0"]


@pytest.mark.parametrize("how", ["stop", "leave"])
def test_an_edit_that_nobody_waits_for_stops_the_model(stub: StubModel, how: str) -> None:
    talk = Conversation()
    edit = cast(Any, build(stub).redraw(talk, painted(), "a pear", Settings()))
    while not any(next(edit).samples):
        pass
    if how == "stop":
        turn = talk.settle_edit()
        assert turn is not None
        *_, last = edit
        assert last is turn
        assert (turn.state, "stopped" in edit_html(turn)) == ("stopped", True)
    else:
        edit.close()
    assert (stub.open, stub.num_closed, stub.num_infilled) == (0, 1, 0)
    assert (talk.edit, len(talk.drawn), len(talk.turns)) == (None, 0, 0)


def test_a_turn_and_an_edit_do_not_stop_each_other(stub: StubModel) -> None:
    talk, studio = Conversation(), build(stub)
    answer = cast(Any, studio.answer(talk, "an apple", [], Settings()))
    next(answer)
    assert redraw(studio, painted(), "a pear", talk).state == "done"
    *_, turn = answer
    assert turn.state == "done"
    assert len(talk.drawn) == 2


def test_a_picture_of_another_size_keeps_it_and_guidance_needs_a_prompt(stub: StubModel) -> None:
    (picture,) = redraw(build(stub), painted(500), "", guidance_scale=2.0).pictures()
    assert picture.size == (500, 500)
    assert stub.calls[-1]["guidance_scale"] == 1


@pytest.mark.parametrize(
    ("painting", "text", "message"),
    [
        (None, "a pear", "there is no picture"),
        ({"background": None, "layers": []}, "a pear", "there is no picture"),
        (painted(box=(0, 0, 0, 0)), "a pear", "nothing is painted"),
        (painted(box=(0, 0, 2, 2)), "a pear", "too little is painted"),
        (painted(), "x" * 2001, "2001 characters; 2000 are allowed"),
    ],
)
def test_an_edit_without_picture_or_paint_is_told(stub: StubModel, painting: Any, text: str, message: str) -> None:
    turn = redraw(build(stub), painting, text)
    assert not turn.samples
    assert message in edit_html(turn)
