"""What a run measures once on a few pictures and keeps beside its records: weights of times, and a density of them.

Both come from the same errors: of every picture and class at times spread evenly. Whoever comes first writes the file,
and all others, later calls and other processes, read it.

Shapes: P pictures, K classes, U units.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mixmodal.classification.denoising import NUM_BUCKETS, Schedule, Weighting, fit_weighting
from mixmodal.classification.units import TimeDensity, Unit, build_units, even_times, fit_density
from mixmodal.files import naming
from mixmodal.records import check_settings, read_json, write_json

NUM_TIMES = 2 * NUM_BUCKETS
FIRST_NOISE = 1 << 30
"""Of the noises here: no race has as many, so that no picture is judged by a noise on which a density was chosen."""


class Wanted(NamedTuple):
    """What is to be measured: `learned` weights of times, a density of times for `importance`, or both."""

    learned: bool
    importance: bool


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured.

    Args:
        times: of the units, float64 `(U,)`.
        weighting: learned; None where that was not asked for.
        density: None likewise.
        num_pictures: that it was measured on.
        num_evaluations: that it took.
    """

    times: np.ndarray
    weighting: Weighting | None
    density: TimeDensity | None
    num_pictures: int
    num_evaluations: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, which `from_dict` reads to the last digit."""
        weighting, density = self.weighting, self.density
        return {
            "num_pictures": self.num_pictures,
            "num_evaluations": self.num_evaluations,
            "times": self.times.tolist(),
            "weighting": None if weighting is None else {"space": weighting.space, "buckets": list(weighting.buckets)},
            "density": None if density is None else density.values.tolist(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measured:
        """What `to_dict` gave.

        Raises:
            ValueError, KeyError, TypeError: for anything else.
        """
        weighting, density = data["weighting"], data["density"]
        return cls(
            times=np.array(data["times"], dtype=np.float64),
            weighting=None
            if weighting is None
            else Weighting(name="learned", space=weighting["space"], buckets=tuple(weighting["buckets"])),
            density=None if density is None else TimeDensity(values=np.array(density, dtype=np.float64)),
            num_pictures=int(data["num_pictures"]),
            num_evaluations=int(data["num_evaluations"]),
        )


def measuring_units(seed: int, num_templates: int = 1) -> list[Unit]:
    """At even times, two in each bucket of a learned weighting, with noises that no race uses."""
    units = build_units(even_times(NUM_TIMES), num_templates=num_templates, seed=seed)
    return [one._replace(noise=FIRST_NOISE + one.noise) for one in units]


def measure(
    errors: np.ndarray,
    times: np.ndarray,
    wanted: Wanted,
    weighting: Weighting,
    schedule: Schedule,
    labels: Sequence[int] | None = None,
) -> Measured:
    """Fits what is wanted (Clark and Jaini, arXiv 2303.15233, section 3.1, for the weights).

    The density follows the spread over classes of the costs that will be measured, those with learned weights where
    both are wanted. Labels play no part in it but through these.

    Args:
        errors: mean errors without weights, float64 `(P, K, U)`.
        times: of the units, `(U,)`.
        weighting: in force; learned weights are of its space and take its place.
        schedule: of the model.
        labels: the right class of each picture, for learned weights.

    Raises:
        ValueError: for errors that are not finite, or that tell too little, see `fit_weighting` and `fit_density`.
    """
    if not np.isfinite(errors).all():
        raise ValueError("the errors of the pictures to measure on are not finite; check the precision of the model")
    learned = None
    if wanted.learned:
        if labels is None:
            raise ValueError("learned weights of times need labels")
        weighting = learned = fit_weighting(errors, times, np.asarray(labels, dtype=np.int64), weighting.space)
    density = None
    if wanted.importance:
        costs = errors * weighting.weights(schedule, times)
        density = fit_density(times, np.sqrt(costs.var(axis=1).mean(axis=0)))
    return Measured(
        times=times, weighting=learned, density=density, num_pictures=len(errors), num_evaluations=errors.size
    )


def read_or_measure(path: Path, settings: Mapping[str, Any], measure_now: Callable[[], Measured]) -> Measured:
    """What a file holds; where there is none it is measured and written, and of several writers the first one counts.

    Args:
        path: of the file.
        settings: what the measurement depends on, as plain JSON data.
        measure_now: measures.

    Raises:
        ValueError: naming the file, where it is of other settings or broken.
    """
    if not path.exists():
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        found = measure_now()
        write_json(part, {"settings": dict(settings), **found.to_dict()})
        try:
            with naming(path), contextlib.suppress(FileExistsError):
                os.link(part, path)  # unlike a rename it never takes the place of what another process reads
        finally:
            part.unlink()
    return read_measured(path, settings)


def read_measured(path: Path, settings: Mapping[str, Any]) -> Measured:
    """What a file holds.

    Raises:
        ValueError: naming the file, where it is of other settings or broken.
    """
    found = read_json(path)
    names = Measured.__dataclass_fields__
    try:
        measured = Measured.from_dict(found)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: it can not be read ({error!r}); remove it, and it is measured again") from error
    check_settings([path], {"settings": json.loads(json.dumps(settings))}, apart=names)
    return measured
