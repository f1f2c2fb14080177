"""What a law is fitted to: a validation's order parameter of G beside what the configuration says up to its step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.bench.contraction.runs import Run
from pipeline.config.contraction import ROUND_OFF, noise
from pipeline.config.schedule import invariance_budget
from pipeline.config.train import TrainConfig


@dataclass(frozen=True)
class Point:
    """measured: the order parameter of G, ROUND_OFF at least. budget, nu: as in pipeline/config/contraction.py."""

    run: str
    seed: int
    step: int
    budget: float
    nu: float
    units: int
    measured: float


def point(run: str, seed: int, train: TrainConfig, step: int, *, units: int, measured: float) -> Point:
    """One from a recipe."""
    spent = invariance_budget(train, step)
    return Point(run, seed, step, spent, noise(train, step), units, max(measured, ROUND_OFF))


def points_of(run: Run) -> list[Point]:
    """A run's validations."""
    units = run.config.model.num_reslayerA
    return [
        point(run.name, run.config.seed, run.config.train, step, units=units, measured=found["G"])
        for step, found in sorted(run.measured.items())
        if math.isfinite(found.get("G", math.nan))
    ]
