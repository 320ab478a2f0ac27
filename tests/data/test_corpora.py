"""Corpora of every kind become the same shards, and what is wrong with them is named."""

import json

import pytest
from PIL import Image

from mixmodal.config import load_config
from mixmodal.data.augment import AugmentConfig
from mixmodal.data.corpora import CorpusConfig, PrepareConfig, prepare
from mixmodal.data.pretokenize import TokensConfig
from mixmodal.data.shards import INDEX_NAME, Sample, mark_unfinished, read_samples, write_shards
from mixmodal.data.skipping import SampleLimits, TooManySkipped
from mixmodal.data.token_shards import TokenShards
from mixmodal.document import Document, Text
from mixmodal.tokenization.text import TextTokenizer


@pytest.fixture
def folder(tmp_path, build_picture):
    """Three captioned pictures, one of them in a folder of its own."""
    root = tmp_path / "corpus"
    (root / "more").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.PNG", "more/c.png")):
        (root / name).write_bytes(build_picture(number).data)
        (root / name).with_suffix(".txt").write_text(f"caption {number}\n")
    return root


@pytest.fixture
def build(tmp_path):
    """Prepares one corpus into `out`."""

    def build(kind, path, max_share=1.0, **options):
        limits = SampleLimits(max_skipped_share=max_share, **options.pop("limits", {}))
        config = PrepareConfig(
            corpora=(CorpusConfig(kind=kind, path=path),), out=tmp_path / "out", limits=limits, **options
        )
        return prepare(config), list(read_samples(config.out / "shards"))

    return build


def skipped(report):
    return report["shards"]["corpora"][0]["skipped"]


def test_folder_with_text_files(build, folder, build_picture):
    report, samples = build("folder", folder)
    assert [sample.texts for sample in samples] == [["caption 0"], ["caption 1"], ["caption 2"]]
    assert [sample.pictures[0].data for sample in samples] == [build_picture(number).data for number in range(3)]
    assert [sample.key for sample in samples] == ["000000000", "000000001", "000000002"]
    assert samples[2].metadata["source"] == str(folder / "more" / "c.png")
    assert report["shards"]["samples"] == 3


def test_folder_with_a_captions_file(build, folder):
    rows = [{"file_name": "a.png", "text": "first"}, {"image": "more/c.png", "caption": "second", "licence": "CC0"}]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    _, samples = build("folder", folder)
    assert [sample.texts for sample in samples] == [["first"], ["second"]]
    assert samples[1].metadata["licence"] == "CC0"


def test_interleaved_lines_keep_their_order(build, folder, build_picture):
    parts = [{"image": "a.png"}, {"text": "one "}, {"text": "two"}, {"image": "more/c.png"}]
    (folder / "lines.jsonl").write_text(json.dumps({"parts": parts, "page": 4}))
    _, (sample,) = build("jsonl", folder / "lines.jsonl")
    assert [part if isinstance(part, str) else part.data for part in sample.parts] == [
        build_picture(0).data,
        "one ",
        "two",
        build_picture(2).data,
    ]
    assert sample.metadata["page"] == 4


def test_shards_are_read_and_numbered_anew(build, build_shards):
    shards = build_shards(5)
    _, samples = build("shards", shards, shard_size=2)
    assert [sample.key for sample in samples] == [f"{number:09d}" for number in range(5)]
    assert [sample.texts for sample in samples] == [[f"caption {number}"] for number in range(5)]
    assert samples[4].metadata["source"] == f"{shards / '00001.tar'}:0004"


def test_corpora_follow_one_another_and_are_counted_apart(tmp_path, folder, build_shards):
    corpora = (CorpusConfig(kind="folder", path=folder), CorpusConfig(kind="shards", path=build_shards(2)))
    report = prepare(PrepareConfig(corpora=corpora, out=tmp_path / "out"))
    assert [corpus["used"] for corpus in report["shards"]["corpora"]] == [3, 2]
    texts = [sample.texts[0] for sample in read_samples(tmp_path / "out" / "shards")]
    assert texts == ["caption 0", "caption 1", "caption 2", "caption 0", "caption 1"]


def test_pictures_are_scaled_where_asked_for(build, folder):
    Image.new("CMYK", (64, 20)).save(folder / "d.jpg")
    (folder / "d.txt").write_text("wide")
    _, samples = build("folder", folder, image_size=4)
    for sample in samples:
        assert sample.pictures[0].suffix == "png"
        assert sample.pictures[0].open(16).size == (4, 4)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "broken metadata"),
        ("[]", "broken metadata"),
        ({"parts": []}, "empty document"),
        ({"parts": "a.png"}, "empty document"),
        ({"parts": [{"sound": "a.wav"}]}, "broken metadata"),
        ({"image": "a.png"}, "no caption"),
        ({"text": "alone"}, "no picture"),
        ({"image": "a.png", "text": " "}, "empty text"),
        ({"image": "a.png", "text": "\ud800"}, "broken text"),
        ({"image": "absent.png", "text": "fine"}, "no picture"),
        ({"image": "more", "text": "fine"}, "no picture"),
        ({"image": "../corpus/a.png", "text": "fine"}, "unsafe name"),
        ({"image": "more/../../secret.png", "text": "fine"}, "unsafe name"),
        ({"image": "/etc/hostname", "text": "fine"}, "unsafe name"),
        ({"image": "..\\a.png", "text": "fine"}, "unsafe name"),
        ({"image": "a.txt", "text": "fine"}, "broken picture"),
        ({"image": "cut.png", "text": "fine"}, "broken picture"),
        ({"image": "large.png", "text": "fine"}, "broken picture"),
    ],
)
def test_bad_line_is_counted_and_named(build, folder, row, reason, build_picture):
    (folder / "cut.png").write_bytes(build_picture(9).data[:100])
    Image.new("RGB", (101, 100)).save(folder / "large.png")
    good = json.dumps({"image": "a.png", "text": "fine"})
    path = folder / "lines.jsonl"
    path.write_text(f"{good}\n{row if isinstance(row, str) else json.dumps(row)}\n")
    report, samples = build("jsonl", path, limits={"max_pixels": 10_000})
    assert len(samples) == 1
    assert skipped(report) == {reason: 1}
    assert f"{path}:2" in report["shards"]["corpora"][0]["examples"][0]


def test_bad_pictures_and_captions_of_a_folder_are_counted_and_named(build, folder):
    (folder / "b.txt").unlink()
    (folder / "more" / "c.txt").write_bytes(b"\xff")
    (folder / "d.png").write_bytes(b"no picture")
    (folder / "d.txt").write_text("fine")
    report, samples = build("folder", folder)
    assert len(samples) == 1
    assert skipped(report) == {"no caption": 1, "broken text": 1, "broken picture": 1}
    examples = " ".join(report["shards"]["corpora"][0]["examples"])
    for name in ("b.PNG", "more/c.txt", "d.png"):
        assert str(folder / name) in examples


def test_long_caption_is_cut_and_counted(build, folder):
    (folder / "a.txt").write_text("word " * 10_000)
    report, samples = build("folder", folder, limits={"max_caption_words": 5})
    assert samples[0].texts == ["word word word word word"]
    assert report["shards"]["corpora"][0]["altered"] == {"truncated text": 1}
    assert not skipped(report)


def test_share_of_bad_samples_fails_the_job_and_keeps_what_is_written(build, folder, tmp_path):
    (folder / "more" / "c.png").write_bytes(b"")
    with pytest.raises(TooManySkipped, match=r"1 of 3 samples are bad \(1 broken picture\).*more/c\.png"):
        build("folder", folder, max_share=0.3)
    assert [sample.texts[0] for sample in read_samples(tmp_path / "out" / "shards")] == ["caption 0", "caption 1"]
    report, samples = build("folder", folder, max_share=0.4)
    assert len(samples) == report["shards"]["samples"] == 2


def test_report_is_saved_and_printed(build, folder, tmp_path, capsys):
    (folder / "b.txt").unlink()
    report, _ = build("folder", folder)
    assert json.loads((tmp_path / "out" / "report.json").read_bytes()) == report
    printed = capsys.readouterr().out
    assert "2 samples" in printed
    assert "1 skipped: no caption" in printed


def test_finished_shards_are_kept_and_other_settings_refused(build, folder, tmp_path):
    build("folder", folder)
    before = (tmp_path / "out" / "shards" / "00000.tar").stat().st_mtime_ns
    build("folder", folder)
    assert (tmp_path / "out" / "shards" / "00000.tar").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"report\.json: image_size is 0, not 4; remove"):
        build("folder", folder, image_size=4)
    for name in ("report.json", "shards/shards.json"):
        whole = (tmp_path / "out" / name).read_bytes()
        (tmp_path / "out" / name).write_bytes(whole[:20])
        with pytest.raises(ValueError, match=f"{name} is not JSON"):
            build("folder", folder)
        (tmp_path / "out" / name).write_bytes(whole)
    mark_unfinished(tmp_path / "out" / "shards")
    _, samples = build("folder", folder, image_size=4)
    assert samples[0].pictures[0].open(16).size == (4, 4)


def test_job_killed_between_shards_and_report_goes_on(build, folder, tmp_path):
    (folder / "b.txt").unlink()
    report, _ = build("folder", folder)
    before = (tmp_path / "out" / "shards" / "00000.tar").stat().st_mtime_ns
    (tmp_path / "out" / "report.json").unlink()
    with pytest.raises(ValueError, match=r"shards\.json: image_size is 0, not 4; remove"):
        build("folder", folder, image_size=4)
    again, _ = build("folder", folder)
    assert again == report == json.loads((tmp_path / "out" / "report.json").read_bytes())
    assert (tmp_path / "out" / "shards" / "00000.tar").stat().st_mtime_ns == before


@pytest.mark.parametrize("place", ["shards", "shards/more", "shards/00000.tar", "more/../shards"])
def test_corpus_in_the_place_of_the_shards_is_refused_and_kept(tmp_path, build_shards, place):
    shards = build_shards(2)
    (shards / INDEX_NAME).unlink()
    (tmp_path / "out" / "more").mkdir(parents=True)
    target = shards.rename(tmp_path / "out" / "shards")
    (target / "more").mkdir()
    corpus = CorpusConfig(kind="shards", path=tmp_path / "out" / place)
    with pytest.raises(ValueError, match="would be written over this corpus"):
        prepare(PrepareConfig(corpora=(corpus,), out=tmp_path / "out"))
    assert len(list(read_samples(target))) == 2


def test_shards_of_someone_else_are_kept(tmp_path, build, folder, build_shards):
    shards = build_shards(2)
    (shards / INDEX_NAME).unlink()
    (tmp_path / "out").mkdir()
    target = shards.rename(tmp_path / "out" / "shards")
    with pytest.raises(ValueError, match=r"out/shards: holds 00000\.tar and neither .* choose another folder"):
        build("folder", folder)
    assert len(list(read_samples(target))) == 2


def test_corpus_without_usable_samples_is_read_again(tmp_path, build, folder):
    (tmp_path / "lines.jsonl").write_text("")
    with pytest.raises(ValueError, match="no usable sample"):
        build("jsonl", tmp_path / "lines.jsonl")
    (folder / "lines.jsonl").write_text(json.dumps({"image": "a.png", "text": "fine"}))
    _, samples = build("jsonl", folder / "lines.jsonl")
    assert len(samples) == 1


@pytest.mark.parametrize(
    ("kind", "path", "message"),
    [
        ("folder", "absent", "absent: there is no such corpus of kind folder"),
        ("folder", "corpus/a.png", r"a\.png: a corpus of kind folder must be a folder"),
        ("folder", "empty", "empty: the folder holds no pictures"),
        ("jsonl", "corpus", "corpus: a corpus of kind jsonl must be a file"),
        ("shards", "corpus", r"corpus: the folder holds no \*\.tar"),
        ("jsonl", "empty/none.jsonl", "there is no usable sample"),
    ],
)
def test_corpus_that_is_not_there_is_named(build, folder, tmp_path, kind, path, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "none.jsonl").write_text("")
    with pytest.raises(ValueError, match=message):
        build(kind, tmp_path / path)


def test_token_shards_follow_once_there_are_tokenizers(tmp_path, folder, text_tokenizer_path, save_image_tokenizer):
    save_image_tokenizer(tmp_path / "image", 8)
    corpora = (CorpusConfig(kind="folder", path=folder),)
    assert prepare(PrepareConfig(corpora=corpora, out=tmp_path / "out"))["tokens"] is None
    tokens = TokensConfig(
        text_tokenizer=text_tokenizer_path,
        image_tokenizer=tmp_path / "image",
        num_variants=2,
        augment=AugmentConfig(flip_share=1.0),
    )
    report = prepare(PrepareConfig(corpora=corpora, out=tmp_path / "out", tokens=tokens))
    assert report["tokens"]["documents"] == 6
    shards = TokenShards.open(tmp_path / "out" / "tokens")
    document = shards.build_format(TextTokenizer.load(text_tokenizer_path)).parse(shards[4])
    assert document.parts[0] == Text("caption 2")
    assert isinstance(document, Document)


def test_settings_out_of_range_are_named(tmp_path):
    corpus = CorpusConfig(kind="folder", path=tmp_path)
    for options, name in (
        ({"corpora": ()}, "corpora"),
        ({"image_size": -1}, "image_size"),
        ({"shard_size": 0}, "shard_size"),
    ):
        with pytest.raises(ValueError, match=name):
            PrepareConfig(**({"corpora": (corpus,), "out": tmp_path} | options))


def test_nested_keys_are_read_from_yaml(tmp_path):
    tokens = "tokens: {text_tokenizer: t.model, image_tokenizer: i, seed: 3}"
    (tmp_path / "c.yaml").write_text(f"corpora: [{{kind: jsonl, path: a.jsonl}}]\nout: out\n{tokens}\n")
    config = load_config(PrepareConfig, tmp_path / "c.yaml")
    assert config.corpora[0].kind == "jsonl"
    assert config.tokens.seed == 3


def test_names_outside_utf8_survive(tmp_path, build):
    """Names of files on disk may hold bytes that are no UTF-8, which Python reads as lone surrogates."""
    write_shards([Sample("a", ("text",), {"name": "caf\udce9"})], tmp_path / "odd")
    _, (sample,) = build("shards", tmp_path / "odd")
    assert sample.metadata["name"] == "caf\udce9"
