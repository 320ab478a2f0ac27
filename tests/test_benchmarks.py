"""Figures in docs come from recorded measurements, and from nothing else."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from mixmodal import environment
from mixmodal.quickstart.runner import write_json

Load = Callable[[str], ModuleType]


def test_the_page_of_results_is_that_of_the_recorded_lines(load: Load) -> None:
    render = load("render")
    assert render.PAGE.read_text() == render.render(render.read_lines()), "run: python benchmarks/render.py"
    for path in render.WRITTEN_PAGES:
        page = path.read_text()
        assert page == render.fill(page, render.read_lines()), "run: python benchmarks/render.py"


def test_a_line_says_all_that_is_needed_and_the_newest_is_shown(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, render = load("record"), load("render")
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks/decode.py", "--turns", "3"])
    record.record("decode", "ours", [9.0, 1.0, 2.0], "tokens/s", "cpu", {"batch": 1})
    line = record.record("decode", "ours", [3.0, 50.0, 40.0], "tokens/s", "cpu", {"batch": 1})
    assert {"commit", "command", "device", "versions", "config", "repeats", "median"} <= set(line)
    page = render.render(render.read_lines(tmp_path))
    assert "| ours | CPU | 40 | tokens/s | 3 | 1 |" in page.splitlines()
    (note,) = [row for row in page.splitlines() if row.startswith("1. `python")]
    assert "decode.py --turns 3`" in note
    assert {line["device"], f"commit {line['commit'][:9]}"} <= set(note.split("; "))


def test_arms_are_rows_and_figures_are_columns_of_a_comparison(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, render = load("record"), load("render")
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    for arm, psnr in (("ours", [20.5, 20.25]), ("other", [19.0])):
        record.record("tokenizer_comparison", f"{arm}: psnr", psnr, "dB", "cpu", {})
    record.record("tokenizer_comparison", "ours: usage", [0.5], "", "cpu", {})
    page = render.render(render.read_lines(tmp_path)).splitlines()
    assert {"| CPU | psnr | usage |", "| ours | 20.5, 20.25 | 0.5 |", "| other | 19 |  |", "GPU: not run"} <= set(page)


def test_devices_without_a_measurement_say_not_run(load: Load) -> None:
    assert "| all | GPU | not run |" in load("render").render([])


def test_environment_names_versions_and_device() -> None:
    found = environment.versions()
    assert set(environment.PACKAGES) < set(found)
    assert environment.device()
    assert environment.num_cores() >= 1


def test_free_memory_is_within_the_limit_of_a_container(tmp_path: Path) -> None:
    assert (environment.free_memory_bytes() or 1) > 0
    assert environment.free_memory_bytes(tmp_path) is None
    for name in ("proc", "sys/fs/cgroup"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 5000 kB\n")
    assert environment.free_memory_bytes(tmp_path) == 5_120_000
    group = tmp_path / "sys/fs/cgroup"
    (group / "memory.stat").write_text("anon 1000000\nfile 3000000\n")
    for limit, free in (("max", 5_120_000), ("4000000", 3_000_000), ("90000000", 5_120_000), ("5", 0)):
        (group / "memory.max").write_text(limit + "\n")
        assert environment.free_memory_bytes(tmp_path) == free


def test_a_figure_of_the_processor_names_it_also_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    assert environment.device() == environment.device("cuda") == "a GPU"
    assert environment.device("cpu").endswith(" cores")


def test_commit_is_unknown_outside_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "mixmodal" / "environment.py"))
    monkeypatch.delenv("MIXMODAL_COMMIT", raising=False)
    assert environment.commit() == "unknown"
    monkeypatch.setenv("MIXMODAL_COMMIT", "a" * 40)  # of a copy without its history
    assert environment.commit() == "a" * 40


def test_bars_of_a_run_are_judged_and_undecided_without_a_figure(load: Load) -> None:
    record = load("record_quickstart")
    summary = {
        "seconds": 600.0,
        "tokenizer": {"psnr_heldout": 19.0},
        "classification": {"image_given_text_heldout": 0.2, "text_given_image_heldout": 0.35},
        "text_to_image": {"concept_accuracy_heldout": None},
    }
    lines = [*record.bar_lines(record.read_figures(summary))]
    assert len(lines) == 11
    (slow,) = [line for line in lines if line.endswith("not met")]
    assert slow.split()[:4] == ["the", "whole", "run", "600"]
    met = [line for line in lines if line.endswith(" met") and line != slow]
    assert ["19" in met[0], "nine other concepts" in met[1], len(met)] == [True, True, 2]
    assert "none" in next(line for line in lines if "held-out pairs, right concept" in line)


def test_random_documents_have_the_sizes_of_the_packaged_recipe(load: Load) -> None:
    documents = load("documents")
    recipe = documents.RECIPE
    assert documents.SHAPE.items() <= vars(recipe.configs["pretrain"].model).items()
    assert documents.FORMAT.grids["image"] == documents.IMAGES.grid
    assert len(documents.VOCABULARY.ids("image")) == documents.IMAGES.codebook_size


def test_the_contact_sheet_shows_generated_pictures_of_both_splits(load: Load, tmp_path: Path) -> None:
    picture = load("picture")
    items, captions = [], []
    for number in range(30):
        label = {"key": str(number), "heldout": number < 15}
        name = f"{number}.png"
        Image.new("RGB", (8, 8), (number, 2 * number, 200)).save(tmp_path / name)
        prompt = f"a thing of a long name {number}, outline style"
        items.append({"prompt": prompt, "label": label, "image": name})
        captions.append({"label": label, "image": "never opened.png", "caption": prompt})
    write_json(tmp_path / "samples" / "results.json", {"text_to_image": items, "image_to_text": captions})
    out = tmp_path / "docs" / "sheet.png"
    picture.render(tmp_path, out)
    with Image.open(out) as sheet:
        assert 900 <= sheet.width <= 1100
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(1 << 20) or []}
    assert {(0, 0, 200), (15, 30, 200)} <= colours
    assert (14, 28, 200) not in colours  # only the first of each split are shown
    assert out.stat().st_size < 150_000


def test_the_sheet_of_edits_shows_what_was_given_beside_what_was_drawn(load: Load, tmp_path: Path) -> None:
    from mixmodal.tokenization.autoencoder import AutoencoderConfig
    from mixmodal.tokenization.image import ImageTokenizer, ImageTokenizerConfig
    from mixmodal.tokenization.quantizer_base import QuantizerConfig

    autoencoder = AutoencoderConfig(patch_size=8, channels=8, channel_multipliers=(1,), mid_blocks=(), norm_groups=2)
    quantizer = QuantizerConfig(kind="fsq", levels=(4, 4))
    ImageTokenizer(ImageTokenizerConfig(image_size=16, autoencoder=autoencoder, quantizer=quantizer)).save(
        tmp_path / "export" / "image_tokenizer"
    )
    (tmp_path / "finetune" / "records").mkdir(parents=True)
    items = []
    for number in range(12):
        name = f"{number}.png"
        Image.new("RGB", (16, 16), (number, 2 * number, 200)).save(tmp_path / name)
        Image.new("RGB", (16, 16), "white").save(tmp_path / "finetune" / "records" / name)
        record = {"image1": name, "edit": "Draw it in outline style."}
        items.append({"task": "style", "heldout": number > 3, "record": record, "text": "a thing", "image": name})
    write_json(tmp_path / "finetune" / "answers" / "results.json", {"after": items})
    load("picture").render_edits(tmp_path, tmp_path / "edits.png")
    with Image.open(tmp_path / "edits.png") as sheet:
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(1 << 20) or []}
    assert {(number, 2 * number, 200) for number in range(4, 8)} <= colours
    assert not {(number, 2 * number, 200) for number in (*range(4), *range(8, 12))} & colours


@pytest.fixture
def compare(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load("compare_image_tokenizers")
    monkeypatch.setattr(module, "RUNS", tmp_path)
    return module


def test_a_shorter_comparison_keeps_its_discriminator_and_its_evaluation(compare: ModuleType) -> None:
    whole, short = compare.build_config("ours", 0, None), compare.build_config("ours", 0, 500)
    assert (short, compare.config_sha256(short)) == (whole, compare.config_sha256(whole))
    short = compare.build_config("ours", 0, 40)
    trainer = short.trainer
    assert (trainer.max_steps, short.adversarial.start_step, trainer.eval_every, trainer.save_every) == (40, 20, 20, 20)


def test_an_arm_is_done_only_where_its_config_is_that_of_the_scores(
    compare: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    config = compare.build_config("ours", 3, None)
    digest = compare.config_sha256(config)
    assert digest == compare.config_sha256(compare.build_config("ours", 4, None))  # folder and seed do not count
    others = [compare.build_config("ours", 3, 40), compare.build_config("fsq", 3, None)]
    assert len({digest, *map(compare.config_sha256, others)}) == 3
    assert not compare.is_done(config)
    folder = config.trainer.run_dir
    folder.mkdir()
    with pytest.raises(SystemExit, match=r"without scores\.json"):
        compare.is_done(config)
    line = {"config_sha256": digest, "date": "2026-01-02T03:04:05", "commit": "0123456789abcdef"}
    write_json(folder / "scores.json", line)
    assert compare.is_done(config)
    assert "2026-01-02 at commit 012345678" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"ours-3/scores\.json is of another config"):
        compare.is_done(others[0])


def test_arms_are_recorded_as_they_were_trained(compare: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def line(arm: str, seed: int, **fields: object) -> None:
        origin = {"commit": f"of {arm}", "versions": {"torch": "1"}, "device": "a processor", "device_kind": "cpu"}
        trained = {"config_sha256": f"sha {arm}", "command": f"train {arm} {seed}", "date": f"day {seed}"}
        shared = {"steps": 500, "batch": 16, "reference_sha256": "pictures"}
        values = dict.fromkeys(compare.UNITS, float(seed))
        found = {"arm": arm, "seed": seed, **shared, **origin, **trained, "values": values, **fields}
        write_json(compare.RUNS / f"{arm}-{seed}" / "scores.json", found)

    recorded: list[dict] = []
    monkeypatch.setattr(compare, "append", lambda **fields: recorded.append(fields))
    line("ours", 0)
    line("ours", 1)
    line("fsq", 0)
    compare.record_all()
    assert len(recorded) == 2 * len(compare.UNITS)
    (psnr,) = [fields for fields in recorded if fields["subject"] == "ours: psnr"]
    assert (psnr["repeats"], psnr["unit"], psnr["commit"]) == ([0.0, 1.0], "dB", "of ours")
    assert (psnr["command"], psnr["versions"]) == ("train ours 0; train ours 1", {"torch": "1"})
    assert psnr["config"]["sha256"] == "sha ours"
    assert psnr["config"]["trained"] == ["day 0", "day 1"]
    for fields, message in (
        ({"steps": 40}, "steps differs between all arms.*fsq-0 40"),
        ({"batch": 8}, "batch differs between all arms"),
        ({"reference_sha256": None}, "reference_sha256 differs between all arms, or is missing"),
    ):
        recorded.clear()
        line("fsq", 0, **fields)
        with pytest.raises(SystemExit, match=message):
            compare.record_all()
        assert not recorded
    line("fsq", 0)
    line("ours", 1, commit="another")
    with pytest.raises(SystemExit, match="commit differs between the seeds of ours"):
        compare.record_all()


def test_image_tokenizers_that_are_timed_hold_the_same_weights(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    measure, found = load("measure_image_tokenizer"), {}
    monkeypatch.setattr(measure, "record", lambda name, subject, values, *_: found.update({subject: values}))
    options = argparse.Namespace(repeats=2, image_size=32, channels=32, batch_size=2)
    measure.main(options, torch.device("cpu"))
    shares = {subject: values for subject, values in found.items() if subject.startswith("codes of ours")}
    assert list(shares.values()) == [[100.0], [100.0]]
    assert len(found["encode, ours over transformers.ChameleonVQVAE"]) == 2
    assert len(found["decode, ours over diffusers.VQModel"]) == 2


def test_vectors_of_a_measured_memory_lie_in_clusters(load: Load) -> None:
    import numpy as np

    measure = load("memory_search")
    contents = [(0, number) for number in range(200)]
    vectors = measure.draw_vectors(contents, 2, 512)
    assert np.array_equal(vectors[[7]], measure.draw_vectors([(0, 7)], 2, 512))
    products = vectors @ vectors.T
    same = products > 0.35
    assert np.array_equal(same, same[0][:, None] == same[0])
    assert 0.3 < same.mean() < 0.7
    off_diagonal = ~np.eye(200, dtype=bool)
    assert products[same & off_diagonal].mean() == pytest.approx(0.7, abs=0.02)
    assert products[~same].mean() == pytest.approx(0, abs=0.1)
    assert measure.recall(np.array([[1, 2], [3, -1]]), np.array([[2, 1], [3, 4]])) == 0.75


@pytest.fixture
def throughput(load: Load) -> ModuleType:
    return load("train_throughput")


@pytest.mark.slow
def test_processes_that_share_a_batch_are_compared_with_one(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, record = load("measure_ranks"), sys.modules["record"]
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(ranks, "RANKS", (2,))
    monkeypatch.setattr(ranks, "STAGES", (3,))
    ranks.measure(2, tmp_path)
    found = load("render").read_lines(tmp_path / "results")
    assert len(found) == 4
    assert all(0 <= line["median"] < 1e-5 for line in found)
    other = ranks.differences(tmp_path / "one", tmp_path / "one")
    assert other == (0, 0)


@pytest.mark.slow  # imports transformers
def test_both_loops_of_the_comparison_learn_the_same(load: Load, throughput: ModuleType, tmp_path: Path) -> None:
    parity = load("../tests/models/test_transformer_parity")
    options = argparse.Namespace(shape="tiny", rows=0, steps=2, precision="float32", compile=False)
    config = throughput.build_config(options, tmp_path)
    task = throughput.PretrainTask(config)
    batch = next(task.build_loader(2, 1, 0, 1))
    assert batch.num_documents >= 4
    peer, model = throughput.build_peer(config.model), task.build_model()
    model.load_state_dict(parity.from_theirs(peer.state_dict()))
    ours = task.losses(model, batch, 0).objective / task.batch_weight(batch)
    theirs = throughput.peer_loss(peer, batch, isolated=True)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)  # worst seen 1e-7
    assert ours.item() != pytest.approx(throughput.peer_loss(peer, batch, isolated=False).item(), rel=1e-5)
