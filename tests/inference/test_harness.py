"""What lm-evaluation-harness asks: likelihoods that sum up, greedy continuations, texts of any length."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from mixmodal.classification.likelihoods import ScoredSequence
from mixmodal.evaluation.compression import bits_per_byte
from mixmodal.evaluation.text import rolling_windows, score_texts
from mixmodal.pipeline import MixedModal
from mixmodal.pipeline.harness import TextHarness, cut_at


@pytest.fixture(scope="module")
def model(exported: Path) -> MixedModal:
    return MixedModal.from_pretrained(exported, "cpu")


def test_windows_score_each_piece_once_with_half_a_context_before(model: MixedModal) -> None:
    text = "a red circle above a blue square. " * 30
    windows = rolling_windows(model.format, text, 20)
    ids = model.format.spell(next(iter([model.codec.to_document([text])])))
    scored = np.concatenate([one.ids[one.scored] for one in windows])
    content = ids[np.asarray(model.format.vocabulary.is_content(ids))]
    assert scored.tolist() == content.tolist()
    assert all(len(one.ids) == 20 and one.ids[0] == ids[0] for one in windows)
    assert all((~one.scored).sum() >= 10 for one in windows[1:])
    with pytest.raises(ValueError, match="takes 1 pieces of a text; at least 2"):
        rolling_windows(model.format, text, 2)


def test_a_text_costs_what_its_pieces_cost_one_by_one(model: MixedModal) -> None:
    harness, text = TextHarness(model), "a red circle"
    (whole,) = harness.score_whole([text])
    first, rest = harness.score([("", "a red"), ("a red", " circle")])
    assert first.total + rest.total == pytest.approx(whole, rel=1e-5)
    found = score_texts(harness._scorer, [text])
    assert bits_per_byte(-found.totals[0], len(text)) == pytest.approx(-whole / np.log(2) / 12)


def test_what_is_drawn_greedily_misses_nothing_and_another_piece_does(model: MixedModal) -> None:
    harness = TextHarness(model)
    plan = model.plan(["a red"], "text", 1, 0, 5, {"temperature": 0.0})
    (drawn,) = model.generator.generate(plan.requests, plan.sampling, plan.guidance)
    prompt, content = plan.requests[0].prompt, drawn[np.asarray(model.format.vocabulary.is_content(drawn))]
    ids = np.concatenate([prompt, content])
    sequence = ScoredSequence(ids, np.arange(len(ids)) >= len(prompt))
    other = ids.copy()
    other[len(prompt)] = prompt[1]
    assert len(content)
    assert harness._scorer.count_misses([sequence, sequence._replace(ids=other)])[0] == 0
    assert harness._scorer.count_misses([sequence._replace(ids=other)])[0] > 0
    (found,) = harness.score([("a red", " circle above a blue square")])
    assert not found.is_greedy


def test_a_long_context_loses_its_start(model: MixedModal) -> None:
    harness, tail = TextHarness(model), "blue square. " * 60
    one, other = harness.score([("a red circle " + tail, "above"), ("green " + tail, "above")])
    assert one == other
    assert len(harness.generate_until([(tail, {"max_gen_toks": 3})])) == 1
    with pytest.raises(ValueError, match="max_gen_toks is 500; the model's context leaves no place"):
        harness.generate_until([("a", {"max_gen_toks": 500})])
    with pytest.raises(ValueError, match="generation option 'num_beams' can not act; choose until"):
        harness.generate_until([("a", {"num_beams": 4})])


def test_answers_end_at_the_first_stop() -> None:
    assert cut_at("one\ntwo. three", ["three", "\n"]) == "one"
    assert cut_at("one", "two") == "one"
    assert cut_at("one two", " ") == "one"


class Request(NamedTuple):
    args: tuple[Any, ...]


def test_the_harness_calls_our_model(exported: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra lm_eval is not installed")
    from lm_eval.api.registry import get_model

    from mixmodal.pipeline.lm_eval_model import MixedModalLM

    assert get_model("mixmodal") is MixedModalLM
    said = {"device": "cuda:0", "batch_size": 4, "max_batch_size": None}  # the device of who says nothing
    language_model = MixedModalLM.create_from_arg_string(f"pretrained={exported}", said)
    assert language_model.harness.model.batch_size == 4
    harness = TextHarness(MixedModal.from_pretrained(exported, "cpu"))
    ((total, greedy),) = language_model.loglikelihood([Request(("a red", " circle"))])
    assert (total, greedy) == tuple(harness.score([("a red", " circle")])[0])
    assert language_model.loglikelihood_rolling([Request(("a red circle",))]) == harness.score_whole(["a red circle"])
    options = {"until": ["\n"], "max_gen_toks": 4}
    assert language_model.generate_until([Request(("a", options))]) == harness.generate_until([("a", options)])
