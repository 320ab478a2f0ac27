"""The DeepSpeed dictionary follows from the config; nothing in a ZeRO file may contradict it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mixmodal.training.deepspeed_config import OWNED_KEYS, deepspeed_config
from mixmodal.training.engine import check_device

ROOT = Path(__file__).parents[2]
ZERO_FILES = sorted((ROOT / "configs/deepspeed").glob("*.json"))


DEFAULTS: dict[str, Any] = {
    "micro_batch_size": 3,
    "grad_accum_steps": 5,
    "max_grad_norm": 0.7,
    "precision": "float32",
}


def derived(tmp_path: Path | None = None, file: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    path = None
    if tmp_path is not None:
        path = tmp_path / "zero.json"
        path.write_text(json.dumps(file))
    return deepspeed_config(zero_file=path, **{**DEFAULTS, **options})


@pytest.mark.parametrize("key", OWNED_KEYS)
def test_a_file_that_sets_what_the_config_sets_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match=rf"zero\.json: remove .*: '{key}' is set by"):
        derived(tmp_path, {"zero_optimization": {"stage": 1}, key: 7})


def test_keys_that_do_not_act_are_named_together(tmp_path: Path) -> None:
    said = r"'bf16' is set by trainer\.precision; 'zero_optimisation' is no key that acts here; did you mean zero_opt"
    with pytest.raises(ValueError, match=said):
        derived(tmp_path, {"bf16": {"enabled": True}, "zero_optimisation": {"stage": 2}})
    with pytest.raises(ValueError, match="zero_optimization is True; it must be a JSON object"):
        derived(tmp_path, {"zero_optimization": True})
    with pytest.raises(ValueError, match=r"zero_optimization\.offload_optimizer is 'cpu'; it must be a JSON object"):
        derived(tmp_path, {"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}})


def test_a_file_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trainer\.deepspeed: .*zero\.json: No such file"):
        deepspeed_config(**DEFAULTS, zero_file=tmp_path / "zero.json")
    for content, said in ((b"\xff", "is not JSON"), (b"{", "is not JSON"), (b"[]", "holds no JSON object")):
        (tmp_path / "zero.json").write_bytes(content)
        with pytest.raises(ValueError, match=rf"trainer\.deepspeed: .*zero\.json {said}"):
            deepspeed_config(**DEFAULTS, zero_file=tmp_path / "zero.json")


def test_keys_that_zero_does_not_have_are_named(tmp_path: Path) -> None:
    config = derived(tmp_path, {"zero_optimization": {"stage": 2, "reduce_bucket_sise": 5, "stage3_max_live": 1}})
    with pytest.raises(ValueError, match=r"zero_optimization\.reduce_bucket_sise: .*; stage3_max_live: "):
        check_device(config)


def test_auto_is_left_to_the_config(tmp_path: Path) -> None:
    file = {"train_batch_size": "auto", "bf16": "auto", "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}
    config = derived(tmp_path, file)
    assert "train_batch_size" not in config
    assert config["zero_optimization"] == {"stage": 2}
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (3, 5)
    assert config["gradient_clipping"] == 0.7


def test_other_sections_are_the_users(tmp_path: Path) -> None:
    config = derived(tmp_path, {"zero_optimization": {"stage": 3}, "comms_logger": {"enabled": True}})
    assert config["comms_logger"] == {"enabled": True}


def test_bfloat16_keeps_float32_sums(tmp_path: Path) -> None:
    config = derived(precision="bfloat16")
    assert config["zero_optimization"]["stage"] == 1
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["communication_data_type"] == "fp32"  # over ranks, too
    file = {"zero_optimization": {"stage": 2}, "communication_data_type": "bf16"}
    assert derived(tmp_path, file, precision="bfloat16")["communication_data_type"] == "bf16"  # unless they ask for it
    with pytest.raises(ValueError, match=r"zero\.json: zero_optimization\.stage is 0"):
        derived(tmp_path, {"zero_optimization": {"stage": 0}}, precision="bfloat16")


OFFLOAD = {"device": "cpu"}


@pytest.mark.parametrize(
    ("zero", "precision", "said"),
    [
        ({"stage": 4}, "float32", "stage is 4"),
        ({"stage": 3, "mics_shard_size": 2}, "float32", "mics_shard_size keeps each weight several times"),
        ({"stage": 0}, "float16", "would sum gradients in float16"),
        ({"stage": 0, "offload_optimizer": OFFLOAD}, "float32", "offload_optimizer can not act at stage 0"),
        ({"stage": 2, "offload_param": OFFLOAD}, "float32", "offload_param can not act at stage 2, only at 3"),
        ({"stage": 2, "offload_optimizer": OFFLOAD}, "float16", "choose stage 3 or trainer.precision bfloat16"),
        ({"stage": 3, "offload_optimizer": {**OFFLOAD, "ratio": 0.5}}, "float32", r"offload_optimizer\.ratio"),
    ],
)
def test_what_deepspeed_would_ignore_or_not_survive_is_refused(
    tmp_path: Path, zero: dict[str, Any], precision: str, said: str
) -> None:
    with pytest.raises(ValueError, match=rf"zero\.json: zero_optimization.*{said}"):
        derived(tmp_path, {"zero_optimization": zero}, precision=precision)


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "zero.json").write_text(text)
    with pytest.raises(ValueError, match=r"zero\.json"):
        deepspeed_config(
            micro_batch_size=1,
            grad_accum_steps=1,
            max_grad_norm=0.0,
            precision="float32",
            zero_file=tmp_path / "zero.json",
        )


@pytest.mark.parametrize("path", ZERO_FILES, ids=[path.stem for path in ZERO_FILES])
def test_our_zero_files_hold_zero_sections_only(path: Path) -> None:
    data = json.loads(path.read_text())
    assert list(data) == ["zero_optimization"]
    assert data["zero_optimization"]["stage"] == int(path.stem.removeprefix("zero")[0])


def test_deepspeed_is_imported_late() -> None:
    script = "import sys, mixmodal.training.trainer; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0
