"""The curves of a sweep's children, and their mean over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from pipeline.report.numbers import MLFLOW_INFINITY

CURVES = "curves"  # of a row, until the table is written
METRICS = {"val/loss_cached": False, "invariance/order_parameter_G": True}  # -> whether its axis is logarithmic
Curve = list[tuple[int, float]]  # (step, value)


def curves_of(histories: Mapping[str, Sequence[tuple[int, float]]]) -> dict[str, Curve]:
    """What the sweep keeps of a run's metrics: one finite value a step, of a step that was logged twice the later one."""
    kept = {metric: sorted(dict(histories[metric]).items()) for metric in METRICS if metric in histories}
    return {
        metric: [(step, value) for step, value in points if math.isfinite(value) and abs(value) < MLFLOW_INFINITY]
        for metric, points in kept.items()
    }


def mean_curve(curves: Sequence[Sequence[Sequence[float]]], *, log: bool) -> Curve:
    """The mean at the steps that all of them have; log: the geometric mean, and none where a value is 0."""
    by_step = [{int(step): value for step, value in curve} for curve in curves]
    shared = sorted(set.intersection(*(set(curve) for curve in by_step))) if by_step else []
    values = {step: [curve[step] for curve in by_step] for step in shared}
    if not log:
        return [(step, statistics.fmean(found)) for step, found in values.items()]
    return [(step, statistics.geometric_mean(found)) for step, found in values.items() if min(found) > 0]
