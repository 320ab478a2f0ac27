"""How exact classifiers are: against closed forms, pipelines, the published loop, and the same job done otherwise.

    python benchmarks/classifier_exactness.py [--dry]

Each figure is the largest difference, or an agreement; the bar that it must meet stands beside it and in its config.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import classify_jobs
import numpy as np
import published_classifier
import tiny_diffusion
import torch
from exact_denoisers import HIGHEST, LOWEST, draw_world, integrate_likelihoods, measure_gaussians
from record import record

from mixmodal.classification.adapters import build_adapter

WORLD: dict[str, Any] = {"num_classes": 5, "num_components": 3, "dim": 8, "width": 1.0, "spread": 1.0}
NUM_PICTURES, WORLD_SEED = 256, 0
NOISE_SEEDS = (0, 1, 2, 3)
GRIDS = ((16, 16), (64, 64), (256, 64), (1024, 64))
"""Values of lambda, and noises at each in antithetic pairs."""
STAGES = (((5, 25), (2, 1)), ((4, 8, 25), (3, 2, 1)), ((20, 50, 100, 500), (3, 2, 2, 1)))


class Row(NamedTuple):
    """A figure: what it is of, its repeats and unit, and what it depends on, with its `bar` where it has one."""

    subject: str
    values: list[float]
    unit: str
    config: dict[str, Any]


def measure_exact_gaussians() -> Iterator[Row]:
    """Sums of closed-form errors over even grids against log-likelihoods."""
    for grid, span, num_times, bar in (("lambda", 20, 50, 1e-6), ("lambda", 30, 400, 1e-6), ("flow", 0, 1000, 1e-3)):
        what = f"exact Gaussians, {num_times:,} values of {'lambda' if grid == 'lambda' else 'a flow'}"
        worst = measure_gaussians(grid, span, num_times)
        yield Row(f"{what}: score less log-likelihood", [worst], "nats", {"grid": grid, "span": span, "bar": bar})


def measure_mixtures() -> Iterator[Row]:
    """Errors of mixtures, integrated over lambda, against Bayes."""
    world = draw_world(**WORLD, num_pictures=NUM_PICTURES, seed=WORLD_SEED)
    exact = world.log_likelihoods()
    ranked = np.sort(exact, axis=1)
    margins = ranked[:, -1] - ranked[:, -2]
    config = {**WORLD, "pictures": NUM_PICTURES, "world_seed": WORLD_SEED, "noise_seeds": NOISE_SEEDS}
    config["lambda"] = [LOWEST, HIGHEST]
    yield Row("mixtures: the narrowest margin of Bayes's decision", [float(margins.min())], "nats", config)
    for num_times, num_noises in GRIDS:
        agreements, deviations, all_missed = [], [], np.zeros(NUM_PICTURES, dtype=bool)
        for seed in NOISE_SEEDS:
            found = integrate_likelihoods(world, num_times, num_noises, seed)
            missed = found.argmax(axis=1) != exact.argmax(axis=1)
            errors = (found - exact) - (found - exact).mean(axis=1, keepdims=True)
            agreements.append(float(1 - missed.mean()))
            deviations.append(float(np.sqrt(np.square(errors).mean())))
            all_missed |= missed
        what = f"mixtures, {num_times:,} values of lambda, {num_noises} noises"
        bar = {"bar": 1.0} if (num_times, num_noises) == GRIDS[-1] else {}
        of_missed = {str(picture): float(margins[picture]) for picture in np.flatnonzero(all_missed)}
        more = {**config, "margins_of_missed": of_missed, **bar}
        yield Row(f"{what}: agreement with Bayes", agreements, "share", more)
        if of_missed:
            yield Row(f"{what}: the widest margin that was missed", [max(of_missed.values())], "nats", config)
        yield Row(f"{what}: error of the scores", deviations, "nats, rms", config)


def measure_adapters() -> Iterator[Row]:
    """Adapters against what tiny random pipelines hand to their schedulers."""
    for family in tiny_diffusion.FAMILIES:
        pipe = tiny_diffusion.build(family)
        adapter = build_adapter(pipe)
        conditions = tiny_diffusion.conditions_of(adapter)
        steps = tiny_diffusion.spy_on_steps(pipe)
        worst = max(tiny_diffusion.replay(adapter, step, conditions) for step in steps)
        config = {"steps": len(steps), "bar": 0.0, "largest_output": max(float(one.out.abs().max()) for one in steps)}
        yield Row(f"adapter less pipeline, {family}", [worst], "", config)


def measure_published() -> Iterator[Row]:
    """Every error of the staged policy against the published loop's."""
    pipe = tiny_diffusion.build("sd_epsilon")
    images = torch.rand((2, 3, 32, 32), generator=torch.Generator().manual_seed(1)) * 2 - 1
    for samples, keep in STAGES:
        compared = published_classifier.compare(pipe, images, samples, keep)
        num = sum(len(one.replay.errors) for one in compared)
        stages = f"staged {'/'.join(map(str, samples))}, keep {'/'.join(map(str, keep))}"
        config = {"pictures": len(images), "classes": len(published_classifier.CLASSES), "errors": num, "bar": 1e-6}
        worst = max(one.difference for one in compared)
        yield Row(f"{stages}: an error less the published loop's", [worst], "relative", config)


def measure_jobs() -> Iterator[Row]:
    """Jobs of the classify command against one in one go."""
    for kind in classify_jobs.MODELS:
        with tempfile.TemporaryDirectory() as folder:
            jobs = classify_jobs.measure(kind, Path(folder))
        config = {"pictures": classify_jobs.NUM_PICTURES, "classes": len(classify_jobs.CLASSES)}
        config |= {"batch_size_of_whole": classify_jobs.WHOLE, "batch_size_of_killed": classify_jobs.KILLED}
        config |= {"records_at_kills": jobs.killed_after}
        for name, found in jobs.differences.items():
            yield Row(f"{kind}, {name}: other predictions", [found.predictions], "pictures", {**config, "bar": 0})
            yield Row(f"{kind}, {name}: a score", [found.scores], "relative", config)


PARTS = (measure_exact_gaussians, measure_adapters, measure_published, measure_jobs, measure_mixtures)


def meets(row: Row) -> bool:
    """Whether the worst of the repeats meets its bar: agreements from below, differences from above."""
    bar = row.config.get("bar")
    return bar is None or (min(row.values) >= bar if row.unit == "share" else max(row.values) <= bar)


def main(dry: bool) -> None:
    """Measures all, prints it, and unless it is a dry run records it."""
    torch.set_num_threads(1)  # jobs are begun in copies of this process
    warnings.filterwarnings("ignore", message="__array__ implementation")  # within diffusers' Euler scheduler
    for part in PARTS:
        for row in part():
            bar = row.config.get("bar")
            subject = row.subject if bar is None else f"{row.subject} (bar {bar:g})"
            values = ", ".join(f"{value:.3g}" for value in row.values)
            print(f"{subject}: {values} {row.unit}{'' if meets(row) else ', NOT met'}", flush=True)
            if not dry:
                record("classifier_exactness", subject, row.values, row.unit, "cpu", row.config)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="print only")
    main(parser.parse_args().dry)
