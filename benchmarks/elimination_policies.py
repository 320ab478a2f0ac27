"""Policies of elimination over 100 classes with exact denoisers: accuracy against evaluations.

    python benchmarks/elimination_policies.py [--dry]

Classes are mixtures of two Gaussians in 32 dimensions on the schedule of Stable Diffusion: the Bayes decision is
known. Policies are compared on the same pictures, of worlds on whose seeds no setting was chosen (those of tuning were
1001 and 1002). Evaluations of the pilot that measures where classes differ are shared out among the pictures of a world
and counted. The curves are drawn to docs/elimination.png.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from curves import draw_curves
from exact_denoisers import MixtureScorer, MixtureWorld, draw_world
from record import record

from mixmodal.classification.elimination import Elimination, EliminationConfig
from mixmodal.classification.policies import Adaptive, Full, Policy, Staged, TTest
from mixmodal.classification.summary import Rate
from mixmodal.classification.units import TimeDensity, build_units, even_times, fit_density, measure_spread

FIGURE = Path(__file__).resolve().parents[1] / "docs" / "elimination.png"
WORLD = {"num_classes": 100, "num_components": 2, "dim": 32, "width": 2.1, "spread": 1.0}
WORLD_SEEDS = (1, 2, 3, 4)
NUM_PILOT, NUM_PILOT_TIMES = 20, 16
NOISE_SEED, PILOT_NOISE_SEED = 0, 1
BATCH_SIZE = 8192
WITHIN = 0.005
"""Of accuracy: policies that differ by less count as equal."""
REFERENCE, OURS = "staged 20/50/100/500, keep 20/10/5/1", "adaptive, importance t, p 0.002"


class Arm(NamedTuple):
    """A policy in the table, and the curve that it lies on."""

    name: str
    curve: str
    policy: Policy
    importance: bool = False


class Found(NamedTuple):
    """What an arm found, a row for each picture of all worlds; pilot evaluations are shared out in `evaluations`."""

    correct: np.ndarray
    agrees: np.ndarray
    evaluations: np.ndarray


def build_arms() -> list[Arm]:
    """The arms of the table; along a curve from few evaluations to many."""
    arms = []
    for samples, keep in (
        ((5, 10, 25, 125), (20, 10, 5, 1)),
        ((10, 25, 50, 250), (20, 10, 5, 1)),
        ((25, 250), (5, 1)),
        ((20, 50, 100, 500), (20, 10, 5, 1)),
    ):
        name = f"staged {'/'.join(map(str, samples))}, keep {'/'.join(map(str, keep))}"
        arms.append(Arm(name, "staged", Staged(samples=samples, keep=keep)))
    levels = (5e-2, 1e-2, 2e-3)
    arms += [Arm(f"t-test, random t, p {p:g}", "t-test, random t", TTest(p_value=p)) for p in levels]
    for name, options, importance in (
        ("adaptive, uniform t", {}, False),
        ("adaptive, importance t", {}, True),
        ("adaptive, importance t, plain noise", {"antithetic": False, "max_times": 255}, True),
    ):
        arms += [Arm(f"{name}, p {p:g}", name, Adaptive(p_value=p, **options), importance) for p in levels]
    return [*arms, Arm("full, 128 antithetic times", "full", Full(num_times=128, antithetic=True))]


def measure_density(world: MixtureWorld) -> TimeDensity:
    """Where classes differ on the world's first pictures."""
    units = build_units(even_times(NUM_PILOT_TIMES))
    scorer = MixtureScorer(world, PILOT_NOISE_SEED)
    spreads = measure_spread(scorer, range(NUM_PILOT), len(world.means), units)
    return fit_density(np.array([unit.time for unit in units]), spreads)


def measure(arm: Arm, worlds: Sequence[MixtureWorld], densities: Sequence[TimeDensity]) -> Found:
    """Scores all pictures but those of the pilots."""
    rows = []
    for world, density in zip(worlds, densities):
        num_classes, pictures = len(world.means), range(NUM_PILOT, len(world.pictures))
        scorer, config = MixtureScorer(world, NOISE_SEED), EliminationConfig(batch_size=BATCH_SIZE)
        engine = Elimination(scorer, num_classes, arm.policy, config, density if arm.importance else None)
        outcomes = engine.score(pictures)
        assert all(one.tied.sum() == 1 for one in outcomes)
        predictions = np.array([one.tied.argmax() for one in outcomes])
        pilot = NUM_PILOT * NUM_PILOT_TIMES / len(pictures) if arm.importance else 0
        evaluations = np.array([one.num_evaluations for one in outcomes]) / num_classes + pilot
        bayes = world.log_likelihoods()[NUM_PILOT:].argmax(axis=1)
        rows.append(Found(predictions == world.labels[NUM_PILOT:], predictions == bayes, evaluations))
    return Found(*(np.concatenate(found) for found in zip(*rows)))


def compare(reference: Found, ours: Found) -> dict[str, float]:
    """Evaluations of the reference over ours, and our accuracy less the reference's with its paired standard error."""
    differences = ours.correct.astype(float) - reference.correct
    return {
        "ratio": float(reference.evaluations.mean() / ours.evaluations.mean()),
        "accuracy_difference": float(differences.mean()),
        "standard_error": float(differences.std(ddof=1) / math.sqrt(len(differences))),
    }


def best_ratio(arms: Sequence[Arm], found: Sequence[Found]) -> tuple[str, str, float] | None:
    """The cheapest staged and the cheapest adaptive arm within `WITHIN` of the best staged one, and their ratio.

    None where no adaptive arm is as accurate.
    """
    staged = [(arm, one) for arm, one in zip(arms, found) if arm.curve == "staged"]
    ours = [(arm, one) for arm, one in zip(arms, found) if arm.curve.startswith("adaptive")]
    floor = max(one.correct.mean() for _, one in staged) - WITHIN
    staged, ours = ([entry for entry in entries if entry[1].correct.mean() >= floor] for entries in (staged, ours))
    if not ours:
        return None
    (theirs, spent), (other, less) = (
        min(entries, key=lambda entry: entry[1].evaluations.mean()) for entries in (staged, ours)
    )
    return theirs.name, other.name, float(spent.evaluations.mean() / less.evaluations.mean())


def main(num_pictures: int, dry: bool) -> None:
    """Measures all arms, prints the table, and unless it is a dry run records it and draws the curves."""
    shape: dict[str, Any] = {**WORLD, "num_pictures": num_pictures + NUM_PILOT}
    worlds = [draw_world(**shape, seed=seed) for seed in WORLD_SEEDS]
    densities = [measure_density(world) for world in worlds]
    bayes = [world.log_likelihoods()[NUM_PILOT:].argmax(axis=1) == world.labels[NUM_PILOT:] for world in worlds]
    config = {**WORLD, "pictures": num_pictures * len(worlds), "world_seeds": WORLD_SEEDS}
    config |= {"pilot_pictures": NUM_PILOT, "pilot_times": NUM_PILOT_TIMES}

    def note(subject: str, value: float, unit: str, **more: Any) -> None:
        if not dry:
            record("elimination", subject, [value], unit, "cpu", {**config, **more})

    def note_shares(name: str, what: str, correct: np.ndarray, **more: Any) -> None:
        for figure, value in zip(
            (what, f"{what} from", f"{what} to"),
            (float(correct.mean()), *Rate(float(correct.sum()), len(correct)).interval),
        ):
            note(f"{name}: {figure}", value, "", **more)

    print(f"Bayes: {np.concatenate(bayes).mean():.4f}")
    note_shares("Bayes", "accuracy", np.concatenate(bayes))
    arms, results = build_arms(), []
    for arm in arms:
        start = time.monotonic()
        found = measure(arm, worlds, densities)
        results.append(found)
        seconds, per_class = time.monotonic() - start, float(found.evaluations.mean())
        low, high = Rate(float(found.correct.sum()), len(found.correct)).interval
        print(
            f"{arm.name:48s} {found.correct.mean():.4f} [{low:.4f}, {high:.4f}] agrees {found.agrees.mean():.4f}, "
            f"{per_class:.2f} a class, {seconds:.0f} s",
            flush=True,
        )
        more = {"policy": repr(arm.policy), "importance": arm.importance}
        note_shares(arm.name, "accuracy", found.correct, **more)
        note_shares(arm.name, "agreement with Bayes", found.agrees, **more)
        note(f"{arm.name}: evaluations per class", per_class, "", **more)
    names = [arm.name for arm in arms]
    compared = compare(results[names.index(REFERENCE)], results[names.index(OURS)])
    is_equal = abs(compared["accuracy_difference"]) <= WITHIN
    print(f"{OURS} against {REFERENCE}: {compared}, equal accuracy: {is_equal}")
    note(f"{OURS}: fewer than {REFERENCE}", compared["ratio"], "times", **compared, equal=is_equal)
    if (best := best_ratio(arms, results)) is None:
        print(f"no adaptive policy is within {WITHIN:g} of the best staged one")
    else:
        print(f"cheapest within {WITHIN:g} of the best staged: {best[0]}; {best[1]}: {best[2]:.2f} times")
        note(f"{best[1]}: fewer than the cheapest staged of equal accuracy", best[2], "times", staged=best[0])
    if not dry:
        draw_curves(panels(arms, results), FIGURE, logarithmic=False)


def panels(arms: Sequence[Arm], results: Sequence[Found]) -> dict[str, dict[str, list[list[tuple[float, float]]]]]:
    """Accuracy and agreement of all arms but the full ones, by their evaluations."""
    drawn: dict[str, dict[str, list[list[tuple[float, float]]]]] = {}
    for arm, found in zip(arms, results):
        if arm.curve == "full":
            continue
        for title, share in (("accuracy", found.correct), ("agreement with Bayes", found.agrees)):
            (line,) = drawn.setdefault(f"{title}, by evaluations per class", {}).setdefault(arm.curve, [[]])
            line.append((float(found.evaluations.mean()), float(share.mean())))
    for panel in drawn.values():
        for (line,) in panel.values():
            line.sort()
    return drawn


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=300, help="of each world")
    parser.add_argument("--dry", action="store_true", help="record nothing, draw nothing")
    given = parser.parse_args()
    main(given.pictures, given.dry)
