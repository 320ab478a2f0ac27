"""Candidates of every document: never what gives it away, the same in any batch, and the same after a break."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from mixmodal import cli
from mixmodal.data.indexing import MemoryConfig, build_memory
from mixmodal.data.packing import Batch
from mixmodal.data.pipeline import DataConfig, PackedDocuments, open_retrievals, open_sources
from mixmodal.data.retrieved import RetrievalConfig
from mixmodal.data.retrieving import RetrieveConfig, retrieve
from mixmodal.data.shards import PictureFile, Sample, write_shards
from mixmodal.data.skipping import SampleLimits
from mixmodal.data.token_shards import TokenShards
from mixmodal.objectives.causal_masked import CausalMasked, CausalMaskedConfig
from mixmodal.retrieval.memory import HAS_IMAGE, HAS_TEXT, Memory, open_memory
from mixmodal.retrieval.selection import SelectionConfig

NUM_KINDS = 12
WORDS = ["red", "green", "blue", "apple", "pear", "flat", "round", "small"]


class Corpus(NamedTuple):
    """Shards, their tokens, and the memory of them."""

    shards: Path
    tokens: TokenShards
    memory: Memory


def caption(number: int, salt: int = 0) -> str:
    return " ".join(np.random.default_rng((number, salt)).choice(WORDS, 5).tolist())


def picture(number: int) -> PictureFile:
    """Four quarters in shades that follow from the number, so that no two have the same codes."""
    shades = np.array([[number % 15, number // 15], [3, 11]], np.uint8) * 16 + 8
    stream = io.BytesIO()
    Image.fromarray(np.kron(shades, np.ones((4, 4), np.uint8))).convert("RGB").save(stream, "PNG")
    return PictureFile(stream.getvalue(), "png", f"picture {number}")


def samples(prefix: str = "") -> list[Sample]:
    """Of each kind a pair, the same again, its picture with another caption, and the same text alone, twice."""
    found = []
    for number in range(NUM_KINDS):
        pair = (caption(number), picture(number))
        text = (caption(number, 2),)
        forms = {"a": pair, "b": pair, "c": (caption(number, 1), picture(number)), "t": text, "u": text}
        found += [Sample(f"{prefix}{form}{number}", parts) for form, parts in forms.items()]
    return [*found, Sample(f"{prefix}image", (picture(100),)), Sample(f"{prefix}two", ("one", picture(0), "two"))]


def leaks(samples: Sequence[Sample], query: Sample) -> set[int]:
    """Numbers of what gives a sample away: the same one, and any with one of its pictures."""
    shown = {part.data for part in query.pictures}
    return {
        number
        for number, sample in enumerate(samples)
        if sample.parts == query.parts or shown & {part.data for part in sample.pictures}
    }


@pytest.fixture
def corpus(tmp_path: Path, write_tokens: Any, fake_encoder: Any) -> Corpus:
    write_shards(samples(), tmp_path / "shards", shard_size=25)
    tokens = write_tokens((tmp_path / "shards",), out=tmp_path / "tokens")
    given = {"shards": (tmp_path / "shards",), "tokens": tokens.folder, "encoder": "org/clip"}
    return Corpus(tmp_path / "shards", tokens, build_memory(MemoryConfig(**given, out=tmp_path / "memory")))


def config_of(corpus: Corpus, **options: Any) -> RetrieveConfig:
    given = {"shards": (corpus.shards,), "tokens": corpus.tokens.folder, "memory": corpus.memory.folder}
    given |= {"out": corpus.shards.parent / "candidates", "part_documents": 10, "batch_size": 4}
    return RetrieveConfig(**{**given, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def arrays(folder: Path) -> list[list[Any]]:
    return np.concatenate([np.load(path) for path in sorted(folder.glob("part_*.npy"))]).tolist()


@pytest.mark.parametrize("prefer_both", [False, True])
@pytest.mark.parametrize("heldout", [False, True])
def test_no_candidate_gives_its_document_away(
    tmp_path: Path, corpus: Corpus, write_tokens: Any, heldout: bool, prefer_both: bool
) -> None:
    queries = samples("held-") if heldout else samples()
    config = config_of(corpus, selection=SelectionConfig(prefer_both=prefer_both))
    if heldout:  # the same contents under other names, which are not in the memory
        write_shards(queries, tmp_path / "heldout")
        tokens = write_tokens((tmp_path / "heldout",), out=tmp_path / "heldout_tokens")
        config = replace(config, shards=(tmp_path / "heldout",), tokens=tokens.folder)
    store = retrieve(config)
    assert len(store) == len(queries)
    sizes = []
    for number, query in enumerate(queries):
        pool = np.concatenate(store[number]).tolist()
        assert not leaks(samples(), query) & set(pool), query.key
        vectors = corpus.memory.vectors(pool)
        assert (vectors @ vectors.T - np.eye(len(pool)) <= 0.9).all()
        sizes.append(len(pool) / (bool(query.texts) + bool(query.pictures)))
    assert np.mean(sizes) > 1.9


def test_without_a_text_or_a_picture_there_are_no_candidates_of_it(corpus: Corpus) -> None:
    store = retrieve(config_of(corpus))
    for number, sample in enumerate(samples()):
        assert len(store[number].text) == (2 if sample.texts else 0)
        assert len(store[number].image) == (2 if sample.pictures else 0)
    assert corpus.memory.modalities[store[0].text].tolist() == [HAS_TEXT | HAS_IMAGE] * 2


def test_candidates_do_not_depend_on_batches_and_parts(corpus: Corpus) -> None:
    config = config_of(corpus)
    retrieve(config)
    for batch_size, part_documents in ((1, 10), (3, 7), (100, 100)):
        out = corpus.shards.parent / f"{batch_size}"
        retrieve(replace(config, out=out, batch_size=batch_size, part_documents=part_documents))
        assert arrays(out) == arrays(config.out)
    retrieve(replace(config, out=corpus.shards.parent / "seed", seed=1))
    assert arrays(corpus.shards.parent / "seed") != arrays(config.out)


def test_dropped_words_follow_from_seed_and_key(tmp_path: Path, corpus: Corpus, write_tokens: Any) -> None:
    backwards = samples()[::-1]
    write_shards(backwards, tmp_path / "backwards")
    tokens = write_tokens((tmp_path / "backwards",), out=tmp_path / "backwards_tokens")
    config = config_of(corpus)
    retrieve(config)
    other = replace(config, shards=(tmp_path / "backwards",), tokens=tokens.folder, out=tmp_path / "other")
    retrieve(other)
    assert arrays(other.out) == arrays(config.out)[::-1]


def test_a_job_that_broke_off_goes_on_and_ends_the_same(
    corpus: Corpus, fake_encoder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = config_of(corpus, out=corpus.shards.parent / "whole")
    retrieve(whole)
    line = capsys.readouterr().out.splitlines()[-1]
    assert "candidates of 62 documents, 0 without any, 2.00 a query, mean score 0." in line
    config = config_of(corpus)
    fake_encoder.embedded, fake_encoder.breaks_after = 0, 22
    with pytest.raises(RuntimeError, match="power cut"):
        retrieve(config)
    done = len(list(config.out.glob("part_*.npy")))
    assert 0 < done < 6
    fake_encoder.breaks_after = None
    with pytest.raises(ValueError, match=r"manifest\.json: query_dropout is 0\.2, not 0\.3: .* with other settings"):
        retrieve(replace(config, query_dropout=0.3))
    with pytest.raises(ValueError, match=r"manifest\.json: selection is .* with other settings"):
        retrieve(replace(config, selection=SelectionConfig(max_score=0.8)))
    fake_encoder.embedded = 0
    retrieve(config)
    assert fake_encoder.embedded == sum(len(sample.pictures) for sample in samples()[10 * done :])
    assert contents(config.out) == contents(whole.out)
    (config.out / "part_00001.npy").unlink()
    retrieve(config)
    assert contents(config.out) == contents(whole.out)
    fake_encoder.embedded = 0
    retrieve(config)
    assert fake_encoder.embedded == 0
    assert contents(config.out) == contents(whole.out)


def test_what_does_not_belong_together_is_named(
    tmp_path: Path, corpus: Corpus, write_tokens: Any, fake_encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(corpus)
    tokens = write_tokens((corpus.shards,), out=tmp_path / "other", num_sentinels=5)
    with pytest.raises(ValueError, match=r"memory/manifest\.json: tokens\.vocabulary_digest is .* another vocabulary"):
        retrieve(replace(config, tokens=tokens.folder))
    fake_encoder.identity = "f" * 64
    with pytest.raises(ValueError, match=r"memory/manifest\.json: encoder_identity is e{12}.* another encoder"):
        retrieve(config)
    fake_encoder.identity = "e" * 64
    fake_encoder.none_for = caption(7)
    with pytest.raises(ValueError, match=r"a7: the vector holds NaN or infinity, which the encoder gives of it"):
        retrieve(config)
    fake_encoder.none_for = None
    copy = Path(shutil.copytree(corpus.memory.folder, tmp_path / "copy"))
    (copy / "part_00000.tokens.npy").unlink()
    with pytest.raises(ValueError, match=r"part_00000\.tokens\.npy: missing"):
        retrieve(replace(config, memory=copy))
    with pytest.raises(ValueError, match=r"empty/manifest\.json: no such file, so .* holds no memory"):
        retrieve(replace(config, memory=tmp_path / "empty"))
    monkeypatch.undo()
    manifest = corpus.memory.folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace("org/clip", str(tmp_path / "moved")))
    with pytest.raises(ValueError, match=r"no folder .*moved.*; .*manifest\.json names it: give encoder, where it"):
        retrieve(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_dropout": 1.0}, r"query_dropout is 1\.0; it must be at least 0 and below 1"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    folder = Path("somewhere")
    with pytest.raises(ValueError, match=message):
        RetrieveConfig(memory=folder, shards=(folder,), tokens=folder, out=folder, **options)


def test_both_commands_with_a_real_encoder(
    tmp_path: Path,
    build_shards: Callable[..., Path],
    write_tokens: Any,
    save_tiny_encoder: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    shards, encoder = build_shards(7), save_tiny_encoder("clip", tmp_path / "encoder")
    tokens = write_tokens((shards,))
    data = ["--shards", f"[{shards}]", "--tokens", str(tokens.folder)]
    memory, out = str(tmp_path / "memory"), str(tmp_path / "candidates")
    cli.main(["index", *data, "--encoder", str(encoder), "--out", memory, "--index.kind", "flat"])
    opened = open_memory(memory, encoder_identity=None)
    assert (len(opened), opened.encoder) == (7, str(encoder.resolve()))
    encoder.rename(tmp_path / "moved")
    given = ["retrieve", *data, "--memory", memory, "--out", out, "--selection.max_score", "1.0"]
    with pytest.raises(SystemExit):
        cli.main(given)
    assert "give encoder, where it stands elsewhere by now" in capsys.readouterr().err
    cli.main([*given, "--encoder", str(tmp_path / "moved")])
    assert "candidates of 7 documents" in capsys.readouterr().out


def test_samples_without_tokens_have_no_candidates(
    tmp_path: Path, corpus: Corpus, build_picture: Callable[..., PictureFile], write_tokens: Any
) -> None:
    cut = Sample("cut", ("text", PictureFile(build_picture(9).data[:60], "png", "cut")))
    write_shards([samples()[0], cut, samples()[5]], tmp_path / "some")
    tokens = write_tokens((tmp_path / "some",), out=tmp_path / "some_tokens")
    limits = SampleLimits(max_skipped_share=0.5)
    config = replace(config_of(corpus), shards=(tmp_path / "some",), tokens=tokens.folder, limits=limits)
    store = retrieve(config)
    assert len(store) == 2
    whole = retrieve(config_of(corpus, out=tmp_path / "whole"))
    for ours, theirs in ((0, 0), (1, 5)):
        assert [found.tolist() for found in store[ours]] == [found.tolist() for found in whole[theirs]]


def rows_of(config: DataConfig, tokens: TokenShards) -> list[Batch]:
    sources = open_sources(config)
    rows = PackedDocuments(
        sources,
        tokens.build_format(),
        CausalMasked(CausalMaskedConfig(max_masks=4), tokens.vocabulary),
        config,
        micro_batch_size=2,
        retrieval=open_retrievals(config, sources),
    )
    return list(islice(rows, 6))


def test_training_rows_need_neither_faiss_nor_index_and_vectors(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    retrieve(config_of(corpus))
    memory = RetrievalConfig(memory=corpus.memory.folder)
    candidates = corpus.shards.parent / "candidates"
    config = DataConfig(tokens=corpus.tokens.folder, candidates=candidates, retrieval=memory, seq_len=200)
    wanted = rows_of(config, corpus.tokens)
    longest = max(int(batch.document_lengths.max()) for batch in wanted)
    assert longest > corpus.tokens.lengths.max() + 3 * 4  # with what was retrieved, and not with masks alone
    monkeypatch.setitem(sys.modules, "faiss", None)
    for kind in ("index_*", "*.vectors.npy", "*.modalities.npy"):
        for path in corpus.memory.folder.glob(kind):
            path.unlink()
    for batch, other in zip(rows_of(config, corpus.tokens), wanted, strict=True):
        assert batch.tokens.equal(other.tokens)
        assert batch.keys == other.keys


@pytest.mark.parametrize("key", ["text_tokenizer_sha256", "image_tokenizer_sha256"])
def test_a_memory_of_another_tokenizer_is_not_trained_with(corpus: Corpus, key: str) -> None:
    path = corpus.memory.folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["tokens"][key] = "f" * 64
    path.write_text(json.dumps(manifest))
    retrieval = RetrievalConfig(memory=corpus.memory.folder, random=True)
    config = DataConfig(tokens=corpus.tokens.folder, retrieval=retrieval, seq_len=200)
    with pytest.raises(ValueError, match=rf"manifest\.json: tokens\.{key} is f{{12}}"):
        open_retrievals(config, open_sources(config))
