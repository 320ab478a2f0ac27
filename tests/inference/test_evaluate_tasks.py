"""What each task of the evaluate command counts: records with known answers give the metrics that follow from them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pictures

from mixmodal.cli import main
from mixmodal.data.shards import PictureFile, Sample, read_samples, write_shards
from mixmodal.document import Image
from mixmodal.interop.export import load_export
from mixmodal.pipeline.evaluate import evaluate
from mixmodal.pipeline.evaluate_config import EvaluateConfig, TasksConfig
from mixmodal.pipeline.evaluating.hallucination import HallucinationOptions
from mixmodal.pipeline.evaluating.image_to_text import ImageToTextOptions
from mixmodal.pipeline.evaluating.memorisation import MemorisationOptions
from mixmodal.pipeline.evaluating.questions import QuestionsOptions
from mixmodal.pipeline.evaluating.text_to_image import TextToImageOptions
from mixmodal.pipeline.mixed_modal import MixedModal

ROOT = Path(__file__).parents[2]


@pytest.fixture
def measured(exported: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A function of one task: its summary, of an evaluation in `tmp_path / "out"`."""

    def measure(**tasks: Any) -> dict[str, Any]:
        (name,) = tasks
        out = tmp_path / "out"
        evaluate(EvaluateConfig(model=str(exported), out=out, tasks=TasksConfig(**tasks), device="cpu", batch_size=4))
        return json.loads((out / "evaluation.json").read_text())["tasks"][name]

    return measure


def records_of(folder: Path) -> list[dict[str, Any]]:
    """In the order of samples."""
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return sorted(lines, key=lambda line: line["key"])


def rewrite(folder: Path, records: Sequence[dict[str, Any]]) -> None:
    """Puts other records in the place of those of a task, so that they are summed up again."""
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "summary.json").unlink()


def test_planted_repeats_of_training_are_found_beside_those_of_held_out_pictures(
    measured: Callable[..., dict[str, Any]],
    exported: Path,
    shapes: Path,
    write_tokens: Callable[..., Path],
    tmp_path: Path,
) -> None:
    task, folder = TextToImageOptions(data=(shapes,), features="none"), tmp_path / "out" / "text_to_image"
    assert "repeats_exact" not in measured(text_to_image=task)["metrics"]
    codec = load_export(exported, "cpu", None).codec
    codes = [np.array(record["codes"]) for record in records_of(folder)]
    for record, grid in zip(records_of(folder), codes):  # what was drawn is what is compared
        (drawn,) = codec.decode_images([Image(grid)])
        assert np.abs(np.array(drawn, int) - np.array(Pictures.open(folder / record["image"]), int)).max() <= 1
    near = codes[2].copy()
    near[1, 1] = (near[1, 1] + 1) % 75
    (real,) = codec.encode_pictures([next(read_samples(shapes)).pictures[0].open(1000)])
    others = np.random.default_rng(0).integers(0, 75, (5, 4, 4))
    first = write_tokens(tmp_path / "first", [others[0], near, others[1]])
    second = write_tokens(tmp_path / "second", [others[2], real.codes, codes[4], others[3]])
    times = [path.stat().st_mtime_ns for path in sorted(folder.glob("??????.png"))]
    asked = replace(task, memorisation=MemorisationOptions(training=(first, second)))
    found = measured(text_to_image=asked)
    metrics = {name.removeprefix("repeats_"): value for name, value in found["metrics"].items()}
    assert (metrics["exact"], metrics["near"]) == pytest.approx((1 / 7, 2 / 7))
    assert (metrics["exact_held_out"], metrics["near_held_out"]) == pytest.approx((1 / 7, 1 / 7))
    assert 2 / 7 < metrics["equal_codes"] < 1
    assert len(found["training_sha256"]) == 64
    assert [path.stat().st_mtime_ns for path in sorted(folder.glob("??????.png"))] == times  # none was drawn anew
    drawn, nearest = (np.array(Pictures.open(folder / f"000004{end}.png"), int) for end in ("", ".nearest"))
    assert np.abs(drawn - nearest).max() <= 1  # of 255; decoded with others, which rounds otherwise
    shown = found["shown"]
    assert shown[2]["pictures"]["000002.nearest.png"] == "trained on, 94%"
    assert (tmp_path / "out" / "evaluation.html").read_text().count("data:image/png") == 14
    named = [json.loads(line) for line in (folder / "nearest.jsonl").read_text().splitlines()]
    assert [row["key"] for row in named] == [f"{place:06d}" for place in range(7)]
    assert (named[2]["training"], named[2]["equal_codes"]) == ("p1#0", 15 / 16)
    assert (named[4]["training"], named[4]["equal_codes"]) == ("p2#0", 1)
    other = replace(asked, memorisation=MemorisationOptions(training=(second,)))
    less = measured(text_to_image=other)
    assert less["metrics"]["repeats_near"] == pytest.approx(1 / 7)
    assert less["training_sha256"] != found["training_sha256"]
    records = records_of(folder)
    records[0]["codes"] = records[0]["codes"][:2]
    rewrite(folder, records)
    with pytest.raises(ValueError, match=r"memorisation: drawn pictures have grids of 2x4, 4x4 codes"):
        measured(text_to_image=other)


def test_token_shards_of_another_tokenizer_are_told_before_anything_is_drawn(
    measured: Callable[..., dict[str, Any]], shapes: Path, write_tokens: Callable[..., Path], tmp_path: Path
) -> None:
    manifest = write_tokens(tmp_path / "tokens", [np.zeros((4, 4), int)]) / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"image_tokenizer_sha256": "0" * 64}))
    options = MemorisationOptions(training=(manifest.parent,))
    with pytest.raises(ValueError, match=r"tasks.text_to_image: .*manifest\.json: image_tokenizer_sha256 is 0000"):
        measured(text_to_image=TextToImageOptions(data=(shapes,), features="none", memorisation=options))
    assert not list((tmp_path / "out").rglob("*.png"))
    with pytest.raises(ValueError, match=r"memorisation\.threshold is 0"):
        MemorisationOptions(training=(manifest.parent,), threshold=0)
    with pytest.raises(ValueError, match=r"memorisation\.training is empty"):
        MemorisationOptions(training=())


def test_captions_that_claim_what_is_not_there_are_counted(
    measured: Callable[..., dict[str, Any]], shapes: Path, tmp_path: Path
) -> None:
    names = {"circle": ("disc",), "square": (), "triangle": (), "cross": (), "diamond": ()}
    colors = dict.fromkeys(("red", "green", "blue", "yellow", "purple", "black"), ())
    task = ImageToTextOptions(data=(shapes,), max_new_tokens=2)
    assert "chair_i" not in measured(image_to_text=task)["metrics"]
    folder = tmp_path / "out" / "image_to_text"
    records = [record | {"objects": ["circle", "red"], "caption": "a red disc"} for record in records_of(folder)]
    records[1]["caption"] = "squares, a red circle and a <i>square"
    rewrite(folder, records)
    found = measured(image_to_text=replace(task, objects={**names, **colors}))
    metrics = found["metrics"]
    assert metrics["chair_i"] == pytest.approx(2 / 16)
    assert metrics["chair_s"] == pytest.approx(1 / 7)
    assert metrics["chair_mentions"] == 16
    assert [row["text"].endswith("(not there: square, square)") for row in found["shown"]] == [
        False,
        True,
        *[False] * 5,
    ]
    page = (tmp_path / "out" / "evaluation.html").read_text()
    assert "a &lt;i&gt;square (not there: square, square)<small>" in page
    assert "<i>" not in page
    del records[3]["objects"]
    rewrite(folder, records)
    with pytest.raises(ValueError, match="objects: 1 samples have no list `objects` in their metadata, as 000003"):
        measured(image_to_text=replace(task, objects={**names, **colors}))
    with pytest.raises(ValueError, match="objects: synonyms: 'disc' of 'square' is of 'circle', too"):
        ImageToTextOptions(data=(shapes,), objects={**names, "square": ("disc",)})


def test_questions_are_asked_with_and_without_the_picture(
    measured: Callable[..., dict[str, Any]], scenes: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (scenes / "held_out.jsonl").read_text().splitlines()[:3]]
    for place, row in enumerate(rows):
        row["messages"][0]["parts"][1]["text"] = "Which color?"
        row |= {"task": "color" if place else "other", "answers": ["red"] * 9 + ["dark red"]}
    rows.append({"messages": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]})
    path = scenes / "few.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task, folder = QuestionsOptions(data=(path,), max_new_tokens=3), tmp_path / "out" / "questions"
    found = measured(questions=task)
    assert found["num_samples"] == 3  # the last asks of no picture
    wanted = {f"vqa_accuracy{sort}{blind}" for sort in ("", "_color", "_other") for blind in ("", "_blind")}
    assert set(found["metrics"]) == wanted
    records = records_of(folder)
    assert {record["question"] for record in records} == {"Which color?"}
    assert len({record["blind"] for record in records}) == 1  # it depends on the question alone
    for record in records:
        record |= {"answer": "a red" if record["kind"] == "color" else "blue", "blind": "blue"}
    rewrite(folder, records)
    found = measured(questions=task)
    metrics = found["metrics"]
    assert (metrics["vqa_accuracy_color"], metrics["vqa_accuracy_other"], metrics["vqa_accuracy_blind"]) == (1, 0, 0)
    assert metrics["vqa_accuracy"] == pytest.approx(2 / 3)
    assert [row["right"] for row in found["shown"]] == [False, True, True]
    assert found["shown"][1]["text"] == "Which color? a red"
    assert found["shown"][1]["wanted"] == "red"


def test_scenes_are_answered_by_kind_beside_what_is_most_frequent_in_training(
    measured: Callable[..., dict[str, Any]], scenes: Path, tmp_path: Path
) -> None:
    task = QuestionsOptions(data=(scenes / "held_out.jsonl",), max_new_tokens=2)
    assert measured(questions=task)["training_sha256"] is None
    folder = tmp_path / "out" / "questions"
    rows = [json.loads(line) for line in (scenes / "training.jsonl").read_text().splitlines()]
    frequent = {"count": "2", "relation": "yes", "attribute": "red"}
    for row in rows:  # one answer to each kind, whatever is asked
        row["messages"][1]["content"] = frequent[row["task"]]
    (scenes / "same.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = []
    for place, record in enumerate(records_of(folder)):  # two of each kind, of which the first has the frequent answer
        truth = frequent[record["kind"]] if place < 3 else "no"
        records.append(record | {"question": f"new {place}?", "answers": [truth], "answer": truth, "blind": "no"})
    rewrite(folder, records)
    found = measured(questions=replace(task, training=(scenes / "same.jsonl",)))
    metrics = found["metrics"]
    for kind in ("", *(f"_{name}" for name in frequent)):
        assert [metrics[f"vqa_accuracy{kind}{end}"] for end in ("", "_blind", "_frequent")] == [1, 0.5, 0.5]
    assert len(found["training_sha256"]) == 64
    page = (tmp_path / "out" / "evaluation.html").read_text()
    assert '<th class="number">without the picture</th><th class="number">most frequent answer</th>' in page
    assert "vqa_accuracy_count</td>" in page
    assert "vqa_accuracy_count_blind" not in page


@pytest.mark.slow
@pytest.mark.parametrize("exported", ["cm3leon"], indirect=True)
def test_the_commands_of_scenes_prepare_tune_and_evaluate(exported: Path, scenes: Path, tmp_path: Path) -> None:
    tokenizers = {name: str(exported / name) for name in ("text_tokenizer.model", "image_tokenizer")}
    prepare = ["--corpora", f"[{{kind: conversations, path: {scenes / 'training.jsonl'}}}]", "--image_size", "16"]
    prepare += ["--out", str(tmp_path / "data"), "--tokens.num_sentinels", "8"]
    prepare += ["--tokens.text_tokenizer", tokenizers["text_tokenizer.model"]]
    prepare += ["--tokens.image_tokenizer", tokenizers["image_tokenizer"]]
    tune = ["--init_from", str(exported), "--data.tokens", str(tmp_path / "data/tokens"), "--data.seq_len", "96"]
    tune += ["--trainer.run_dir", str(tmp_path / "tuned"), "--trainer.max_steps", "2", "--optimizer.warmup_steps", "1"]
    asked = ["--model", str(tmp_path / "tuned/export"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    for split, option in (("held_out", "data"), ("training", "training")):
        asked += [f"--tasks.questions.{option}", f"[{scenes / split}.jsonl]"]
    for command, config, options in (
        ("prepare", "data/scenes", prepare),
        ("finetune", "train/scenes", tune),
        ("evaluate", "sample/evaluate_scenes", asked),
    ):
        main([command, "--config", str(ROOT / f"configs/{config}.yaml"), *options])
    assert json.loads((tmp_path / "data/report.json").read_text())["shards"]["corpora"][0]["used"] == 6
    found = json.loads((tmp_path / "out/evaluation.json").read_text())["tasks"]["questions"]
    kinds = ("", "_attribute", "_count", "_relation")
    assert set(found["metrics"]) == {f"vqa_accuracy{k}{end}" for k in kinds for end in ("", "_blind", "_frequent")}


def test_objects_are_asked_for_by_all_three_kinds_of_negatives(
    measured: Callable[..., dict[str, Any]], shapes: Path, tmp_path: Path
) -> None:
    task = HallucinationOptions(data=(shapes,), num_pairs=2, turns=False, max_new_tokens=2)
    metrics = measured(hallucination=task)["metrics"]
    kinds = ("random", "popular", "adversarial")
    assert [metrics[f"pope_{kind}_num_questions"] for kind in kinds] == [28, 28, 28]
    folder = tmp_path / "out" / "hallucination"
    records = records_of(folder)
    asked = [row for record in records for row in record["asked"]]
    assert sum(row["answer"] == "yes" for row in asked) == sum(row["answer"] == "no" for row in asked) == 42
    for record in records:
        for row in record["asked"]:
            row["said"] = "Yes." if row["negatives"] == "popular" else row["answer"]
    rewrite(folder, records)
    found = measured(hallucination=task)
    names = ("accuracy", "f1", "yes", "unclear")
    assert [found["metrics"][f"pope_random_{name}"] for name in names] == [1, 1, 0.5, 0]
    assert [found["metrics"][f"pope_popular_{name}"] for name in names] == [0.5, pytest.approx(2 / 3), 1, 0]
    assert not any(row["right"] for row in found["shown"])


@pytest.mark.parametrize("tuned", [True, False])
def test_a_tuned_model_is_asked_about_the_whole_picture_which_the_page_shows(
    tuned: bool,
    measured: Callable[..., dict[str, Any]],
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wide = Pictures.effect_noise((48, 16), 80).convert("RGB")
    wide.save(tmp_path / "wide.png")
    picture = PictureFile((tmp_path / "wide.png").read_bytes(), "png", "wide")
    samples = [Sample(name, ("a", picture), {"objects": [name]}) for name in ("cat", "dog")]
    write_shards(samples, tmp_path / "wide")
    load, asked = MixedModal.from_pretrained, []

    def load_tuned(*arguments: Any) -> MixedModal:
        model = load(*arguments)
        model.codec.conversations = tuned
        draw = model.generate_each

        def watch(asks: Any, *more: Any, **options: Any) -> Any:
            return draw((asked.append(ask.prompt[0]) or ask for ask in asks), *more, **options)

        monkeypatch.setattr(model, "generate_each", watch)
        return model

    monkeypatch.setattr(MixedModal, "from_pretrained", load_tuned)
    measured(hallucination=HallucinationOptions(data=(tmp_path / "wide",), num_pairs=1, max_new_tokens=2))
    codec = load_export(exported, "cpu", None).codec
    fitted = codec.fit(wide, padded=tuned)
    (wanted,) = codec.encode_pictures([wide], [tuned])
    assert asked == [wanted] * 4
    assert Pictures.open(tmp_path / "out" / "hallucination" / "000000.png").tobytes() == fitted.tobytes()
