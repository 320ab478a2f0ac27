"""Scores of a task against ones worked out by hand, scorers of every kind, and files that are no task."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL.Image import Image as Picture

from mixmodal.classification.autoregressive import AutoregressiveClassifier
from mixmodal.classification.compositional import evaluate_compositions, judge, read_compositions
from mixmodal.classification.contrastive import ContrastiveClassifier
from mixmodal.classification.likelihoods import SequenceScorer
from mixmodal.classification.pair_scores import by_costs, by_encoder, by_image_alone, by_likelihood, by_text_alone
from mixmodal.classification.units import Unit
from mixmodal.data.synthetic import synthetic_pairs
from mixmodal.document import Document, Text, build_format
from mixmodal.models.transformer import Transformer, TransformerConfig
from mixmodal.retrieval.encoder import load_encoder
from mixmodal.tokenization.codec import Codec
from mixmodal.tokenization.image import ImageTokenizer
from mixmodal.tokenization.text import TextTokenizer
from mixmodal.vocabulary import Vocabulary, VocabularyConfig

CAPTIONS = ["a red apple", "a blue pear"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for place, pair in enumerate(synthetic_pairs(2, 16)):
        pair.picture.save(tmp_path / f"{place}.png")
    return tmp_path


@pytest.fixture
def write(folder: Path) -> Callable[..., Path]:
    """A function of lines, as data: the file with them."""

    def write_lines(*lines: object) -> Path:
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        (folder / "task.jsonl").write_text(text + "\n")
        return folder / "task.jsonl"

    return write_lines


def line(**fields: object) -> dict[str, object]:
    return {"images": ["0.png", "1.png"], "captions": CAPTIONS, "true": [0, 1], **fields}


@pytest.mark.parametrize(
    ("scores", "credits", "text", "image"),
    [
        ([[2, 1], [1, 2]], (1, 1), True, True),
        ([[2, 1], [4, 5]], (1, 1), True, False),  # the second picture fits everything better
        ([[5, 9], [1, 6]], (0, 1), False, False),
        ([[5, 7], [1, 8]], (0, 1), False, True),
        ([[1, 1], [1, 1]], (0.5, 0.5), False, False),
    ],
)
def test_a_grid_is_judged_as_in_winoground(
    scores: list[list[float]], credits: tuple[float, ...], text: bool, image: bool
) -> None:
    found = judge(np.array(scores, dtype=float), [0, 1])
    assert (found.credits, found.text, found.image, found.group) == (credits, text, image, text and image)
    swapped = judge(np.array(scores, dtype=float)[:, ::-1], [1, 0])
    assert swapped == found


def test_captions_of_one_picture_share_the_credit_of_a_tie() -> None:
    found = judge(np.array([[3.0, 3.0, 1.0]]), [1])
    assert found == ((0.5,), 1, None, None, None)


def test_a_likely_picture_is_taken_out_where_pictures_are_compared(write: Callable[..., Path]) -> None:
    likely = np.array([0.0, 100.0])

    def score(pictures: Sequence[Picture], captions: Sequence[str]) -> np.ndarray:
        return likely[:, None] + np.array([[1.0, 0.0], [0.0, 1.0]])

    task = read_compositions(write(line()))
    plain = evaluate_compositions(task, score)["all"]
    assert (plain["text"], plain["image"], plain["group"]) == (1, 0, 0)
    debiased = evaluate_compositions(task, score, lambda pictures: likely)["all"]
    assert (debiased["text"], debiased["image"], debiased["group"]) == (1, 1, 1)


def test_kinds_are_told_apart(write: Callable[..., Path]) -> None:
    one = {"images": ["0.png"], "true": [1]}
    task = read_compositions(write(line(kind="order", key="a"), "", line(**one, kind="choice", key="b")))
    found = evaluate_compositions(task, lambda pictures, captions: np.eye(2)[: len(pictures)])
    assert found["kinds"]["order"]["accuracy"] == 1
    assert found["kinds"]["choice"]["accuracy"] == 0
    assert found["all"]["num_correct"] == 2
    assert (found["all"]["num_pictures"], found["all"]["num_grids"]) == (3, 1)


def test_models_score_as_their_classifiers_do_and_the_blind_one_sees_nothing(
    write: Callable[..., Path], tokenizers: Path, save_tiny_encoder: Callable[..., Path], tmp_path: Path
) -> None:
    text, image = TextTokenizer.load(tokenizers / "text.model"), ImageTokenizer.load(tokenizers / "image")
    sizes = VocabularyConfig(codebook_sizes={"image": 75}, num_text_pieces=text.num_pieces, num_sentinels=2)
    codec = Codec(text, image, build_format("cm3leon", Vocabulary(sizes), {"image": (4, 4)}))
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=codec.format.vocabulary.size, dim=16, num_layers=1, num_heads=2, ffn_dim=32, init_std=0.3
    )
    scorer = SequenceScorer(Transformer(config).eval(), codec.format)
    task = read_compositions(write(line()))
    pictures = [pair.picture for pair in synthetic_pairs(2, 16)]
    documents = [Document([one]) for one in codec.encode_pictures(pictures)]
    classes = [Document([Text(caption)]) for caption in CAPTIONS]
    for method, debias in (("image_given_text", 0.0), ("text_given_image", 0.7)):
        found = evaluate_compositions(
            task, by_likelihood(scorer, codec, method, debias=debias), by_image_alone(scorer, codec)
        )
        wanted = AutoregressiveClassifier(scorer, classes, method, debias).score(documents).scores
        np.testing.assert_allclose(found["lines"][0]["scores"], wanted, atol=1e-5)
        assert len(found["lines"][0]["picture_scores"]) == 2
    blind = evaluate_compositions(task, by_text_alone(scorer))
    assert blind["lines"][0]["scores"][0] == blind["lines"][0]["scores"][1]
    assert (blind["all"]["num_correct"], blind["all"]["text"], blind["all"]["image"]) == (1, 0, 0)
    encoder = load_encoder(save_tiny_encoder("siglip", tmp_path / "siglip"))
    found = evaluate_compositions(task, by_encoder(encoder))
    wanted = ContrastiveClassifier(encoder, CAPTIONS).score(pictures).scores
    np.testing.assert_allclose(found["lines"][0]["scores"], wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", r"line 2: not JSON"),
        ([1], r"line 2: a line is an object"),
        (line(label=1), r"line 2: unknown field 'label'"),
        (line(images=[]), r"line 2: images is \[\]"),
        (line(captions=["a", ""]), r"line 2: captions is \['a', ''\]"),
        (line(captions=["a", "a"]), r"line 2: captions are \['a', 'a'\]; give at least two, all different"),
        (line(true=[0]), r"line 2: true is \[0\]; give the number of the true caption for each of 2"),
        (line(true=[0, 2]), r"line 2: true has 2; captions are numbered 0 .. 1"),
        (line(true=[0, True]), r"line 2: true has True"),
        (line(images=["0.png", "../x.png"]), r"line 2: the picture '../x.png' lies outside"),
        (line(images=["0.png", "/etc/hostname"]), r"line 2: the picture '/etc/hostname' lies outside"),
        (line(images=["0.png", "9.png"]), r"line 2: there is no picture .*9.png"),
        (line(key="first"), r"line 2: the key 'first' comes twice"),
        (line(key=3), r"line 2: key and kind are strings, not 3"),
    ],
)
def test_what_is_no_task_is_named_by_line(write: Callable[..., Path], bad: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_compositions(write(line(key="first"), bad))


def test_a_link_out_of_the_folder_is_refused(write: Callable[..., Path], folder: Path) -> None:
    (folder / "2.png").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="lies outside"):
        read_compositions(write(line(images=["0.png", "2.png"])))


def test_scores_that_are_none_are_named(write: Callable[..., Path]) -> None:
    task = read_compositions(write(line(key="x")))
    with pytest.raises(ValueError, match=r"scores of x have the shape \(2,\) instead of \(2, 2\)"):
        evaluate_compositions(task, lambda pictures, captions: np.zeros(2))
    with pytest.raises(ValueError, match="scores of x are not finite"):
        evaluate_compositions(task, lambda pictures, captions: np.full((2, 2), np.nan))
    with pytest.raises(ValueError, match="there is no file"):
        read_compositions(Path("nowhere.jsonl"))


def test_costs_become_minus_their_weighted_mean_over_units() -> None:
    table = np.random.default_rng(0).random((2, 3, 4))
    units = [Unit(index, 0.5, index, 1, 0, weight) for index, weight in enumerate([1.0, 2.0, 0.5, 1.0])]

    class Listed:
        scale = 8.0

        def cost(self, pictures: Sequence[int], classes: Sequence[int], units: Sequence[Unit]) -> np.ndarray:
            return np.array([table[row, column, unit.index] for row, column, unit in zip(pictures, classes, units)])

    score = by_costs(lambda pictures, captions: Listed(), units)
    found = score([pair.picture for pair in synthetic_pairs(2, 8)], ["a", "b", "c"])
    np.testing.assert_allclose(found, -8.0 * (table * [1.0, 2.0, 0.5, 1.0]).mean(axis=2))
