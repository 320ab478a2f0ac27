"""The same records and summary from one process or several, after a kill, and at any batch size."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PIL
from PIL.Image import Image as Picture

from mixmodal.classification.classifier import Scored
from mixmodal.data.shards import PictureFile, Sample, write_shards
from mixmodal.interop.export import find_export
from mixmodal.pipeline import classify as command
from mixmodal.pipeline.classifiers import METHODS, Method
from mixmodal.pipeline.classify import ClassifyConfig, classify

COLOURS = {"red": (220, 30, 10), "green": (10, 210, 40), "blue": (30, 10, 200)}
OUTPUTS = ("summary.json", "confusion.png", "reliability.png")


class ByColour:
    """Scores by how near the mean colour is; fails before a given number of pictures, where one is given."""

    def __init__(self, num_left: float = np.inf) -> None:
        self.num_left, self.seen, self.batches = num_left, [], []

    def score(self, pictures: Sequence[Picture]) -> list[Scored]:
        if self.num_left < len(pictures):
            raise KeyboardInterrupt
        self.num_left -= len(pictures)
        self.batches.append(len(pictures))
        return [self._score(picture) for picture in pictures]

    def _score(self, picture: Picture) -> Scored:
        mean = np.asarray(picture, dtype=np.float64).mean(axis=(0, 1))
        self.seen.append(mean)
        scores = -np.array([((mean - colour) ** 2).sum() for colour in COLOURS.values()]) / 2000
        odds = np.exp(scores - scores.max())
        cost = np.array([3, 2, 1 + int(mean[0]) % 3])
        tied = scores == scores.max()
        return Scored(scores=scores, probabilities=odds / odds.sum(), tied=tied, evaluations=cost, details={"n": 1})


Use = Callable[..., ByColour]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Puts a new classifier in the place of a model's, and gives it."""
    monkeypatch.setattr(command, "hash_model", lambda *_: "0123")

    def put(*options: Any) -> ByColour:
        classifier = ByColour(*options)
        monkeypatch.setitem(METHODS, "image_given_text", Method(lambda *_: classifier, find_export))
        return classifier

    return put


def noisy(colour: tuple[int, int, int], seed: int) -> Picture:
    values = np.random.default_rng(seed).normal(colour, 150, (2, 2, 3))
    return PIL.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def fill(folder: Path, seed: int, num: int = 5) -> Path:
    for label, colour in COLOURS.items():
        (folder / label).mkdir(parents=True)
        for number in range(num):
            noisy(colour, seed := seed + 1).save(folder / label / f"{number}.png")
    return folder


@pytest.fixture
def config(tmp_path: Path) -> ClassifyConfig:
    (tmp_path / "classes.txt").write_text("red\ngreen\nblue\n")
    (tmp_path / "cues").mkdir()
    for number, (shape, texture) in enumerate(permutations(COLOURS, 2)):
        noisy(COLOURS[shape if number % 2 else texture], number).save(tmp_path / "cues" / f"{shape}1-{texture}2.png")
    paths = {"data": fill(tmp_path / "data", 0), "classes": tmp_path / "classes.txt", "out": tmp_path / "whole"}
    others = {"shift": fill(tmp_path / "shift", 50), "cues": tmp_path / "cues"}
    return ClassifyConfig(model="m", batch_size=6, **paths, **others)


def outputs(folder: Path) -> dict[str, bytes]:
    """Of all sets, without the records themselves."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.name in OUTPUTS}


def lines(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("records*.jsonl")):
        yield from (json.loads(line) for line in path.read_text().splitlines())


@pytest.fixture
def expected(config: ClassifyConfig, use: Use) -> dict[str, bytes]:
    """What one process writes without a break."""
    use()
    classify(config)
    return outputs(config.out)


def test_one_process_sums_up_three_sets(config: ClassifyConfig, expected: dict[str, bytes]) -> None:
    assert set(expected) == {*OUTPUTS, "shift/confusion.png", "shift/reliability.png"}
    summary = json.loads(expected["summary.json"])
    rows = list(lines(config.out))
    assert [row["key"] for row in rows] == [f"{label}/{number}.png" for label in sorted(COLOURS) for number in range(5)]
    assert summary["data"]["accuracy"]["hits"] == sum(row["label"] == row["prediction"] for row in rows)
    assert 0 < summary["data"]["accuracy"]["hits"] < 15
    assert all(row["n"] == 1 for row in rows)
    near, far = summary["data"]["accuracy"]["value"], summary["shift"]["accuracy"]["value"]
    assert summary["shift"]["drop"]["value"] == near - far
    cues = summary["cues"]
    assert cues["num_pictures"] == cues["shape"] + cues["texture"] + cues["other"] == 6
    assert summary["settings"]["model_sha256"] == "0123"
    assert len(summary["settings_sha256"]) == 64


@pytest.mark.parametrize("count", [2, 3])
def test_shards_in_any_order_give_the_summary_of_one_process(
    count: int, config: ClassifyConfig, expected: dict[str, bytes], tmp_path: Path, use: Use
) -> None:
    parts = replace(config, out=tmp_path / "parts")
    for number in reversed(range(count)):
        assert not outputs(parts.out)
        classifier = use()
        classify(replace(parts, shard=f"{number}/{count}"))
        assert len(classifier.seen) == sum(len(range(number, total, count)) for total in (15, 15, 6))
    assert outputs(parts.out) == expected


def test_a_shard_that_ends_last_finds_what_others_wrote_meanwhile(
    config: ClassifyConfig, expected: dict[str, bytes], tmp_path: Path, use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = replace(config, out=tmp_path / "parts")
    slow = ByColour()

    def score_meanwhile(pictures: Sequence[Picture]) -> list[Scored]:
        if not slow.seen:
            use()
            classify(replace(parts, shard="0/2"))
            assert not outputs(parts.out)
        return ByColour.score(slow, pictures)

    monkeypatch.setattr(use(), "score", score_meanwhile)
    classify(replace(parts, shard="1/2"))
    assert outputs(parts.out) == expected


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_the_batch_size_changes_nothing(
    batch_size: int, config: ClassifyConfig, expected: dict[str, bytes], tmp_path: Path, use: Use
) -> None:
    classifier = use()
    classify(replace(config, out=tmp_path / "other", batch_size=batch_size))
    assert outputs(tmp_path / "other") == expected
    assert max(classifier.batches) == min(15, -(-batch_size // 3))


@pytest.mark.parametrize("num_done", [0, 4, 17])
def test_a_killed_job_goes_on_with_the_pictures_that_are_left(
    num_done: int, config: ClassifyConfig, expected: dict[str, bytes], tmp_path: Path, use: Use
) -> None:
    again = replace(config, out=tmp_path / "again")
    use(num_done)
    with pytest.raises(KeyboardInterrupt):
        classify(again)
    assert not outputs(again.out)
    done = [*lines(again.out), *lines(again.out / "shift")]
    assert len(done) == num_done - num_done % 2 + (num_done > 15)
    rest = use()
    classify(again)
    assert len(rest.seen) == 36 - len(done)
    assert outputs(again.out) == expected
    last = use()
    classify(again)
    assert not last.seen


def test_a_torn_last_line_is_dropped_and_its_picture_done_again(
    config: ClassifyConfig, expected: dict[str, bytes], use: Use
) -> None:
    path = config.out / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    classifier = use()
    classify(config)
    assert len(classifier.seen) == 1
    assert outputs(config.out) == expected
    assert len(list(lines(config.out))) == 15


def test_other_shards_may_go_on_with_what_one_process_began(
    config: ClassifyConfig, expected: dict[str, bytes], tmp_path: Path, use: Use
) -> None:
    again = replace(config, out=tmp_path / "again")
    use(6)
    with pytest.raises(KeyboardInterrupt):
        classify(again)
    for number in range(3):
        use()
        classify(replace(again, shard=f"{number}/3"))
    assert outputs(again.out) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"templates": ["a {}"]}, r'settings\.json: templates was \["{}"\] when this .* and is \["a {}"\] now'),
        ({"debias": 0.5}, r"debias was 0\.0 when"),
        ({"data": "shift"}, r"data was \".*data\" when"),
        ({"classes": "green\nred\nblue\n"}, r'classes\.0\.label was "red" when this was written and is "green" now'),
        (
            {"classes": "red\ngreen\nblue\ngrey\n"},
            r'classes\.3\.label was null when this was written and is "grey" now',
        ),
    ],
)
def test_records_of_other_settings_are_refused(
    change: dict[str, Any], message: str, config: ClassifyConfig, use: Use, tmp_path: Path
) -> None:
    use(2)
    with pytest.raises(KeyboardInterrupt):
        classify(config)
    if "classes" in change:
        config.classes.write_text(change["classes"])
        change = {}
    elif "data" in change:
        change = {"data": tmp_path / change["data"]}
    use()
    with pytest.raises(ValueError, match=message):
        classify(replace(config, **change))


def test_sets_may_be_added_later(config: ClassifyConfig, expected: dict[str, bytes], tmp_path: Path, use: Use) -> None:
    use()
    out = tmp_path / "again"
    classify(replace(config, out=out, shift=None, cues=None))
    assert set(outputs(out)) == set(OUTPUTS)
    later = use()
    classify(replace(config, out=out))
    assert len(later.seen) == 21
    assert outputs(out) == expected


def test_a_picture_that_is_labelled_anew_is_done_again(config: ClassifyConfig, expected: object, use: Use) -> None:
    table = config.out.parent / "data.csv"
    table.write_text("path,label\ndata/red/0.png,red\ndata/red/1.png,red\n")
    listed = replace(config, data=table, out=config.out.parent / "listed", shift=None, cues=None)
    for label, num in (("red", 2), ("red", 0), ("green", 1)):
        table.write_text(f"path,label\ndata/red/0.png,red\ndata/red/1.png,{label}\n")
        classifier = use()
        classify(listed)
        assert len(classifier.seen) == num


def test_a_mended_picture_is_done_after_all(config: ClassifyConfig, use: Use) -> None:
    picture = config.data / "red" / "0.png"
    whole = picture.read_bytes()
    picture.write_bytes(b"no picture")
    use()
    classify(replace(config, max_skipped_share=0.1))
    first = json.loads((config.out / "summary.json").read_text())["data"]
    assert (first["num_pictures"], first["skipped"]) == (14, {"broken picture": 1})
    picture.write_bytes(whole)
    classifier = use()
    classify(config)
    assert len(classifier.seen) == 1
    second = json.loads((config.out / "summary.json").read_text())["data"]
    assert (second["num_pictures"], second["skipped"]) == (15, {})


def test_pictures_of_shards_are_shared_and_their_losses_counted_once(config: ClassifyConfig, use: Use) -> None:
    def samples() -> Iterator[Sample]:
        for number, path in enumerate(sorted(config.data.rglob("*.png"))):
            yield Sample(f"{number:02d}", (path.parent.name, PictureFile(path.read_bytes(), "png", "x")))
        for number in range(15, 18):  # one in each of three processes
            yield Sample(str(number), ("red", PictureFile(b"broken", "png", "x")))
        yield Sample("18", ("", PictureFile(b"", "png", "x")))

    folder = config.out.parent / "shards"
    write_shards(samples(), folder, 8)
    found = []
    for count in (1, 3):
        use()
        out = config.out.parent / f"by{count}"
        for number in range(count):
            options = {"data": folder, "shard": f"{number}/{count}", "max_skipped_share": 0.5, "out": out}
            classify(replace(config, shift=None, cues=None, **options))
        found.append(outputs(out))
    assert found[0] == found[1]
    assert json.loads(found[0]["summary.json"])["data"]["skipped"] == {"broken picture": 3, "empty text": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": np.array([0.0, np.nan, 0.0])}, r"blue/0\.png: the scores are not finite"),
        ({"scores": np.full(3, -np.inf)}, "the scores are not finite"),
        ({"probabilities": np.full(3, 0.5)}, "probabilities sum to 1.5"),
        ({"tied": np.zeros(3, dtype=bool)}, "of no class that it is the best"),
        ({"evaluations": np.ones(2, dtype=np.int64)}, r"gave evaluations of shape \(2,\) for 3 classes"),
    ],
)
def test_findings_that_can_not_be_are_refused(
    change: dict[str, Any], message: str, config: ClassifyConfig, use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = use()
    good = classifier.score
    monkeypatch.setattr(classifier, "score", lambda pictures: [replace(one, **change) for one in good(pictures)])
    with pytest.raises(ValueError, match=message):
        classify(config)


def test_a_common_set_brings_its_classes(tmp_path: Path, use: Use, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        bytes([number]) + np.full((1024, 3), colour, np.uint8).T.tobytes()
        for number, colour in enumerate(COLOURS.values())
    ]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "test_batch.bin").write_bytes(b"".join(rows))
    (tmp_path / "set" / "batches.meta.txt").write_text("\n".join(COLOURS))
    use()
    classify(ClassifyConfig(model="m", data=tmp_path / "set", out=tmp_path / "out"))
    assert "data: found CIFAR-10 (binary), test" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["data"]["layout"] == "CIFAR-10 (binary), test"
    assert [one["label"] for one in summary["settings"]["classes"]] == list(COLOURS)
    assert summary["data"]["accuracy"]["value"] == 1
    with pytest.raises(ValueError, match="of no layout that names its classes; give --classes FILE"):
        classify(ClassifyConfig(model="m", data=fill(tmp_path / "folder", 0), out=tmp_path / "other"))
