"""A model that reads documents of a memory before a prompt: from Python and by the commands."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PIL

from mixmodal.config import UsageError, parse
from mixmodal.data.synthetic import synthetic_pairs
from mixmodal.document import Document, Text
from mixmodal.pipeline import MixedModal
from mixmodal.pipeline.classify import ClassifyConfig, classify
from mixmodal.pipeline.generate import GenerateConfig, PromptPart, generate
from mixmodal.retrieval import retriever as module
from mixmodal.retrieval.building import MemoryDocument, write_memory
from mixmodal.retrieval.encoder import DocumentParts
from mixmodal.retrieval.memory import HAS_IMAGE, HAS_TEXT
from mixmodal.retrieval.retriever import Retrieved
from mixmodal.retrieval.selection import SelectionConfig
from mixmodal.tokenization.image import ImageTokenizer

DIM = 64
PAIRS = [(pair.caption, pair.picture) for pair in synthetic_pairs(5, 16, 3)]
LIKE_FIRST = PAIRS[0][0].split()[-1]
CLASSES = ["a red apple", "pear"]


class WordEncoder:
    """Texts with common words are near to each other, and pictures of equal pixels."""

    identity = "e" * 64

    def embed_documents(self, documents: Sequence[DocumentParts]) -> np.ndarray:
        rows = []
        for one in documents:
            seeds = [word.encode() for text in one.texts for word in text.split()]
            seeds += [image.convert("RGB").tobytes() for image in one.images]
            rows.append(sum(np.random.default_rng(zlib.crc32(seed)).normal(size=DIM) for seed in seeds))
        return (np.array(rows) / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


ENCODER: Any = WordEncoder()


@pytest.fixture(scope="module")
def memory(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pairs and a page of two pictures, as the model spells them."""
    codec = MixedModal.from_pretrained(exported, "cpu").codec
    contents = {f"pair {number}": list(pair) for number, pair in enumerate(PAIRS)}
    contents["page"] = ["a page", PAIRS[0][1], "of", PAIRS[1][1]]
    spelled = [codec.format.spell(document) for document in codec.to_documents(list(contents.values()))]
    documents = []
    for (key, parts), ids in zip(contents.items(), spelled):
        texts = [part for part in parts if isinstance(part, str)]
        pictures = [part for part in parts if not isinstance(part, str)]
        documents.append(MemoryDocument(key, HAS_TEXT | HAS_IMAGE, DocumentParts(texts, pictures), [ids]))
    tokens = {
        "vocabulary_digest": codec.format.vocabulary.digest,
        "sequence_format": {"name": codec.format.name, "grids": {"image": [4, 4]}},
        "text_tokenizer_sha256": codec.text_tokenizer.sha256,
        "image_tokenizer_sha256": ImageTokenizer.sha256(exported / "image_tokenizer"),
        "num_variants": 1,
    }
    folder = tmp_path_factory.mktemp("memory") / "memory"
    given: dict[str, Any] = {"encoder_identity": "e" * 64, "dim": DIM, "tokens": tokens, "encoder": str(exported)}
    write_memory(folder, documents, ENCODER.embed_documents, **given)
    return folder


@pytest.fixture(autouse=True)
def encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_encoder", lambda *given: ENCODER)


@pytest.fixture
def model(exported: Path, memory: Path) -> MixedModal:
    model = MixedModal.from_pretrained(exported, "cpu")
    model.attach_memory(memory)
    return model


def codes_of(model: MixedModal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets samples be parts of documents, which can be compared."""
    monkeypatch.setattr(model.codec, "from_documents", lambda found: [document.parts for document in found])


def parts_of(model: MixedModal, found: Sequence[Retrieved]) -> list[list[str]]:
    return [[part.modality for part in model.format.parse(one.ids).parts] for one in found]


def test_documents_stand_as_the_prompt_does(model: MixedModal) -> None:
    prompts: list[Any] = [[LIKE_FIRST], [PAIRS[1][1]], [PAIRS[1][1], LIKE_FIRST], [LIKE_FIRST, PAIRS[1][1]]]
    model.model.config = replace(model.model.config, max_seq_len=999)
    pairs = 0
    for prompt, first in zip(prompts, ("text", "image", "image", "text")):
        (found,) = model.retrieve([prompt], 3, "text")
        assert len(found) == 3
        for parts in parts_of(model, found):
            assert parts == [first, *({"text", "image"} - {first})] or parts == ["text", "image", "text", "image"]
        pairs += sum(one.key != "page" for one in found)
        assert [one.score for one in found] == sorted(one.score for one in found)
    assert pairs > 4


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 2.0}, {"best_of": 3}])
def test_what_is_retrieved_is_what_is_read(
    model: MixedModal, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    codes_of(model, monkeypatch)
    found = model.retrieve([[LIKE_FIRST], ["pear"]], 2)
    samples = model.generate_batch([[LIKE_FIRST], ["pear"]], num=2, retrieve=2, **options)
    for prompt, documents, own in zip(([LIKE_FIRST], ["pear"]), found, samples):
        assert model.generate(prompt, num=2, before=documents, **options) == own
        assert (
            model.generate(prompt, num=2, before=[model.format.parse(one.ids) for one in documents], **options) == own
        )
        assert model.generate(prompt, num=2, retrieve=2, **options) == own
        assert model.generate(prompt, num=2, **options) != own
        assert model.generate(prompt, num=2, before=[], **options) == model.generate(prompt, num=2, **options)


def test_the_prompt_stands_behind_the_chain(model: MixedModal, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    generate_ids = model.generator.generate
    monkeypatch.setattr(model.generator, "generate", lambda *args: seen.append(args) or generate_ids(*args))
    model.generate([LIKE_FIRST], before=[["pear", PAIRS[0][1]], [PAIRS[1][1], "a red apple"]])
    shots = model.codec.to_documents([["pear", PAIRS[0][1]], [PAIRS[1][1], "a red apple"]])
    wanted = model.format.prefix([model.format.spell(shot) for shot in shots])
    (requests, *_) = seen[0]
    assert [request.before.tolist() for request in requests] == [wanted.tolist()]


def test_the_best_of_several_is_found_with_the_documents_picture_first(
    model: MixedModal, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes_of(model, monkeypatch)
    shots = [["pear", PAIRS[0][1]]]
    candidates = model.generate(["a red apple"], num=4, seed=3, before=shots)
    turned = [[PAIRS[0][1], "pear"]]
    totals = [model.log_likelihood([one], ["a red apple"], before=turned).total for one in candidates]
    scored: list[float] = []
    score = model._scorer.score

    def remember(*given: Any) -> Any:
        found = score(*given)
        scored.extend(found.totals)
        return found

    monkeypatch.setattr(model._scorer, "score", remember)
    (best,) = model.generate(["a red apple"], num=1, best_of=4, seed=3, before=shots)
    assert best == candidates[int(np.argmax(totals))]
    np.testing.assert_allclose(scored, totals, atol=5e-5, rtol=0)


def test_more_documents_than_fit_are_left_out_whole(
    model: MixedModal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    codes_of(model, monkeypatch)
    with caplog.at_level(logging.WARNING):
        (found,) = model.retrieve([["pear"]], 5)
    assert 0 < len(found) < 5
    assert f"({len(found)} instead of 5 at the least)" in caplog.text
    lengths = [len(one.ids) - 1 for one in found]
    image = model.codec.to_document([PAIRS[0][1]]).parts[0]
    whole = len(model.format.spell(Document([Text("pear"), image])))
    longest = max(len(model.retriever.memory.ids(number)) for number in range(6)) - 1  # type: ignore[union-attr]
    assert sum(lengths) + whole <= 96 < sum(lengths) + whole + longest
    every = model.retriever.find([DocumentParts(["pear"])], 5)[0]  # type: ignore[union-attr]
    assert [one.key for one in found] == [one.key for one in every][-len(found) :]
    samples = model.generate(["pear"], retrieve=5)
    assert samples == model.generate(["pear"], before=found) == model.generate(["pear"], before=every)
    # the reserve for text is given or 32 tokens
    free = 96 - len(model.format.spell_prompt(Document([image]), "text"))
    for options, room in (({}, 32), ({"max_new_tokens": 60}, 60)):
        (found,) = model.retrieve([[PAIRS[0][1]]], 5, "text", **options)
        assert sum(len(one.ids) - 1 for one in found) <= free - room
    model.generate([PAIRS[0][1]], "text", retrieve=5, max_new_tokens=60)


def test_a_likelihood_counts_no_token_of_what_stands_before(model: MixedModal) -> None:
    shots = [["pear", PAIRS[0][1]]]
    plain = model.log_likelihood(["a red apple"], [PAIRS[1][1]])
    found = model.log_likelihood(["a red apple"], [PAIRS[1][1]], before=shots)
    assert found.count == plain.count == 16
    assert found.total != plain.total
    with pytest.raises(ValueError, match="does not fit into the model's context of 96"):
        model.log_likelihood(["a red apple"], [PAIRS[1][1]], before=shots * 5)


@pytest.mark.parametrize("method", ["image_given_text", "text_given_image"])
def test_classes_share_the_documents_of_their_picture(model: MixedModal, method: str) -> None:
    pictures = [PAIRS[1][1], PAIRS[2][1], PAIRS[3][1]]
    found = model.retrieve_for_classes(pictures, CLASSES, method, 2)
    scores = model.score_classes(pictures, CLASSES, method, retrieve=2).scores
    assert np.abs(scores - model.score_classes(pictures, CLASSES, method).scores).max() > 0.01
    first = "text" if method == "image_given_text" else "image"
    for row, (picture, documents) in enumerate(zip(pictures, found)):
        assert all(parts[0] == first for parts in parts_of(model, documents) if len(parts) == 2)
        for column, caption in enumerate(CLASSES):
            pair = ([caption], [picture]) if method == "image_given_text" else ([picture], [caption])
            expected = model.log_likelihood(*pair, before=documents).total
            assert scores[row, column] == pytest.approx(expected, abs=5e-5)
    assert model.classify(pictures[0], CLASSES, method, retrieve=2) == CLASSES[int(scores[0].argmax())]


def test_random_documents_are_a_control_with_a_seed(model: MixedModal) -> None:
    draws = [[one.key for one in model.retrieve([["pear"]], 2, random_seed=seed)[0]] for seed in range(8)]
    assert draws[0] == [one.key for one in model.retrieve([["pear"]], 2, random_seed=0)[0]]
    assert len({tuple(keys) for keys in draws}) > 2


def test_what_can_not_be_read_is_refused(model: MixedModal, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no memory is attached; call attach_memory"):
        MixedModal.from_pretrained(exported, "cpu").generate(["a"], retrieve=2)
    with pytest.raises(ValueError, match="give one of them"):
        model.generate(["a"], retrieve=2, before=[])
    with pytest.raises(ValueError, match="retrieve is -1"):
        model.generate(["a"], retrieve=-1)
    with pytest.raises(ValueError, match="query 0 has neither text nor picture"):
        model.generate([], retrieve=1)
    with pytest.raises(ValueError, match="documents for 1 prompts; there are 2"):
        model.generate_batch([["a"], ["b"]], before=[[]])
    retriever = model.retriever
    assert retriever is not None
    for key, what in (("vocabulary_digest", "vocabulary"), ("image_tokenizer_sha256", "image tokenizer")):
        monkeypatch.setitem(retriever.memory.manifest["tokens"], key, "other")
        with pytest.raises(ValueError, match=f"can not be read by this model: .*built with another {what}"):
            model.retriever = retriever
        monkeypatch.undo()


# commands


def config_of(kind: Any, **options: Any) -> Any:
    required = {"model": "m", "out": Path("o")}
    return kind(**required, **({} if kind is GenerateConfig else {"data": Path("d"), "classes": Path("c")}), **options)


@pytest.mark.parametrize("kind", [GenerateConfig, ClassifyConfig])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retrieve": 2}, "retrieve is 2, but memory is not given; give --memory DIR"),
        ({"memory": Path("m")}, "memory is m, but retrieve is 0; give --retrieve N"),
        ({"memory": Path("m"), "retrieve": -1}, "retrieve is -1"),
        ({"encoder": "e"}, "encoder can not act without memory"),
        ({"selection": SelectionConfig(max_score=0.5)}, "selection can not act without memory"),
        ({"random_seed": 0}, "random_seed can not act without memory"),
        ({"memory": Path("m"), "retrieve": 1, "random_seed": -1}, "random_seed is -1"),
        (
            {"memory": Path("m"), "retrieve": 1, "selection": SelectionConfig(num_candidates=3)},
            "num_candidates can not act here",
        ),
        ({"memory": Path("m"), "retrieve": 65}, "raise selection.search_depth"),
    ],
)
def test_options_that_can_not_act_are_refused(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(kind, **options)


def test_generate_lists_what_was_read(exported: Path, memory: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv = ["--model", str(exported), "--out", str(out), "--prompt", LIKE_FIRST, "--memory", str(memory)]
    argv += ["--retrieve", "2", "--selection.max_score", "0.8", "--device", "cpu"]
    generate(parse(GenerateConfig, argv))
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    model = MixedModal.from_pretrained(exported, "cpu")
    model.attach_memory(memory, selection=SelectionConfig(max_score=0.8))
    (found,) = model.retrieve([[LIKE_FIRST]], 2)
    assert [(one["key"], one["score"]) for one in results["retrieved"]] == [(one.key, one.score) for one in found]
    assert results["retrieval"]["selection"] == {"max_score": 0.8, "prefer_both": True, "search_depth": 64}
    pictures = [part["image"] for one in results["retrieved"] for part in one["parts"] if "image" in part]
    assert {path.name for path in out.iterdir()} == {*pictures, "0000.png", "results.json"}
    for number, (entry, one) in enumerate(zip(results["retrieved"], found)):
        content = model.codec.from_document(model.format.parse(one.ids))
        assert [part["text"] for part in entry["parts"] if "text" in part] == [
            part for part in content if isinstance(part, str)
        ]
        if one.key != "page":
            assert PIL.open(out / f"retrieved_{number:02d}.png").tobytes() == content[1].tobytes()  # type: ignore[union-attr]
    sample = PIL.open(out / "0000.png")
    assert json.loads(sample.text["retrieved"]) == [one.key for one in found]  # type: ignore[attr-defined]
    assert sample.tobytes() == model.generate([LIKE_FIRST], retrieve=2)[0].tobytes()


@pytest.mark.parametrize("method", ["image_given_text", "text_given_image"])
def test_classify_lists_what_was_read_for_each_picture(
    exported: Path, memory: Path, tmp_path: Path, method: str
) -> None:
    (tmp_path / "data").mkdir()
    for number, (_, picture) in enumerate(PAIRS[:3]):
        picture.save(tmp_path / "data" / f"{number}.png")
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    paths = {"data": tmp_path / "data", "classes": tmp_path / "classes.txt"}
    options: dict[str, Any] = {"memory": memory, "retrieve": 2, "device": "cpu", "method": method}
    classify(ClassifyConfig(model=str(exported), out=tmp_path / "near", **paths, **options))
    lines = lines_of(tmp_path / "near" / "records.jsonl")
    model = MixedModal.from_pretrained(exported, "cpu")
    model.attach_memory(memory)
    pictures = [picture for _, picture in PAIRS[:3]]
    found = model.retrieve_for_classes(pictures, CLASSES, method, 2)
    assert [one["retrieved"] for one in lines] == [[one.to_dict() for one in row] for row in found]
    scores = model.score_classes(pictures, CLASSES, method, retrieve=2).scores
    np.testing.assert_allclose([one["scores"] for one in lines], scores, atol=5e-5)  # worst seen 6e-6
    summary = json.loads((tmp_path / "near" / "summary.json").read_text())
    assert summary["settings"]["retrieval"]["memory"] == str(memory)
    classify(ClassifyConfig(model=str(exported), out=tmp_path / "drawn", **paths, **{**options, "random_seed": 1}))
    drawn = lines_of(tmp_path / "drawn" / "records.jsonl")
    assert [one["retrieved"] for one in drawn] != [one["retrieved"] for one in lines]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_memory_that_is_none_is_one_message(exported: Path, tmp_path: Path) -> None:
    part = [PromptPart(text="a")]
    with pytest.raises(ValueError, match=r"so .* holds no memory"):
        generate(
            GenerateConfig(model=str(exported), out=tmp_path, parts=part, memory=tmp_path, retrieve=1, device="cpu")
        )
    with pytest.raises(UsageError, match="retrieve is 2, but memory is not given"):
        parse(GenerateConfig, ["--model", "m", "--out", "o", "--retrieve", "2"])


def test_each_prompt_of_a_file_reads_its_own_documents(exported: Path, memory: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    path.write_text("".join(json.dumps({"key": key, "prompt": key}) + "\n" for key in (LIKE_FIRST, "pear")))
    argv = ["--model", str(exported), "--out", str(out), "--prompts", str(path), "--memory", str(memory)]
    generate(parse(GenerateConfig, [*argv, "--retrieve", "2", "--device", "cpu"]))
    model = MixedModal.from_pretrained(exported, "cpu")
    model.attach_memory(memory)
    for entry in map(json.loads, (out / "results.jsonl").read_text().splitlines()):
        (found,) = model.retrieve([[entry["key"]]], 2)
        keys = [one.key for one in found]
        assert [one["key"] for one in entry["retrieved"]] == keys
        written = PIL.open(out / f"{entry['key']}_0000.png")
        assert json.loads(written.text["retrieved"]) == keys
        (alone,) = model.generate(entry["key"], before=found)
        assert written.tobytes() == alone.tobytes()
        shown = [part["image"] for one in entry["retrieved"] for part in one["parts"] if "image" in part]
        assert all((out / name).is_file() and name.startswith(f"{entry['key']}_retrieved_") for name in shown)


def test_a_region_is_filled_behind_documents(exported: Path, memory: Path, tmp_path: Path, model: MixedModal) -> None:
    PAIRS[1][1].save(tmp_path / "picture.png")
    parts = [PromptPart(text=LIKE_FIRST), PromptPart(image=tmp_path / "picture.png", box=(0, 8, 16, 16))]
    common: dict[str, Any] = {"model": str(exported), "device": "cpu", "output": "infill", "parts": parts}
    generate(GenerateConfig(out=tmp_path / "out", memory=memory, retrieve=1, **common))
    generate(GenerateConfig(out=tmp_path / "bare", **common))
    found, bare = ((tmp_path / name / "0000.png") for name in ("out", "bare"))
    (wanted,) = model.infill(PAIRS[1][1], (0, 8, 16, 16), LIKE_FIRST, retrieve=1)
    assert PIL.open(found).tobytes() == wanted.tobytes() != PIL.open(bare).tobytes()
    (retrieved,) = json.loads((tmp_path / "out" / "results.json").read_text())["retrieved"]
    assert retrieved["key"] == model.retrieve([[LIKE_FIRST]], 1)[0][0].key
