"""HTML, settings, uploads and the command's config: no gradio."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image
from stub_model import StubModel

from mixmodal.cli import main
from mixmodal.pipeline.drawing import Piece
from mixmodal.serve.conversation import Conversation, Read, Turn
from mixmodal.serve.html import conversation_html, data_uri, problem, turn_html
from mixmodal.serve.server import ServeConfig, is_local, launch_options, quiet_environment, title_of
from mixmodal.serve.settings import MAX_SEED, Settings, choose_seed, default_sampling
from mixmodal.serve.uploads import enlarge, reduce_exactly

EVIL = "<script>alert(1)</script>\" onload='x' &amp; ${1+1} {{1+1}}"


def test_text_of_visitors_and_models_is_never_markup() -> None:
    turn = Turn([EVIL], Settings(output="text"), samples=[[EVIL]], documents=[Read(EVIL, 0.5, [EVIL])], error=EVIL)
    for page in (turn_html(turn), problem(EVIL)):
        assert "<script" not in page
        assert "onload='" not in page
        assert "&lt;script&gt;" in page


def test_a_growing_turn_shows_what_there_is_and_where_more_will_be(stub: StubModel) -> None:
    turn = Turn(["an apple"], Settings(num=3))
    assert turn_html(turn).count('class="waiting pictures"') == 3
    turn.samples = [[], [], []]
    turn.add(Piece(0, 0, stub.picture(1, 0.5), False))
    turn.add(Piece(1, 0, stub.picture(1), True))
    page = turn_html(turn)
    assert page.count("waiting") == 1
    assert page.count("crisp growing") == 1
    assert page.count("data:image/png") == 2
    assert 'aria-busy="true"' in page


def test_little_pictures_are_kept_without_loss_and_large_ones_are_small() -> None:
    assert data_uri(Image.new("RGB", (128, 128))).startswith("data:image/png;")
    assert data_uri(Image.effect_noise((512, 512), 20)).startswith("data:image/jpeg;")


def test_a_finished_turn_is_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Conversation()
    assert "Nothing here yet" in conversation_html(talk)
    talk.begin(Turn(["an apple"], Settings()))
    assert conversation_html(talk) == ""
    talk.settle()
    first = conversation_html(talk)
    monkeypatch.setattr("mixmodal.serve.html.turn_html", lambda turn: "again")
    assert conversation_html(talk) == first


def test_what_is_kept_is_bounded_and_can_be_forgotten(stub: StubModel) -> None:
    talk = Conversation(max_turns=2, max_drawn=3)
    for number in range(5):
        turn = Turn([f"apple {number}"], Settings(), samples=[[stub.picture(number)]], state="done")
        talk.begin(turn)
        talk.settle()
    assert [turn.prompt[0] for turn in talk.turns] == ["apple 3", "apple 4"]
    assert len(talk.drawn) == 3
    assert [one.asked for one in talk.exchanges(1)] == [["apple 4"]]
    assert talk.exchanges(0) == []
    assert len(talk.exchanges(9)) == 2
    talk.clear()
    assert not talk.turns
    assert not talk.drawn


def test_the_picture_that_was_picked_is_edited_wherever_it_moves_in_the_gallery(stub: StubModel) -> None:
    talk, pictures = Conversation(max_drawn=3), [stub.picture(number) for number in range(5)]
    assert (talk.picked, talk.place) == (None, None)
    talk.keep(pictures[:3], "apples")
    assert (talk.picked, talk.place) == (pictures[2], None)
    talk.pick(1)  # from the newest on
    assert (talk.picked, talk.place) == (pictures[1], 1)
    talk.keep(pictures[3:4], "a pear")
    assert (talk.picked, talk.place) == (pictures[1], 2)
    talk.keep(pictures[4:], "a plum")  # the picked one is forgotten
    assert (talk.picked, talk.place) == (pictures[4], None)
    for none in (None, 3, -1):
        talk.pick(2)
        talk.pick(none)
        assert talk.picked is pictures[4]
    talk.clear()
    assert talk.picked is None


def test_parts_of_a_mixed_sample_take_their_places(stub: StubModel) -> None:
    turn = Turn(["x"], Settings(output="mixed"), samples=[[]])
    for piece in (Piece(0, 0, "a", False), Piece(0, 0, "ab", True), Piece(0, 1, stub.picture(1), False)):
        turn.add(piece)
    assert turn.samples[0][0] == "ab"
    assert turn.is_whole(0, 0)
    assert not list(turn.pictures())
    turn.add(Piece(0, 1, stub.picture(2), True))
    assert len(list(turn.pictures())) == 1


def test_seeds_are_new_or_those_of_the_field() -> None:
    assert choose_seed(7, False) == 7
    assert choose_seed(None, False) == 0
    assert len({choose_seed(7, True) for _ in range(5)}) > 1
    assert default_sampling("text") != default_sampling("image")


@pytest.mark.parametrize("wrong", [{"output": "audio"}, {"seed": -1}, {"seed": MAX_SEED + 1}, {"retrieve": -1}])
def test_settings_that_no_control_gives_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"must|choose"):
        Settings(**wrong)


def test_enlarging_for_painting_is_undone_exactly() -> None:
    little = Image.effect_noise((32, 32), 60).convert("RGB")
    large = enlarge(little)
    assert large.size == (512, 512)
    assert reduce_exactly(large, 32).tobytes() == little.tobytes()
    other = Image.effect_noise((512, 512), 60).convert("RGB")
    assert reduce_exactly(other, 32) is other
    assert enlarge(other).size == (512, 512)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_queue": 0}, "max_queue"),
        ({"max_upload_mb": 0}, "max_upload_mb"),
        ({"port": 0}, "port"),
        ({"preview_every": 0}, "preview_every"),
        ({"encoder": "e"}, "encoder can not act"),
    ],
)
def test_a_config_that_can_not_act_is_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServeConfig(model="m", **wrong)


def test_the_page_is_for_this_machine_and_calls_no_other() -> None:
    config = ServeConfig(model="runs/fruit/export", max_upload_mb=3)
    options = launch_options(config)
    assert is_local(config.host)
    assert not is_local("0.0.0.0")
    assert not is_local("example.org")
    assert (options["allowed_paths"], options["share"], options["max_file_size"]) == ([], False, "3mb")
    assert quiet_environment(Path("t"))["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert [title_of(name) for name in (config.model, "owner/name", "folder")] == ["fruit", "name", "folder"]
    css = (Path(sys.modules["mixmodal.serve"].__path__[0]) / "style.css").read_text()
    assert "http" not in css
    assert "@import" not in css


def test_a_missing_gradio_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit):
        main(["serve", "--model", "nowhere"])
    assert "pip install 'mixmodal[serve]'" in capsys.readouterr().err
