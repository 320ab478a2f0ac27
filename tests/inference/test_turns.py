"""Turns of a conversation: read in prompts, and what ends a sample behind them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mixmodal import MixedModal
from mixmodal.config import UsageError, parse
from mixmodal.document import Document, EndOfTurn, Image, Mask, Part, SequenceFormat, Text
from mixmodal.models.transformer import Transformer
from mixmodal.pipeline.drawing import parse_sample
from mixmodal.pipeline.generate import GenerateConfig, PromptPart, generate
from mixmodal.pipeline.prompt_files import read_prompts
from mixmodal.pipeline.prompts import Prompt, spell_streams
from mixmodal.records import Shard
from mixmodal.sampling.engine import Request
from mixmodal.sampling.generator import SequenceGenerator
from mixmodal.sampling.grammar import Grammar
from mixmodal.sampling.guidance import Guidance
from mixmodal.sampling.rules import TokenSampling

TURN = EndOfTurn()


def legal_behind(form: SequenceFormat, parts: list[Part], output: str, *, has_turns: bool) -> set[int]:
    """What may follow some parts."""
    grammar = Grammar(form, output, form.vocabulary.size, has_turns=has_turns)
    following = None if output == "mixed" else output
    state = grammar.start([form.spell_prompt(Document(parts), following)], [30])
    return set(grammar.legal(state)[0].nonzero()[:, 0].tolist())


@pytest.mark.parametrize("output", ["text", "mixed"])
def test_an_end_of_turn_may_follow_where_the_prompt_has_one(form: SequenceFormat, image: Image, output: str) -> None:
    turn = form.vocabulary.end_of_turn
    for parts in ([Text("abc"), TURN], [image, TURN, Text("a")], [TURN, TURN]):
        without = legal_behind(form, parts, output, has_turns=False)
        assert turn not in without
        assert legal_behind(form, parts, output, has_turns=True) == without | {turn}


def test_an_image_alone_is_not_ended_by_a_turn(form: SequenceFormat) -> None:
    parts = [Text("abc"), TURN]
    assert legal_behind(form, parts, "image", has_turns=True) == legal_behind(form, parts, "image", has_turns=False)


def test_a_row_stops_at_an_end_of_turn(form: SequenceFormat, image: Image) -> None:
    turn = form.vocabulary.end_of_turn
    for parts, output in (([Text("abc"), TURN], "text"), ([image, TURN], "mixed")):
        grammar = Grammar(form, output, form.vocabulary.size, has_turns=True)
        state = grammar.start([form.spell_prompt(Document(parts), None)], [1])
        assert grammar.legal(state)[0, turn]
        assert not grammar.live(grammar.advance(state, torch.tensor([turn]))).any()


def test_a_picture_may_be_all_of_a_turn(form: SequenceFormat, image: Image) -> None:
    grammar = Grammar(form, "mixed", form.vocabulary.size, has_turns=True)
    state = grammar.start([form.spell_prompt(Document([TURN, image]), None)], [9])
    if form.text_after_open:
        state = grammar.advance(state, torch.tensor([form.vocabulary.break_]))
    assert grammar.legal(state)[0, form.vocabulary.end_of_turn]


@pytest.fixture
def eager(form: SequenceFormat, model: Transformer) -> SequenceGenerator:
    """A generator of a model that likes to end its turns."""
    with torch.no_grad():
        model.embedding.weight[form.vocabulary.end_of_turn] *= 3
        model.output.weight[form.vocabulary.end_of_turn] *= 3
    return SequenceGenerator(model, form)


@pytest.mark.parametrize("output", ["text", "mixed"])
def test_samples_end_their_turn_whatever_is_drawn_beside_them(
    form: SequenceFormat, eager: SequenceGenerator, ask: Callable[..., list[Request]], image: Image, output: str
) -> None:
    documents = [[Text("abc"), TURN], [Text("abc")], [image, TURN], [TURN, Text("j")], [Text("h"), image]]
    prompts = [form.spell_prompt(Document(parts), output if output == "text" else None) for parts in documents] * 6
    requests = ask(eager, prompts, output, max_new_tokens=16)
    assert [request.has_turns for request in requests[:5]] == [True, False, True, True, False]
    together, turn, ended = eager.generate(requests), form.vocabulary.end_of_turn, 0
    for request, ids in zip(requests, together):
        assert turn not in ids[:-1]
        assert request.has_turns or turn not in ids
        ended += int(ids[-1] == turn)
        assert EndOfTurn() not in parse_sample(form, request.prompt, ids).parts
    for row in range(5):
        (alone,) = eager.generate(requests[row : row + 1])
        assert alone.tolist() == together[row].tolist()
    assert ended > 2


def test_greedy_turns_equal_a_loop_without_cache(
    form: SequenceFormat, eager: SequenceGenerator, last_logits: Callable[[np.ndarray], torch.Tensor]
) -> None:
    prompt, grammar = (
        form.spell_prompt(Document([Text("abc"), TURN]), "text"),
        Grammar(form, "text", form.vocabulary.size, has_turns=True),
    )
    greedy = {"text": TokenSampling(temperature=0)}
    (found,) = eager.generate([eager.request(prompt, 0, "text", max_new_tokens=9)], greedy)
    state, ids = grammar.start([prompt], [9]), prompt
    while grammar.live(state).any():
        token = last_logits(ids).masked_fill(~grammar.legal(state)[0], -torch.inf).argmax()
        ids, state = np.append(ids, int(token)), grammar.advance(state, token[None])
    assert found.tolist() == ids[len(prompt) :].tolist()


def rows_of(form: SequenceFormat, parts: list[Part], unconditional: str, image_scale: float = 1.0) -> list[list[int]]:
    document = Document(parts)
    prompt = Prompt([], document, form.spell_prompt(document, "image"))
    guidance = Guidance(text_scale=3.0, image_scale=image_scale, unconditional=unconditional)  # type: ignore[arg-type]
    _, streams = spell_streams(form, prompt, guidance, "image")
    return [stream.prompt.tolist() for stream in streams]


def test_guidance_masks_texts_and_keeps_turns_or_drops_both(form: SequenceFormat, image: Image) -> None:
    def spell(*parts: Part) -> list[int]:
        return form.spell_prompt(Document(parts), "image").tolist()

    assert rows_of(form, [Text("abc"), TURN], "mask") == [spell(Mask(0), TURN)]
    assert rows_of(form, [Text("abc"), TURN], "drop") == [spell()]
    both = [Text("abc"), image, TURN]
    assert rows_of(form, both, "mask", 2.0) == [spell(Mask(0), image, TURN), spell(Mask(0), TURN)]
    assert rows_of(form, both, "drop", 2.0) == [spell(image), spell()]


def test_a_guided_sample_of_a_conversation_does_not_depend_on_the_batch(
    form: SequenceFormat, model: Transformer, ask: Callable[..., list[Request]], prompts: list[np.ndarray]
) -> None:
    generator = SequenceGenerator(model, form)
    turned = form.spell_prompt(Document([Text("abc"), TURN]), "image")
    requests = ask(generator, [turned, *prompts], scale=3.0)
    together = generator.generate(requests)
    (alone,) = generator.generate(requests[:1])
    assert alone.tolist() == together[0].tolist()


# what users write


def test_turns_on_the_command_line_and_in_files(tmp_path: Path) -> None:
    argv = ["--model", "m", "--out", "o", "--prompt", "a", "--turn", "--prompt", "b", "--turn", "--seed", "1"]
    config = parse(GenerateConfig, argv)
    turn = PromptPart(end_of_turn=True)
    assert config.parts == [PromptPart(text="a"), turn, PromptPart(text="b"), turn]
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"parts": [part.described for part in config.parts]}))
    (prompt,) = read_prompts(path, 1, 0, Shard())
    assert list(prompt.parts) == config.parts
    assert prompt.open() == ["a", EndOfTurn(), "b", EndOfTurn()]
    assert prompt.caption == "a b"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"end_of_turn": False}, "end_of_turn is False; it must be true"),
        ({"end_of_turn": 1}, "end_of_turn is 1; it must be true"),
        ({"end_of_turn": True, "text": "a"}, "a mask, or be an end_of_turn"),
    ],
)
def test_a_turn_that_is_none_is_named(tmp_path: Path, part: dict, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"parts": [part]}))
    with pytest.raises(ValueError, match=message):
        list(read_prompts(path, 1, 0, Shard()))


def test_a_turn_with_a_value_is_refused() -> None:
    with pytest.raises(UsageError, match="--turn=1: --turn has no value"):
        parse(GenerateConfig, ["--model", "m", "--out", "o", "--turn=1"])


def test_a_conversation_from_python_and_by_the_command(exported: Path, tmp_path: Path) -> None:
    model = MixedModal.from_pretrained(exported, "cpu")
    prompt = ["a red apple", EndOfTurn(), "pear", EndOfTurn()]
    (text,) = model.generate(prompt, "text", max_new_tokens=6, seed=3)
    parts = [PromptPart(text="a red apple"), PromptPart(end_of_turn=True)]
    parts += [PromptPart(text="pear"), PromptPart(end_of_turn=True)]
    options = {"model": str(exported), "out": tmp_path, "output": "text", "max_new_tokens": 6, "seed": 3}
    generate(GenerateConfig(parts=parts, device="cpu", **options))
    results = json.loads((tmp_path / "results.json").read_text())
    assert (tmp_path / "0000.txt").read_text().strip() == text.strip()
    assert results["prompt"][1] == {"end_of_turn": True}
    (mixed,) = model.generate(prompt, "mixed", max_new_tokens=40)
    assert EndOfTurn() not in mixed
    pieces = list(model.stream(prompt, "mixed", max_new_tokens=40))
    assert len([piece for piece in pieces if piece.whole]) == len(mixed)
    assert len(model.generate(prompt, "image", guidance_scale=2.0, unconditional="drop")) == 1


def test_masks_of_a_conversation_are_filled(exported: Path) -> None:
    model = MixedModal.from_pretrained(exported, "cpu")
    ((text,),) = model.fill_masks(["a ", Mask(0), EndOfTurn(), "pear", EndOfTurn()], max_new_tokens=4)
    assert isinstance(text, str)
