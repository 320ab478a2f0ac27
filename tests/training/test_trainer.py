"""The training loop: sums over micro-batches, exact resume, stops before a bad step, signals."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_task import Rows, ToyLoader, ToyLoss, ToyTask

from mixmodal.training.checkpoint import CHECKSUMS, STATE, CheckpointError, sha256_of
from mixmodal.training.checks import NonFiniteError

ROOT = Path(__file__).parents[2]
Fit = Callable[..., Any]
Exported = Callable[..., dict[str, Tensor]]

MODES = {
    "float32": {},
    "autocast": {"precision": "autocast_bfloat16"},
    "bfloat16": {"precision": "bfloat16"},
    "zero1": {"deepspeed": ROOT / "configs/deepspeed/zero1.json"},
    "zero2_bfloat16": {"deepspeed": ROOT / "configs/deepspeed/zero2.json", "precision": "bfloat16"},
    "zero3": {"deepspeed": ROOT / "configs/deepspeed/zero3.json"},
}
modes = pytest.mark.parametrize("options", MODES.values(), ids=MODES)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in records(folder) if "loss" in record]


def norms(folder: Path) -> list[float]:
    return [record["grad_norm"] for record in records(folder) if "grad_norm" in record]


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


class Recorder(ToyTask):
    """Keeps the weights that each step starts from."""

    def losses(self, model: nn.Module, batch: Rows, step: int) -> ToyLoss:
        self.before = weights(model)
        return super().losses(model, batch, step)


def test_the_first_step_is_adamw_on_the_weighted_mean(fit: Fit, exported: Exported) -> None:
    fit(max_steps=1, max_grad_norm=0.0)
    torch.manual_seed(0)
    task = ToyTask()
    from mixmodal.training.randomness import set_seeds

    set_seeds(0)
    model = task.build_model()
    batch = next(ToyLoader(8, 1, 0, 1))
    (task.losses(model, batch, 0).objective / batch.weights.sum()).backward()
    groups = [[p for p in model.parameters() if p.ndim == 2], [p for p in model.parameters() if p.ndim == 1]]
    for group, decay in zip(groups, (0.1, 0.0), strict=True):
        # half of the peak rate: the first of two warm-up steps
        torch.optim.AdamW(group, lr=5e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=decay).step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(exported()[name], value, rtol=0, atol=1e-7)  # worst seen: 0


def test_splitting_a_step_into_micro_batches_changes_nothing(fit: Fit, exported: Exported, tmp_path: Path) -> None:
    fit("whole", max_steps=3)
    fit("split", max_steps=3, micro_batch_size=2, grad_accum_steps=4)
    assert losses(tmp_path / "split") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)  # worst seen: 9e-8
    assert norms(tmp_path / "split") == pytest.approx(norms(tmp_path / "whole"), rel=1e-6)  # worst seen: 7e-8
    for name, value in exported("whole").items():
        torch.testing.assert_close(exported("split")[name], value, rtol=0, atol=5e-7)  # worst seen: 3e-8


@modes
def test_six_steps_equal_three_and_three_bit_for_bit(
    fit: Fit, exported: Exported, tmp_path: Path, options: dict[str, Any]
) -> None:
    fit("whole", ToyTask(noise=0.1), **options)
    stopping = ToyTask(noise=0.1)
    stop_in_step(stopping, 2)
    first = fit("parts", stopping, **options)
    assert (first.steps, first.finished) == (3, False)
    torch.manual_seed(123)  # whatever the next process starts with
    assert fit("parts", ToyTask(noise=0.1), **options).finished
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert all(torch.equal(exported("parts")[name], value) for name, value in exported("whole").items())


def stop_in_step(task: ToyTask, step: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Sends this process a signal when the batch of `step` is drawn, so that the step is still done."""
    weight = task.batch_weight
    calls = iter(range(1000))

    def batch_weight(batch: Rows) -> Tensor:
        if next(calls) == step:
            os.kill(os.getpid(), number)
        return weight(batch)

    task.batch_weight = batch_weight  # type: ignore[method-assign]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_says_so_and_returns(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    task = ToyTask()
    stop_in_step(task, 1, number)
    handler = signal.getsignal(number)
    assert not fit(task=task).finished
    assert f"stopped by {number.name} at step 2" in capsys.readouterr().out
    assert (tmp_path / "run/checkpoints/latest").read_text().strip() == "step_00000002"
    assert not (tmp_path / "run/export").exists()
    assert signal.getsignal(number) is handler


def test_a_second_interrupt_does_not_wait_for_the_step(fit: Fit) -> None:
    class Impatient(ToyTask):
        def losses(self, model: nn.Module, batch: Rows, step: int) -> ToyLoss:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            return super().losses(model, batch, step)

    with pytest.raises(KeyboardInterrupt):
        fit(task=Impatient())


@modes
@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_not_taken(fit: Fit, tmp_path: Path, options: dict[str, Any], bad: str) -> None:
    task = Recorder(bad_step=1, bad=bad)
    if options.get("deepspeed", Path()).name == "zero3.json":
        task = ToyTask(bad_step=1, bad=bad)  # its weights can not be read from outside
    metric = {"loss": "loss is nan", "gradient": "gradient norm is (inf|nan)"}[bad]
    with pytest.raises(NonFiniteError, match=rf"step 2: {metric}; the weights are those of step 1\. Rows: row10, "):
        fit(task=task, **options)
    assert not (tmp_path / "run/checkpoints").exists()
    if isinstance(task, Recorder):
        assert all(torch.equal(now, then) for now, then in zip(weights(task.models[0]), task.before, strict=True))
        assert all(torch.isfinite(value).all() for value in weights(task.models[0]))


def test_only_rows_of_the_bad_micro_batch_are_named(fit: Fit) -> None:
    with pytest.raises(NonFiniteError, match=r"Rows: row8, row9$"):
        fit(task=ToyTask(bad_step=1), micro_batch_size=2, grad_accum_steps=4)


def test_a_step_without_weight_says_so(fit: Fit) -> None:
    class Weightless(ToyTask):
        def batch_weight(self, batch: Rows) -> Tensor:
            return torch.zeros(())

    with pytest.raises(NonFiniteError, match="weight of the loss is 0"):
        fit(task=Weightless())


def test_gradients_are_clipped_to_the_norm(fit: Fit, exported: Exported, tmp_path: Path) -> None:
    fit("clipped", max_steps=2, max_grad_norm=0.5)
    fit("zero1", max_steps=2, max_grad_norm=0.5, **MODES["zero1"])
    fit("free", max_steps=2, max_grad_norm=0.0)
    assert norms(tmp_path / "zero1") == pytest.approx(norms(tmp_path / "clipped"), rel=1e-6)  # worst seen: 7e-8
    for name, value in exported("clipped").items():
        torch.testing.assert_close(exported("zero1")[name], value, rtol=0, atol=1e-6)  # worst seen: 0
    assert any(not torch.allclose(exported("free")[name], value) for name, value in exported("clipped").items())


def test_evaluation_does_not_disturb_training(fit: Fit, exported: Exported, tmp_path: Path) -> None:
    fit("never", ToyTask(noise=0.1))
    fit("often", ToyTask(noise=0.1), eval_every=1)
    assert losses(tmp_path / "often") == losses(tmp_path / "never")
    assert [r["step"] for r in records(tmp_path / "often") if "eval_norm" in r] == [1, 2, 3, 4, 5, 6]


def test_averaged_weights_are_kept_saved_and_exported(fit: Fit, exported: Exported) -> None:
    task = Recorder()
    seen: list[list[Tensor]] = []
    losses_of = task.losses
    task.losses = lambda model, batch, step: (losses_of(model, batch, step), seen.append(task.before))[0]  # type: ignore
    fit("whole", task, ema_decay=0.3)
    average = seen[0]
    decays = [2 / 11, 3 / 12, 0.3, 0.3, 0.3, 0.3]  # the first two of a warm-up
    for decay, now in zip(decays, [*seen[1:], weights(task.models[0])], strict=True):
        average = [decay * old + (1 - decay) * new for old, new in zip(average, now, strict=True)]
    for value, expected in zip(exported("whole").values(), average, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)  # worst seen: 1.2e-7
    stopping = ToyTask()
    stop_in_step(stopping, 2)
    fit("parts", stopping, ema_decay=0.3)
    fit("parts", ema_decay=0.3)
    assert all(torch.equal(exported("parts")[name], value) for name, value in exported("whole").items())


def test_a_killed_run_leaves_no_lines_twice(fit: Fit, tmp_path: Path) -> None:
    fit(save_every=4, max_steps=5, keep_checkpoints=9)
    folder = tmp_path / "run"
    (folder / "checkpoints/latest").write_text("step_00000004\n")  # as if it was killed after step 5
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    fit(max_steps=6)
    assert [r["step"] for r in records(folder) if "loss" in r] == [1, 2, 3, 4, 5, 6]


def test_metrics_lines_carry_throughput_rate_and_norm(fit: Fit, tmp_path: Path) -> None:
    fit(peak_flops=1e9, log_every=3)
    first, second, evaluated = records(tmp_path / "run")
    assert (first["step"], second["step"], evaluated["step"]) == (3, 6, 6)
    assert second["wall_time_s"] > first["wall_time_s"] > 0
    assert {"loss", "grad_norm", "lr"} <= set(first)


def test_throughput_leaves_out_evaluation_and_saving(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    class Timed(ToyTask):
        def losses(self, model: nn.Module, batch: Rows, step: int) -> ToyLoss:
            nonlocal now
            now += 2.0
            return super().losses(model, batch, step)

        def evaluate(self, model: nn.Module) -> dict[str, float | None]:
            nonlocal now
            now += 1000.0
            return super().evaluate(model)

    monkeypatch.setattr("mixmodal.training.trainer.time", SimpleNamespace(perf_counter=lambda: now))
    fit(task=Timed(), log_every=4, eval_every=3, save_every=5, max_steps=12)
    lines = [record for record in records(tmp_path / "run") if "loss" in record]
    assert [line["tokens_per_second"] for line in lines] == [4.0, 4.0, 4.0]  # 8 rows in 2 seconds
    assert [line["wall_time_s"] for line in lines] == [8.0, 16.0, 24.0]


class Ending(ToyTask):
    """Its data end behind `last` micro-batches."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.last = last

    def build_loader(self, micro_batch_size: int, grad_accum_steps: int, rank: int, world_size: int) -> ToyLoader:
        last = self.last

        class EndingLoader(ToyLoader):
            def __next__(self) -> Rows:
                if self.count >= last:
                    raise StopIteration("the toys are all used up")
                return super().__next__()

        return EndingLoader(micro_batch_size, grad_accum_steps, rank, world_size)

    def counters(self, state: Mapping[str, Any]) -> Mapping[str, float]:
        return {"taken": state["step"]}


def test_training_is_finished_where_the_data_end(
    fit: Fit, exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = fit(task=Ending(4), max_steps=6, save_every=3)
    assert (result.steps, result.finished) == (4, True)
    said = capsys.readouterr().out
    assert "step 4 of 6 is the last: the toys are all used up" in said
    assert said.splitlines()[-1] == f"exported to {tmp_path / 'run' / 'export'}"
    assert (tmp_path / "run/checkpoints/latest").read_text().strip() == "step_00000004"
    assert [record["step"] for record in records(tmp_path / "run") if "eval_norm" in record] == [4]
    whole = exported()
    (tmp_path / "run/checkpoints/latest").write_text("step_00000003\n")
    for again in (3, 4):  # what is resumed ends there too, and what is finished is exported again
        assert fit(task=Ending(4), max_steps=6).steps == 4, again
        assert all(torch.equal(exported()[name], value) for name, value in whole.items())
    assert fit(task=Ending(9), max_steps=6).steps == 6  # with more data it goes on
    with pytest.raises(ValueError, match="no data for the first step: the toys are all used up"):
        fit("none", task=Ending(0))


@pytest.mark.parametrize(("last_of_data", "last"), [(9, 6), (4, 4)], ids=["max_steps", "end_of_data"])
def test_a_finished_run_is_only_exported_again(
    fit: Fit, exported: Exported, tmp_path: Path, last_of_data: int, last: int
) -> None:
    first = fit(task=Ending(last_of_data), eval_every=2)
    before, lines = exported(), (tmp_path / "run/metrics.jsonl").read_bytes()
    assert [record["step"] for record in records(tmp_path / "run") if "eval_norm" in record] == [*range(2, last + 1, 2)]
    for again in range(2):
        result = fit(task=Ending(last_of_data), eval_every=2)
        assert (result.steps, result.finished, result.metrics) == (last, True, first.metrics)
        assert (tmp_path / "run/metrics.jsonl").read_bytes() == lines, again
        assert all(torch.equal(exported()[name], value) for name, value in before.items())


def test_a_run_that_goes_on_keeps_the_evaluation_that_it_ended_with(fit: Fit, tmp_path: Path) -> None:
    fit(task=Ending(4))
    fit(task=Ending(9))
    assert [record["step"] for record in records(tmp_path / "run") if "eval_norm" in record] == [4, 6]


def test_counters_of_the_data_are_logged_up_to_the_step(fit: Fit, tmp_path: Path) -> None:
    fit(task=Ending(99), max_steps=3, micro_batch_size=4, grad_accum_steps=2)
    assert [record["taken"] for record in records(tmp_path / "run") if "loss" in record] == [1, 2, 3]


def test_old_checkpoints_are_removed(fit: Fit, tmp_path: Path) -> None:
    fit(save_every=1, keep_checkpoints=2)
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step_*"))
    assert kept == ["step_00000005", "step_00000006"]


def test_a_used_run_folder_is_not_trained_over(fit: Fit) -> None:
    fit(max_steps=1)
    with pytest.raises(ValueError, match=r"holds step_00000001; set trainer\.resume or choose another folder"):
        fit(resume=False)


def test_a_run_folder_that_is_a_file_is_named(fit: Fit, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ValueError, match=r"trainer\.run_dir .*run is a file; give a folder"):
        fit(max_steps=1)


def test_a_checkpoint_of_another_version_is_named(fit: Fit, tmp_path: Path) -> None:
    fit(max_steps=1)
    folder = tmp_path / "run/checkpoints/step_00000001"
    state = json.loads((folder / STATE).read_bytes())
    (folder / STATE).write_text(json.dumps({key: state[key] for key in state if key != "world_size"}))
    checksums = json.loads((folder / CHECKSUMS).read_bytes())
    (folder / CHECKSUMS).write_text(json.dumps({**checksums, STATE: sha256_of(folder / STATE)}))
    with pytest.raises(CheckpointError, match=r"state\.json has no world_size, so another version wrote it"):
        fit()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"precision": "autocast_bfloat16"}, "precision float32, not autocast_bfloat16"),
        ({"ema_decay": 0.5}, "ema False, not True"),
    ],
)
def test_a_run_can_not_go_on_as_another(fit: Fit, options: dict[str, Any], problem: str) -> None:
    fit(max_steps=1)
    with pytest.raises(CheckpointError, match=f"step_00000001 was written with {problem}"):
        fit(**options)


def test_a_checkpoint_of_another_model_is_refused(fit: Fit) -> None:
    class Wider(ToyTask):
        def build_model(self) -> nn.Module:
            return nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 1))

    fit(max_steps=1)
    with pytest.raises(CheckpointError, match="step_00000001 is of another model"):
        fit(task=Wider())


def test_a_checkpoint_that_would_run_code_is_refused(fit: Fit, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    fit(max_steps=1)
    checksums = tmp_path / "run/checkpoints/step_00000001/checksums.json"
    good_sums = checksums.read_text()
    for name in ("model_00000.pt", "rank_00000.pt"):
        path = checksums.with_name(name)
        good = path.read_bytes()
        torch.save({"fragments": Trap(), "loader": Trap()}, path)
        checksums.write_text(json.dumps({**json.loads(good_sums), name: sha256_of(path)}))
        with pytest.raises(CheckpointError, match=f"{name} can not be loaded"):
            fit()
        path.write_bytes(good)
    assert not (tmp_path / "sprung").exists()


def test_averaged_weights_need_whole_weights(fit: Fit) -> None:
    with pytest.raises(ValueError, match="ZeRO stage 3"):
        fit(ema_decay=0.9, **MODES["zero3"])


def test_all_problems_of_a_config_are_named_at_once(fit: Fit) -> None:
    with pytest.raises(ValueError, match=r"trainer\.max_steps is 0.*trainer\.ema_decay is 1\.5"):
        fit(max_steps=0, ema_decay=1.5)
