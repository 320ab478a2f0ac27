"""Vectors are those of transformers, and folders that hold no encoder give one clear message."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixmodal.data.synthetic import synthetic_pairs
from mixmodal.retrieval.encoder import DocumentParts, combine, load_encoder, normalise

TEXTS = ["a red apple", "a", "green pears and a lot more of them than the tower has positions for", "two", "a red pear"]
PICTURES = [pair.picture for pair in synthetic_pairs(5, 20)]
POSITIONS = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, save_tiny_encoder: Callable[..., Path]) -> dict[str, Path]:
    kinds = ("clip", "siglip")
    return {kind: save_tiny_encoder(kind, tmp_path_factory.mktemp(kind), POSITIONS) for kind in kinds}


@pytest.fixture
def clip(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that may be broken."""
    return Path(shutil.copytree(folders["clip"], tmp_path / "clip"))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_vectors_are_the_normalised_features_of_transformers(folders: dict[str, Path], kind: str) -> None:
    from transformers import AutoModel, AutoProcessor

    encoder = load_encoder(folders[kind])
    model, processor = AutoModel.from_pretrained(folders[kind]).eval(), AutoProcessor.from_pretrained(folders[kind])
    padding = "max_length" if kind == "siglip" else True
    ids = processor(text=TEXTS, padding=padding, truncation=True, max_length=POSITIONS, return_tensors="pt")
    assert ids["input_ids"].shape == (len(TEXTS), POSITIONS)
    if kind == "siglip":
        del ids["attention_mask"]
    pixels = processor(images=PICTURES, return_tensors="pt")
    with torch.no_grad():
        wanted = model.get_text_features(**ids).pooler_output, model.get_image_features(**pixels).pooler_output
    for found, features in zip((encoder.embed_texts(TEXTS), encoder.embed_images(PICTURES)), wanted, strict=True):
        assert (found.shape, found.dtype) == ((len(TEXTS), encoder.dim), np.float32)
        assert np.abs(np.linalg.norm(found.astype(np.float64), axis=1) - 1).max() < 1e-6  # worst seen 3e-8
        theirs = torch.nn.functional.normalize(features, dim=-1).numpy()
        assert np.abs(found - theirs).max() < 1e-6  # worst seen 6e-8
        assert np.abs(found[0] - found[1]).max() > 1e-3


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_vectors_do_not_depend_on_the_batch(folders: dict[str, Path], kind: str) -> None:
    whole, one = load_encoder(folders[kind]), load_encoder(folders[kind], batch_size=1)
    assert np.abs(whole.embed_texts(TEXTS) - one.embed_texts(TEXTS)).max() < 1e-6  # worst seen 1.2e-7
    assert np.abs(whole.embed_images(PICTURES) - one.embed_images(PICTURES)).max() < 1e-6  # worst seen 1.1e-7
    assert whole.embed_texts([]).shape == (0, whole.dim)


def test_documents_are_embedded_as_one_by_one(folders: dict[str, Path]) -> None:
    encoder = load_encoder(folders["clip"], batch_size=2)
    texts, images = encoder.embed_texts(TEXTS), encoder.embed_images(PICTURES)
    documents = [
        DocumentParts(TEXTS[:2], PICTURES[:1]),
        DocumentParts((), PICTURES[1:3]),
        DocumentParts(TEXTS[2:3]),
        DocumentParts(TEXTS[3:], PICTURES[3:]),
    ]
    found = encoder.embed_documents(documents)
    wanted = [
        combine(texts[:2], images[:1]),
        combine(texts[:0], images[1:3]),
        texts[2],
        combine(texts[3:], images[3:]),
    ]
    assert np.abs(found - np.stack(wanted)).max() < 1e-6
    assert np.abs(encoder.embed_documents([documents[1]])[0] - wanted[1]).max() < 1e-6
    with pytest.raises(ValueError, match="without text and without picture"):
        encoder.embed_documents([DocumentParts()])


def test_text_and_image_part_weigh_the_same() -> None:
    along = np.eye(3, dtype=np.float32)
    mixed = combine(along[[0]], along[[1]])
    assert mixed == pytest.approx([0.5**0.5, 0.5**0.5, 0])
    # several texts, and longer vectors, do not outweigh the picture
    assert combine(5 * along[[0, 0, 0]], along[[1]]) == pytest.approx(mixed)
    several = combine(along[[0, 2]], along[[1]])
    assert several == pytest.approx([0.5, 0.5**0.5, 0.5])
    assert combine(along[[0, 2]], along[:0]) == pytest.approx([0.5**0.5, 0, 0.5**0.5])
    assert combine(along[[0, 2]] * np.float32([[9], [1]]), along[:0]) == pytest.approx([0.5**0.5, 0, 0.5**0.5])
    assert np.isnan(combine(along[[0]], -along[[0]])).all()
    assert np.linalg.norm(normalise(np.float32([[3, 4]]))) == pytest.approx(1)


def test_the_identity_is_that_of_the_files_that_decide_vectors(clip: Path, folders: dict[str, Path]) -> None:
    identity = load_encoder(folders["clip"]).identity
    assert len(identity) == 64
    (clip / "README.md").write_text("a copy")
    assert load_encoder(clip).identity == identity
    assert load_encoder(folders["siglip"]).identity != identity
    for name in ("config.json", "model.safetensors"):
        path = clip / name
        whole = path.read_bytes()
        changed = (
            whole.replace(b'"logit_scale', b' "logit_scale', 1) if name == "config.json" else whole[:-4] + b"\0" * 4
        )
        path.write_bytes(changed)
        assert load_encoder(clip).identity != identity, name
        path.write_bytes(whole)
    assert load_encoder(clip).identity == identity


def test_folders_that_hold_no_encoder_give_one_message(clip: Path, tmp_path: Path) -> None:
    def refused(match: str, folder: Path = clip) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            load_encoder(folder)
        assert "\n" not in str(caught.value)

    refused("there is no folder .*nowhere", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused(r"empty: it has no config\.json", tmp_path / "empty")
    config, weights = clip / "config.json", clip / "model.safetensors"
    whole = config.read_text()
    config.write_text("{")
    refused(r"config\.json is not the config of a model")
    config.write_text(json.dumps({"model_type": "bert"}))
    refused(r"config\.json has model_type 'bert'; it must be clip or siglip")
    config.write_text(whole)
    data = weights.read_bytes()
    weights.write_bytes(data[:-100])
    refused("clip can not be loaded: ")
    weights.rename(clip / "pytorch_model.bin")
    refused(r"it has no model\*\.safetensors, and weights of other kinds are not read")
    weights.write_bytes(data)
    (clip / "tokenizer.json").unlink()
    refused("clip can not be loaded: .*tokenizer")


def test_weights_that_miss_a_tensor_are_refused_instead_of_random(clip: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(clip / "model.safetensors")
    del tensors["text_projection.weight"]
    save_file(tensors, clip / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 tensors are missing in its weights \(text_projection\.weight"):
        load_encoder(clip)


def test_without_transformers_the_extra_is_named(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"needs transformers: pip install 'mixmodal\[retrieval\]'"):
        load_encoder(clip)


def test_a_repository_that_the_hub_does_not_give_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def refuse(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match="no folder some/clip@v1, and the Hugging Face hub does not give it: no"):
        load_encoder("some/clip@v1")
    assert (asked["name"], asked["revision"]) == ("some/clip", "v1")
    assert "pytorch_model.bin" not in asked["allow_patterns"]
