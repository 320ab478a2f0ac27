"""The demo corpus: held-out pairs are never trained on, and concepts are what the rules say."""

import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mixmodal.data.shards import read_samples
from mixmodal.quickstart import art, corpus
from mixmodal.quickstart.art import PACKAGES, STYLES, Emoji, find_emoji, render
from mixmodal.quickstart.corpus import (
    EXTRA,
    HELDOUT,
    MIXED,
    TRAIN,
    DemoCorpusConfig,
    build_demo_corpus,
    choose_concepts,
    choose_heldout,
    correlations,
    distances_to_nearest,
)

ALL = DemoCorpusConfig(min_correlation=-1.0, min_distance=0.0)
needs_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in PACKAGES), reason="the demo packages are not installed"
)


def draw(path, seed, outlined):
    """A shape of a random size, place and colour on a transparent ground."""
    rng = np.random.default_rng(seed)
    picture = Image.new("RGBA", (72, 72))
    left, top = rng.integers(0, 30, 2).tolist()
    box = (left, top, left + int(rng.integers(20, 40)), top + int(rng.integers(20, 40)))
    colour = (*rng.integers(0, 200, 3).tolist(), 255)
    ImageDraw.Draw(picture).ellipse(box, fill=colour, outline="black" if outlined else None, width=2)
    picture.save(path)


@pytest.fixture
def emoji(tmp_path, monkeypatch):
    """Forty drawn emoji in place of those of the packages; the last two are drawn in one style only."""
    folder = tmp_path / "art"
    folder.mkdir()
    found = []
    for number in range(40):
        files = {}
        for style in STYLES if number < 38 else STYLES[number - 38 :][:1]:
            files[style] = folder / f"{number}_{style}.png"
            draw(files[style], number, style == "outline")
        category = "flags" if number < 3 else "food & drink"
        found.append(Emoji(f"1f{number:03x}", f"thing {number}", category, f"1f{number // 2:03x}", files))
    monkeypatch.setattr(corpus, "find_emoji", lambda skin_tones: found)
    return found


def keys(folder):
    return [sample.key for sample in read_samples(folder)]


def test_held_out_pairs_are_in_no_other_folder(emoji, tmp_path):
    built = build_demo_corpus(replace(ALL, mixed=True, heldout_share=0.25), tmp_path / "out")
    heldout = {(pair["code_point"], pair["style"]) for pair in built.pairs if pair["split"] == "heldout"}
    assert len(heldout) == built.counts["heldout"] == round(0.25 * 2 * 35)
    pictures = {part.data for sample in read_samples(built.folder / HELDOUT) for part in sample.pictures}
    captions = {sample.texts[0] for sample in read_samples(built.folder / HELDOUT)}
    for folder in (built.folder / TRAIN, built.folder / EXTRA, built.folder / MIXED):
        for sample in read_samples(folder):
            assert not pictures & {part.data for part in sample.pictures}
            assert not captions & set(sample.texts)


def test_held_out_concept_is_trained_in_its_other_style_only(emoji, tmp_path):
    built = build_demo_corpus(replace(ALL, heldout_share=0.25), tmp_path / "out")
    splits = {(pair["concept"], pair["style"]): pair["split"] for pair in built.pairs}
    concepts = [concept for (concept, _), split in splits.items() if split == "heldout"]
    assert len(set(concepts)) == len(concepts)
    for concept in concepts:
        assert sorted(splits[concept, style] for style in STYLES) == ["heldout", "train"]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5])
def test_held_out_pairs_are_balanced_between_the_styles(emoji, share):
    heldout = [style for _, style in choose_heldout(emoji, replace(ALL, heldout_share=share))]
    assert len(heldout) == round(share * 2 * len(emoji))
    assert abs(heldout.count("flat") - heldout.count("outline")) <= 1


def test_every_picture_is_in_exactly_one_place(emoji, tmp_path):
    built = build_demo_corpus(ALL, tmp_path / "out")
    found = [
        key for folder in (built.folder / TRAIN, built.folder / HELDOUT, built.folder / EXTRA) for key in keys(folder)
    ]
    assert sorted(found) == sorted(f"{entry.code_point}_{style}" for entry in emoji for style in entry.files)
    assert {key.split("_")[0] for key in keys(built.folder / EXTRA)} == {"1f000", "1f001", "1f002", "1f026", "1f027"}
    assert built.counts["train"] == len(keys(built.folder / TRAIN))


def test_families_that_are_too_small_are_left_out(emoji, tmp_path):
    built = build_demo_corpus(replace(ALL, min_family=2), tmp_path / "out")
    # of the pairs 0-1, 2-3, ... the first three emoji are flags and 38 and 39 lack a style: 3 loses its sibling
    assert {pair["concept"] for pair in built.pairs} == {f"thing {number}" for number in range(4, 38)}


def test_captions_and_metadata(emoji, tmp_path):
    built = build_demo_corpus(ALL, tmp_path / "out")
    for sample in read_samples(built.folder / TRAIN):
        metadata = sample.metadata
        assert sample.texts == [f"{metadata['concept']}, {metadata['style']} style"]
        assert set(metadata) == {"key", "concept", "style", "category", "code_point", "split"}
        assert sample.pictures[0].open(10_000).size == (32, 32)
    written = json.loads((built.folder / "corpus.json").read_bytes())
    assert written["pairs"] == built.pairs
    assert set(written["licences"]) == set(STYLES)


def test_mixed_documents_hold_both_styles_of_trained_concepts(emoji, tmp_path):
    built = build_demo_corpus(replace(ALL, mixed=True, heldout_share=0.25), tmp_path / "out")
    samples = list(read_samples(built.folder / MIXED))
    trained = {
        key: part.data
        for sample in read_samples(built.folder / TRAIN)
        for key, part in [(sample.key, sample.pictures[0])]
    }
    assert len(samples) == 35 - round(0.25 * 2 * 35)
    orders = set()
    for sample in samples:
        first, one, second, two = sample.parts
        styles = tuple(text.rsplit(", ", 1)[1].removesuffix(" style") for text in (first, second))
        assert [one.data, two.data] == [trained[f"{sample.metadata['code_point']}_{style}"] for style in styles]
        orders.add(styles)
    assert orders == {STYLES, STYLES[::-1]}
    assert not (build_demo_corpus(ALL, tmp_path / "plain").folder / MIXED).exists()


def test_corpus_follows_from_the_seed(emoji, tmp_path):
    first = build_demo_corpus(ALL, tmp_path / "a")
    again = build_demo_corpus(ALL, tmp_path / "b")
    other = build_demo_corpus(replace(ALL, seed=1), tmp_path / "c")
    assert first.pairs == again.pairs
    assert (first.folder / TRAIN / "00000.tar").read_bytes() == (again.folder / TRAIN / "00000.tar").read_bytes()
    assert {pair["key"] for pair in first.pairs if pair["split"] == "heldout"} != {
        pair["key"] for pair in other.pairs if pair["split"] == "heldout"
    }


def test_finished_corpus_is_kept_and_an_unfinished_one_is_built_again(emoji, tmp_path, monkeypatch):
    first = build_demo_corpus(ALL, tmp_path / "out")
    (first.folder / "corpus.json").unlink()
    assert build_demo_corpus(ALL, tmp_path / "out") == first
    monkeypatch.setattr(corpus, "find_emoji", lambda skin_tones: pytest.fail("built again"))
    assert build_demo_corpus(ALL, tmp_path / "out") == first
    with pytest.raises(ValueError, match=r"corpus\.json: seed is 0, not 1; remove the folder"):
        build_demo_corpus(replace(ALL, seed=1), tmp_path / "out")


def test_rules_leave_concepts_out(emoji, tmp_path):
    def concepts(**options):
        built = build_demo_corpus(replace(ALL, **options), tmp_path / f"out {len(list(tmp_path.iterdir()))}")
        return {pair["concept"] for pair in built.pairs}

    every = {f"thing {number}" for number in range(38)}
    flags = {"thing 0", "thing 1", "thing 2"}
    assert concepts(skip_categories=()) == every
    assert concepts() == every - flags
    assert concepts(skip_patterns=(r"^thing 1", "7$")) == {
        name for name in every - flags if name[6] != "1" and name[-1] != "7"
    }
    drawn = concepts(max_concepts=10)
    assert len(drawn) == 10
    assert drawn < every
    with pytest.raises(ValueError, match="no concept of the demo corpus is left"):
        concepts(min_correlation=1.0)


def test_look_alikes_and_different_motifs_are_left_out(emoji):
    rng = np.random.default_rng(0)
    pictures = {}
    for entry in emoji:
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        pictures.update({(entry.code_point, style): pixels for style in STYLES})
    look_alike, other_motif = emoji[5].code_point, emoji[7].code_point
    pictures[look_alike, "outline"] = pictures[emoji[6].code_point, "outline"]
    pictures[other_motif, "outline"] = 255 - pictures[other_motif, "flat"]
    config = DemoCorpusConfig(min_correlation=0.5, min_distance=0.1)
    left = {entry.code_point for entry in choose_concepts(emoji, pictures, config)}
    out = {entry.code_point for entry in emoji[3:38]} - left
    assert out == {look_alike, emoji[6].code_point, other_motif}


def test_similarities_are_those_of_numpy():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 256, (2, 6, 30), dtype=np.uint8)
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(first, second)]
    np.testing.assert_allclose(correlations(first, second), expected, atol=1e-5)  # measured: 1e-7
    scaled = first / 255
    distances = np.sqrt(((scaled[:, None] - scaled[None]) ** 2).mean(-1)) + 9 * np.eye(6)
    np.testing.assert_allclose(distances_to_nearest(first), distances.min(1), atol=1e-5)  # measured: 1e-7


def test_pictures_are_cropped_and_centred_on_white(tmp_path):
    picture = Image.new("RGBA", (72, 72), (0, 0, 255, 0))
    picture.paste((255, 0, 0, 255), (10, 40, 40, 50))
    picture.save(tmp_path / "a.png")
    pixels = np.asarray(render(tmp_path / "a.png", 32, 1 / 16)).astype(int)
    red = np.abs(pixels - (255, 0, 0)).max(-1) < 64
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    assert (columns[0], columns[-1]) in ((2, 28), (2, 29), (3, 29))  # an odd side centres to half a pixel
    assert abs((rows[0] + rows[-1]) / 2 - 15.5) <= 1
    assert (pixels[0] == 255).all()


def test_progress_reaches_the_end(emoji, tmp_path):
    seen = []
    build_demo_corpus(ALL, tmp_path / "out", lambda *numbers: seen.append(numbers))
    assert seen[-1] == (78, 78)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(art, "PACKAGES", ("json", "no_such_package"))
    with pytest.raises(ValueError, match=r'need no-such-package; install with: pip install -e "\.\[demo\]"'):
        find_emoji()


@pytest.mark.parametrize("options", [{"heldout_share": 0.6}, {"image_size": 4}, {"margin": 0.5}])
def test_settings_out_of_range_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DemoCorpusConfig(**options)


@needs_packages
def test_packages_hold_the_emoji():
    found = {entry.concept: entry for entry in find_emoji()}
    assert len(found) > 1900
    apple = found["red apple"]
    assert (apple.code_point, apple.category) == ("1f34e", "food & drink")
    for path in apple.files.values():
        pixels = np.asarray(render(path, 32, 1 / 32)).astype(int)
        red = (pixels[..., 0] > 150) & (pixels[..., 1] < 110)
        assert red.mean() > 0.25
        assert (pixels[0, 0] == 255).all()
    assert found["sark"].category == "flags"
    assert not any("skin tone" in name for name in found)
    assert all(len(set(entry.files) - set(STYLES)) == 0 for entry in found.values())


@pytest.mark.slow
@needs_packages
def test_whole_corpus_is_built(tmp_path):
    built = build_demo_corpus(DemoCorpusConfig(), tmp_path / "out")
    assert built.counts["concepts"] > 400
    assert sum(built.counts[name] for name in ("train", "heldout", "tokenizer_extra")) > 3800


def test_wanted_skin_tones_are_concepts_of_their_category() -> None:
    plain, toned = ({entry.concept: entry for entry in find_emoji(tones)} for tones in ((), ("light", "dark")))
    added = {name: entry for name, entry in toned.items() if name not in plain}
    assert plain.keys() < toned.keys()
    assert added["waving hand dark skin tone"].category == toned["waving hand"].category == "people & body"
    assert {name.rsplit(" skin tone", 1)[0].split()[-1] for name in added if name.endswith("skin tone")} == {
        "light",
        "dark",
    }
    assert not any("medium" in name for name in added)
