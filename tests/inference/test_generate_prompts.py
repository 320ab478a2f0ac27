"""The generate command on files of prompts: what it writes, how it goes on, and what it does about failures."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PIL

from mixmodal import MixedModal
from mixmodal.cli import command
from mixmodal.pipeline.generate import GenerateConfig, generate
from mixmodal.pipeline.queue import Drawn, Failed
from mixmodal.pipeline.results import ResultLines, check_results
from mixmodal.sampling.rules import TokenSampling

PROMPTS = [
    {"key": "apple", "prompt": "a red apple"},
    {"key": "pear", "prompt": "pear", "num": 1, "seed": 9},
    {"key": "both", "parts": [{"text": "a green apple"}, {"image": "red.png"}]},
    {"prompt": "a blue pear"},
]
LONG = {"key": "long", "prompt": "a red apple " * 40}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    PIL.new("RGB", (9, 8), "red").save(tmp_path / "red.png")
    return write(tmp_path / "prompts.jsonl", PROMPTS)


@pytest.fixture
def config(exported: Path, prompts: Path, tmp_path: Path) -> GenerateConfig:
    return GenerateConfig(
        model=str(exported), out=tmp_path / "out", prompts=prompts, num=2, seed=4, batch_size=3, device="cpu"
    )


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function that makes loading a model an error from then on."""

    def load(*_: object) -> None:
        raise AssertionError("a model is loaded")

    return lambda: monkeypatch.setattr(MixedModal, "from_pretrained", load)


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def pixels(folder: Path) -> dict[str, bytes]:
    return {path.name: PIL.open(path).tobytes() for path in folder.glob("*_[0-9]*.png")}


def interrupt_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `generate_each` end in an interruption behind `count` samples."""
    whole = MixedModal.generate_each

    def some(*args: Any, **options: Any) -> Iterator[Drawn | Failed]:
        for number, one in enumerate(whole(*args, **options)):
            if number == count:
                raise KeyboardInterrupt
            yield one

    monkeypatch.setattr(MixedModal, "generate_each", some)


def test_every_prompt_has_its_files_and_its_line(
    config: GenerateConfig, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(config)
    names = ["apple_0000.png", "apple_0001.png", "pear_0000.png", "both_0000.png", "both_0001.png"]
    names += ["000004_0000.png", "000004_0001.png"]
    rest = {"results.json", "results.jsonl", "contact_sheet.png"}
    assert {path.name for path in config.out.iterdir()} == {*names, *rest}
    entries = {entry["key"]: entry for entry in lines_of(config.out / "results.jsonl")}
    assert set(entries) == {"apple", "pear", "both", "000004"}
    samples = [{"sample": number, "parts": [{"image": f"both_000{number}.png"}]} for number in range(2)]
    prompt = [{"text": "a green apple"}, {"image": "red.png"}]
    assert entries["both"] == {"key": "both", "prompt": prompt, "seed": 4, "num": 2, "samples": samples}
    results = results_of(config.out)
    assert results["counts"] == {"prompts": 4, "finished": 4, "failed": 0, "samples": 7}
    assert (results["model"], results["prompts"]) == (str(exported), str(config.prompts))
    assert results["results"] == "results.jsonl"
    written = PIL.open(config.out / "pear_0000.png")
    assert (written.text["seed"], written.text["sample"]) == ("9", "0")
    assert json.loads(written.text["prompt"]) == [{"text": "pear"}]
    assert json.loads(written.text["settings"]) == results["settings"]
    alone = MixedModal.from_pretrained(exported, "cpu").generate("pear", seed=9)[0]
    assert written.tobytes() == alone.tobytes()
    printed = capsys.readouterr().out
    assert re.search(r"7 samples in \d+\.\d s \(\d+\.\d\d pictures a second\), listed in", printed)


@pytest.mark.parametrize(("output", "more"), [("text", {}), ("mixed", {}), ("image", {"best_of": 2})])
def test_other_outputs_are_listed_alike(config: GenerateConfig, output: str, more: dict[str, Any]) -> None:
    lines = [line for line in PROMPTS if "parts" not in line]
    assert config.prompts
    config = replace(config, prompts=write(config.prompts, lines), output=output, max_new_tokens=40, **more)
    generate(config)
    files = {
        part["file"] if "text" in part else part["image"]
        for entry in lines_of(config.out / "results.jsonl")
        for sample in entry["samples"]
        for part in sample["parts"]
    }
    rest = {"results.json", "results.jsonl", "contact_sheet.png"}
    assert {path.name for path in config.out.iterdir()} - rest == files
    assert all(name.startswith(("apple_0", "pear_0", "000003_0")) for name in files)


def test_an_interrupted_call_goes_on_where_it_was(
    config: GenerateConfig, no_model: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(replace(config, out=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        interrupt_after(4, patch)
        with pytest.raises(KeyboardInterrupt):
            generate(config)
    before = (config.out / "results.jsonl").read_bytes()
    done = {entry["key"] for entry in lines_of(config.out / "results.jsonl")}
    assert 0 < len(done) < 4
    times = {path.name: path.stat().st_mtime_ns for path in config.out.glob("*_0*.png")}
    with open(config.out / "results.jsonl", "ab") as file:
        file.write(b'{"key": "torn", "sam')
    generate(config)
    assert (config.out / "results.jsonl").read_bytes().startswith(before)
    assert len(lines_of(config.out / "results.jsonl")) == 4
    for name, time in times.items():
        assert ((config.out / name).stat().st_mtime_ns == time) == (name.rsplit("_", 1)[0] in done)
    assert pixels(config.out) == pixels(tmp_path / "whole")
    assert results_of(config.out) == results_of(tmp_path / "whole")
    no_model()
    generate(config)  # there is nothing left to do
    assert results_of(config.out)["counts"] == {"prompts": 4, "finished": 4, "failed": 0, "samples": 7}


def test_a_prompt_is_drawn_again_where_a_file_of_it_is_gone(config: GenerateConfig) -> None:
    generate(config)
    before = pixels(config.out)
    (config.out / "both_0001.png").unlink()
    generate(config)
    assert pixels(config.out) == before
    assert [entry["key"] for entry in lines_of(config.out / "results.jsonl")[4:]] == ["both"]


def test_samples_of_other_settings_are_not_mixed_in(config: GenerateConfig, no_model: Callable[[], None]) -> None:
    generate(config)
    no_model()
    changes: list[tuple[str, dict[str, Any]]] = [
        ("seed was 4 when this was written and is 5 now", {"seed": 5}),
        ("settings.guidance_scale was null", {"guidance_scale": 2.0}),
        (r"settings.top_k.image was 0 .* is 7 now", {"image_sampling": TokenSampling(top_p=0.9, top_k=7)}),
        ("output was .image. .* is .text. now", {"output": "text"}),
        ("settings.best_of was 1", {"best_of": 2}),
    ]
    for message, change in changes:
        with pytest.raises(ValueError, match=rf"results\.json: {message}"):
            generate(replace(config, **change))
    with pytest.raises(ValueError, match="seed was 4"):
        generate(replace(config, seed=5, shard="0/2"))
    generate(replace(config, batch_size=1, contact_sheet=False))  # these change no sample


def test_another_prompt_of_the_same_key_is_refused(config: GenerateConfig) -> None:
    generate(config)
    assert config.prompts
    write(config.prompts, [{"key": "apple", "prompt": "a green apple"}, *PROMPTS[1:]])
    with pytest.raises(ValueError, match=r"jsonl:1 \(apple\): prompt was .*a red apple.* give it another key"):
        generate(config)
    write(config.prompts, [*PROMPTS, {"key": "new", "prompt": "pear"}])
    generate(config)
    assert results_of(config.out)["counts"]["samples"] == 9


def test_shards_together_are_the_whole(
    config: GenerateConfig, no_model: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(replace(config, out=tmp_path / "whole", batch_size=64))
    generate(replace(config, shard="0/2", batch_size=1))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    generate(config)
    monkeypatch.delenv("RANK")
    assert pixels(config.out) == pixels(tmp_path / "whole")
    names = [f"results.{index}-of-2.jsonl" for index in range(2)]
    assert [{entry["key"] for entry in lines_of(config.out / name)} for name in names] == [
        {"apple", "both"},
        {"pear", "000004"},
    ]
    for index in range(2):
        assert (config.out / f"contact_sheet.{index}-of-2.png").is_file()
        results = json.loads((config.out / f"results.{index}-of-2.json").read_text())
        assert (results["shard"], results["counts"]["prompts"]) == (f"{index}/2", 2)
    no_model()
    generate(config)  # other shares of the same prompts find what there is
    assert results_of(config.out)["counts"] == {"prompts": 4, "finished": 4, "failed": 0, "samples": 7}


def test_a_failing_prompt_does_not_keep_the_others(
    config: GenerateConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert config.prompts
    write(config.prompts, [LONG, {"key": "broken", "parts": [{"image": "broken.png"}]}, *PROMPTS])
    argv = ["--model", config.model, "--out", str(config.out), "--prompts", str(config.prompts), "--device", "cpu"]
    with pytest.raises(SystemExit) as caught:
        command(GenerateConfig, generate, argv, "mixmodal generate")
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert f"error: 2 of 6 prompts failed, see {config.out / 'results.jsonl'}; the first: " in error
    assert "prompts.jsonl:" in error
    failed = {entry["key"]: entry["error"] for entry in lines_of(config.out / "results.jsonl") if "error" in entry}
    assert f"{config.prompts}:1 (long): prompt 0 has " in failed["long"]
    assert f"part 0 of {config.prompts}:2 (broken) (broken.png): not a picture" in failed["broken"]
    assert results_of(config.out)["counts"] == {"prompts": 6, "finished": 4, "failed": 2, "samples": 4}
    PIL.new("RGB", (9, 8), "blue").save(tmp_path / "broken.png")
    write(config.prompts, [{"key": "long", "prompt": "pear"}, *lines_of(config.prompts)[1:]])
    command(GenerateConfig, generate, argv, "mixmodal generate")
    assert results_of(config.out)["counts"] == {"prompts": 6, "finished": 6, "failed": 0, "samples": 6}
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    generate(replace(config, prompts=write(config.prompts, [LONG]), out=tmp_path / "launched"))
    assert "1 of 1 prompts failed" in capsys.readouterr().err


def test_a_broken_line_before_the_last_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(b'{"key": "a"}\nnull\n{"key": "b"}\n')
    with pytest.raises(ValueError, match=r"results\.jsonl:2: the line is broken"):
        ResultLines(path)
    path.write_bytes(b'{"key": "a"}\n\0\0\0\n')
    lines = ResultLines(path)
    lines.append({"key": "b"})
    lines.append({"key": "a", "num": 2})
    assert path.read_bytes() == b'{"key": "a"}\n{"key": "b"}\n{"key": "a", "num": 2}\n'
    assert ResultLines(path).find("a") == {"key": "a", "num": 2}


def test_what_is_no_list_of_results_is_named(tmp_path: Path) -> None:
    for content, message in ((b"{", "is not JSON"), (b"[]", "holds no JSON object; remove it")):
        (tmp_path / "results.json").write_bytes(content)
        with pytest.raises(ValueError, match=rf"results\.json {message}"):
            check_results(tmp_path, {})


def test_one_prompt_is_not_written_over_many(config: GenerateConfig, no_model: Callable[[], None]) -> None:
    generate(config)
    single = ["--model", config.model, "--out", str(config.out), "--prompt", "pear"]
    no_model()
    with pytest.raises(SystemExit):
        command(GenerateConfig, generate, single)
    assert results_of(config.out)["counts"]["samples"] == 7


def test_the_contact_sheet_shows_the_first_pictures(
    config: GenerateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[list[str]] = []
    monkeypatch.setattr(
        "mixmodal.pipeline.results.draw_captioned",
        lambda captions, pictures: shown.append(list(captions)) or pictures[0],
    )
    monkeypatch.setattr("mixmodal.pipeline.results.SHEET_PICTURES", 4)
    monkeypatch.setattr("mixmodal.pipeline.generate.SHEET_PICTURES", 4)
    generate(config)
    assert shown == [["a red apple", "a red apple", "pear", "a green apple"]]
    generate(replace(config, contact_sheet=False))
    assert len(shown) == 1
    single = ["--model", config.model, "--prompt", "pear", "--device", "cpu"]
    command(GenerateConfig, generate, [*single, "--out", str(tmp_path / "one")])
    assert not (tmp_path / "one" / "contact_sheet.png").exists()
    command(GenerateConfig, generate, [*single, "--out", str(tmp_path / "two"), "--num", "2"])
    assert shown[1:] == [["pear", "pear"]]
