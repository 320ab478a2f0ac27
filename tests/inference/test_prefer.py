"""Pairs of answers by best-of-N: judged by what the name says, and trained on as they were drawn."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pictures

from mixmodal import MixedModal
from mixmodal.cli import main
from mixmodal.data.converters import read_conversations, read_preferences
from mixmodal.data.pretokenize import PretokenizeConfig, pretokenize
from mixmodal.data.shards import write_shards
from mixmodal.data.skipping import SampleLimits, SkipCounter
from mixmodal.data.token_shards import TokenShards
from mixmodal.document import Document, EndOfTurn, Image, Text, build_format
from mixmodal.interop.export import save_export
from mixmodal.models.transformer import Transformer, TransformerConfig
from mixmodal.pipeline import prefer as module
from mixmodal.pipeline.judging import Question, build_judge, draw_answers, read_questions
from mixmodal.pipeline.prefer import PreferConfig, build_pair, prefer
from mixmodal.pipeline.win_rate import measure_win_rate, summarise
from mixmodal.sampling.rules import TokenSampling
from mixmodal.tokenization.image import ImageTokenizer
from mixmodal.tokenization.text import TextTokenizer
from mixmodal.training.config import TrainerConfig
from mixmodal.training.finetune import FinetuneConfig, FinetuneDataConfig, finetune
from mixmodal.training.optimizer import OptimizerConfig
from mixmodal.training.preference import PreferenceTuningConfig
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

GREY = (0, 90, 180, 250)


@pytest.fixture(scope="module")
def folder(tokenizers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model of random weights, and `talk.jsonl` with four questions for pictures and two for texts."""
    folder = tmp_path_factory.mktemp("prefer")
    text = TextTokenizer.load(tokenizers / "text.model")
    image = ImageTokenizer.load(tokenizers / "image")
    sizes = VocabularyConfig(
        codebook_sizes={"image": image.codebook_size}, num_text_pieces=text.num_pieces, num_sentinels=2
    )
    format = build_format("chameleon", Vocabulary(sizes), {"image": image.grid}, text)
    for name, seed in (("model", 0), ("other", 1)):
        torch.manual_seed(seed)
        shape = {"dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 32, "max_seq_len": 96, "init_std": 0.3}
        model = Transformer(TransformerConfig(vocab_size=format.vocabulary.size, **shape)).eval()  # type: ignore[arg-type]
        save_export(folder / name, model, format, tokenizers / "text.model", tokenizers / "image", {})
    lines: list[dict[str, Any]] = []
    for number, grey in enumerate(GREY):
        Pictures.new("RGB", (16, 16), (grey, 0, 0)).save(folder / f"{number}.png")
        asked = [{"text": "a red apple"}, {"image": "0.png"}] if number == 3 else [{"text": "a red apple"}]
        answer = [{"image": f"{number}.png"}]
        messages = [{"role": "user", "parts": asked}, {"role": "assistant", "parts": answer}]
        lines.append({"key": f"q{number}", "task": "drawing", "messages": messages})
    for number in range(2):
        asked = [{"image": f"{number}.png"}, {"text": "what?"}]
        messages = [{"role": "user", "parts": asked}, {"role": "assistant", "content": "a red apple"}]
        lines.append({"messages": messages})
    (folder / "talk.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> PreferConfig:
    return PreferConfig(
        model=str(folder / "model"), prompts=folder / "talk.jsonl", out=tmp_path / "pairs", judge="reference",
        num=3, guidance_scale=1.0, device="cpu",
    )  # fmt: skip


def questions(config: PreferConfig, model: MixedModal) -> list[Question]:
    counter = SkipCounter()
    return list(read_questions(config.prompts, model.codec, config.output, counter, config.limits))


@pytest.mark.parametrize("judge", ["reference", "likelihood"])
def test_the_best_and_the_worst_answers_are_kept_with_their_codes(config: PreferConfig, judge: Any) -> None:
    config = replace(config, judge=judge)
    report = prefer(config)
    assert (report["judge"], report["questions"], report["left_out"], report["skipped"]) == (judge, 4, 2, {})
    assert report["pairs"] + report["ties"] == 4
    assert report["pairs"] == 4
    assert report["mean_best"] > report["mean_any"] > report["mean_worst"]
    assert len(report["model_sha256"]) == 64
    model = MixedModal.from_pretrained(config.model, "cpu")
    asked = questions(config, model)
    drawn = draw_answers(model, asked, "image", num=3, seed=0, max_new_tokens=None, options=config.options())
    shards = TokenShards(config.out / "tokens")
    assert shards.has_pairs
    score = build_judge(judge, model)
    for index, (question, answers) in enumerate(zip(asked, drawn)):
        scores = score([question] * 3, answers)
        ids = shards[index]
        second = int(np.flatnonzero(ids == shards.vocabulary.bos)[1])
        prompt = model.format.spell_prompt(question.prompt, "image")
        for own, place in ((ids[:second], scores.argmax()), (ids[second:], scores.argmin())):
            codes = answers[int(place)].parts[0]
            assert isinstance(codes, Image)
            assert (own[: len(prompt)] == prompt).all()  # asked as it is trained on
            found = model.format.parse(own).parts[-2]
            assert isinstance(found, Image)
            assert (found.codes == codes.codes).all()


def test_the_lines_are_a_corpus_of_preferences(config: PreferConfig) -> None:
    report = prefer(config)
    counter = SkipCounter()
    pairs = list(read_preferences(config.out / "preferences.jsonl", counter, SampleLimits()))
    assert len(pairs) == report["pairs"]
    assert not counter.skipped
    assert pairs[0].metadata["task"] == "drawing"
    assert pairs[0].metadata["judge"] == "reference"
    best, worst = pairs[0].metadata["scores"]
    assert best > worst
    assert 0 <= report["codes_kept"] <= 1


def test_pairs_are_trained_on(config: PreferConfig, tmp_path: Path) -> None:
    prefer(config)
    tuned = FinetuneConfig(
        init_from=Path(config.model),
        data=FinetuneDataConfig(tokens=config.out / "tokens", seq_len=96, max_skipped_share=0.9),
        trainer=TrainerConfig(run_dir=tmp_path / "run", max_steps=1, micro_batch_size=1, tensorboard=False),
        preference=PreferenceTuningConfig(),
        z_loss_weight=0.0,
    )
    assert finetune(tuned).finished


def test_tuning_on_what_a_judge_prefers_wins_by_that_judge(config: PreferConfig, tmp_path: Path) -> None:
    config = replace(config, num=16)
    prefer(config)
    tuned = FinetuneConfig(
        init_from=Path(config.model),
        data=FinetuneDataConfig(tokens=config.out / "tokens", seq_len=96),
        optimizer=OptimizerConfig(lr=3e-3, warmup_steps=5),
        trainer=TrainerConfig(run_dir=tmp_path / "run", max_steps=30, micro_batch_size=4, tensorboard=False),
        preference=PreferenceTuningConfig(),
        z_loss_weight=0.0,
    )
    finetune(tuned)
    model, base = (MixedModal.from_pretrained(path, "cpu") for path in (tmp_path / "run/export", config.model))
    asked, judge = questions(config, base), build_judge("reference", base)
    found = measure_win_rate(model, base, asked, judge, num=16, seed=1, options=config.options())
    assert found.share > 0.55  # of 64 comparisons; seen: 0.625
    assert found.mean > found.mean_base


def test_texts_are_judged_by_their_distance(config: PreferConfig) -> None:
    report = prefer(replace(config, output="text", guidance_scale=None, max_new_tokens=6))
    assert report["questions"] == 2
    assert report["left_out"] == 4
    lines = [json.loads(line) for line in (config.out / "preferences.jsonl").read_text().splitlines()]
    assert all(set(line["chosen"][0]) == {"text"} for line in lines)


def test_a_gap_makes_ties_and_nothing_but_ties_is_an_error(config: PreferConfig) -> None:
    with pytest.raises(ValueError, match="no pair came of 4 questions"):
        prefer(replace(config, min_gap=1e6))


def test_a_question_without_room_for_an_answer_is_skipped_and_named(
    config: PreferConfig, folder: Path, tmp_path: Path
) -> None:
    long = {"messages": [{"role": "user", "content": "a red apple " * 40}, {"role": "assistant", "content": "x"}]}
    drawn = {**long, "messages": [long["messages"][0], {"role": "assistant", "parts": [{"image": "0.png"}]}]}
    path = folder / "long.jsonl"
    path.write_text((folder / "talk.jsonl").read_text() + "\n" + json.dumps(drawn))
    report = prefer(replace(config, prompts=path, limits=SampleLimits(max_skipped_share=0.5)))
    assert report["skipped"] == {"not askable": 1}
    assert report["questions"] == 4
    (example,) = [one for one in report["examples"] if "not askable" in one]
    assert "long.jsonl:7" in example


def test_a_finished_folder_stays_and_another_is_refused(config: PreferConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    report = prefer(config)
    monkeypatch.setattr(module, "MixedModal", None)
    assert prefer(replace(config, batch_size=1)) == report
    with pytest.raises(ValueError, match=r"out: .* is there and not empty"):
        prefer(replace(config, seed=1))


def test_a_folder_of_other_weights_is_not_taken_for_that_of_these(
    config: PreferConfig, folder: Path, tmp_path: Path
) -> None:
    config = replace(config, model=str(tmp_path / "model"))
    shutil.copytree(folder / "model", config.model)
    prefer(config)
    shutil.copy(folder / "other/model.safetensors", config.model)
    with pytest.raises(ValueError, match=r"out: .*report.json was made with other weights than .*model has now"):
        prefer(config)


def test_answers_do_not_depend_on_the_batch(config: PreferConfig, tmp_path: Path) -> None:
    prefer(config)
    prefer(replace(config, out=tmp_path / "one", batch_size=1))
    first, second = (TokenShards(path / "tokens") for path in (config.out, tmp_path / "one"))
    assert all((first[index] == second[index]).all() for index in range(len(first)))


def test_the_reference_itself_is_nearest(config: PreferConfig) -> None:
    model = MixedModal.from_pretrained(config.model, "cpu")
    (first, *_), judge = questions(config, model), build_judge("reference", model)
    assert judge([first], [first.reference])[0] == 0
    codes = first.reference.parts[0]
    assert isinstance(codes, Image)
    other = Image((codes.codes + 1) % model.codec.image_tokenizer.codebook_size)
    assert judge([first], [Document([other])])[0] < 0
    talk = first._replace(reference=Document([Text("abcd")]))
    found = judge([talk] * 3, [Document([Text(text)]) for text in ("abcd", "abxd", "zzzzzzzz")])
    assert found.tolist() == [1, 0.75, 0]


def test_an_encoder_judges_by_picture_and_text(
    config: PreferConfig, save_tiny_encoder: Callable[..., Path], tmp_path: Path
) -> None:
    encoder = save_tiny_encoder("clip", tmp_path / "clip")
    report = prefer(replace(config, judge="encoder", encoder=str(encoder)))
    assert -1 <= report["mean_worst"] < report["mean_best"] <= 1


def test_shards_are_asked_too(config: PreferConfig, folder: Path, tmp_path: Path) -> None:
    samples = read_conversations(folder / "talk.jsonl", SkipCounter(), SampleLimits())
    write_shards([replace(one, key=str(number)) for number, one in enumerate(samples)], tmp_path / "shards")
    prefer(config)
    prefer(replace(config, prompts=tmp_path / "shards", out=tmp_path / "other"))
    first, second = (TokenShards(path / "tokens") for path in (config.out, tmp_path / "other"))
    assert all((first[index] == second[index]).all() for index in range(len(first)))


def test_a_question_is_spelled_as_prepared_conversations_are(
    config: PreferConfig, tokenizers: Path, tmp_path: Path
) -> None:
    """A picture of a prompt is padded, one of an answer cropped; both are wide here, and dark at the sides."""
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = (250, 40, 40)
    Pictures.fromarray(wide).save(tmp_path / "wide.png")
    asked = {"role": "user", "parts": [{"image": "wide.png"}, {"text": "a red apple"}]}
    answered = {"role": "assistant", "parts": [{"image": "wide.png"}]}
    (tmp_path / "wide.jsonl").write_text(json.dumps({"messages": [asked, answered]}))
    samples = read_conversations(tmp_path / "wide.jsonl", SkipCounter(), SampleLimits())
    write_shards([replace(one, key="0") for one in samples], tmp_path / "shards")
    given = {"text_tokenizer": tokenizers / "text.model", "image_tokenizer": tokenizers / "image"}
    settings = PretokenizeConfig(
        shards=(tmp_path / "shards",), out=tmp_path / "tokens", sequence_format="chameleon", num_sentinels=2, **given
    )
    model = MixedModal.from_pretrained(config.model, "cpu")
    (question,) = questions(replace(config, prompts=tmp_path / "wide.jsonl"), model)
    ids, _ = build_pair(model.codec.format, question, (question.reference, question.reference))
    prepared = pretokenize(settings)[0]
    assert (ids[: len(prepared)] == prepared).all()
    cropped, padded = (part.codes for part in model.format.parse(prepared).parts if isinstance(part, Image))
    assert (cropped != padded).any()


def test_a_prompt_of_a_tuned_model_is_spelled_as_prepared_conversations_are(
    config: PreferConfig, tokenizers: Path, tmp_path: Path
) -> None:
    """Pictures of the human's turns are padded, those of the model's cropped, and all without turns."""
    wide = Pictures.fromarray(np.tile(np.uint8([[0, 250, 40]]).repeat(16), (16, 1))).convert("RGB")
    wide.save(tmp_path / "wide.png")
    said = [{"image": "wide.png"}, {"text": "a red apple"}], [{"image": "wide.png"}], [{"image": "wide.png"}]
    roles = ("user", "assistant", "user")
    talk = [{"role": role, "parts": parts} for role, parts in zip(roles, said, strict=True)]
    talk.append({"role": "assistant", "parts": [{"text": "a blue pear"}]})
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": talk}))
    samples = read_conversations(tmp_path / "talk.jsonl", SkipCounter(), SampleLimits())
    write_shards([replace(one, key="0") for one in samples], tmp_path / "shards")
    given = {"text_tokenizer": tokenizers / "text.model", "image_tokenizer": tokenizers / "image"}
    settings = PretokenizeConfig(
        shards=(tmp_path / "shards",), out=tmp_path / "tokens", sequence_format="chameleon", num_sentinels=2, **given
    )
    prepared, codec = pretokenize(settings)[0], MixedModal.from_pretrained(config.model, "cpu").codec
    parts = [wide, "a red apple", EndOfTurn(), wide, EndOfTurn(), wide, EndOfTurn(), "a blue pear", EndOfTurn()]
    assert not np.array_equal(codec.format.spell(codec.to_document(parts)), prepared)  # it was tuned on nothing
    codec.conversations = True
    assert np.array_equal(codec.format.spell(codec.to_document(parts)), prepared)
    first, second = codec.to_document(parts[:2]).parts[0], codec.to_document([wide]).parts[0]
    assert first == second == codec.to_document(parts).parts[3]


def test_a_model_wins_half_against_itself_and_by_its_scores_against_another(config: PreferConfig, folder: Path) -> None:
    model, other = (MixedModal.from_pretrained(folder / name, "cpu") for name in ("model", "other"))
    asked = questions(config, model)

    def brightness(_: Sequence[Question], answers: Sequence[Document]) -> np.ndarray:
        return np.array([float(np.mean(answer.parts[0].codes)) for answer in answers])  # type: ignore[union-attr]

    same = measure_win_rate(model, model, asked, brightness, num=2, options=config.options())
    assert (same.share, same.low, same.high, same.ties) == (0.5, 0.5, 0.5, 8)
    one = measure_win_rate(model, other, asked, brightness, num=2, options=config.options())
    back = measure_win_rate(other, model, asked, brightness, num=2, options=config.options())
    assert one.share == pytest.approx(1 - back.share)
    assert (one.wins, one.losses) == (back.losses, back.wins)
    assert one.ties < 8
    with pytest.raises(ValueError, match="there are none"):
        measure_win_rate(model, other, [], brightness)


def test_the_interval_covers_the_share() -> None:
    rng = np.random.default_rng(0)
    found = summarise(rng.random((100, 1)) + 0.2, rng.random((100, 1)))
    assert found.low < found.share < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * np.sqrt(found.share * (1 - found.share) / 100), rel=0.1)
    nothing = summarise(np.full((4, 1), -np.inf), np.zeros((4, 1)))
    assert nothing.share == 0


BAD: list[tuple[dict[str, Any], str]] = [
    ({"num": 1}, "num is 1"),
    ({"min_gap": -1.0}, "min_gap"),
    ({"judge": "encoder"}, "encoder, a folder"),
    ({"encoder": "clip"}, "no other"),
    ({"output": "text", "judge": "likelihood"}, "take reference"),
    ({"output": "text"}, "guidance_scale acts on pictures"),
    ({"max_new_tokens": 3}, "max_new_tokens acts on texts"),
    ({"text_sampling": TokenSampling(temperature=0.5)}, "text_sampling can not act on the output image; leave it out"),
    (
        {"output": "text", "guidance_scale": None, "image_sampling": TokenSampling(top_k=5)},
        "image_sampling can not act on the output text",
    ),
]


@pytest.mark.parametrize(("change", "said"), BAD)
def test_settings_that_can_not_act_are_named(config: PreferConfig, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(config, **change)


def test_the_command_prints_what_it_made(config: PreferConfig, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        ["prefer", "--model", config.model, "--prompts", str(config.prompts), "--out", str(config.out), "--judge",
         "reference", "--num", "2", "--device", "cpu"]
    )  # fmt: skip
    assert "pairs of 4 questions" in capsys.readouterr().out
