"""`python -m pipeline.bench.contraction.law SWEEP_DIR [--check RUN_DIR ...] [--out FILE]`: fit the law of contraction.

The law (pipeline/config/contraction.py) is fitted to the order parameters of G that a sweep's runs of the first seed measured,
and judged on each of these by a fit to the others (`left out`), on the other seeds and on other runs, beside two laws of the
budget alone: `bands`, the limits of pipeline/config/schedule.py with the mean of each, and `hinge`, a line down to a floor. All
are fitted to the same numbers and judged by the same measures: RMS error of log10, and rank correlation (Spearman). Every
validation is a point; those of one run are not independent.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.bench.contraction.points import Point, points_of
from pipeline.bench.contraction.recorded import published, shipped_sweep
from pipeline.bench.contraction.runs import find_runs
from pipeline.config.contraction import order_parameter
from pipeline.config.schedule import BUDGET_APPROXIMATE, BUDGET_INVARIANT, BUDGET_PUBLISHED
from pipeline.errors import UserError

Numbers = npt.NDArray[np.float64]
BANDS = (BUDGET_APPROXIMATE, BUDGET_INVARIANT, BUDGET_PUBLISHED)
START = {"law": (-1.0, 3.0, 0.5), "hinge": (-1.0, 1.0, -6.0)}  # of the search for constants


Law = Callable[[Sequence[Point], Sequence[float]], Numbers]  # with its constants: log10 of each order parameter


def log10_measured(points: Sequence[Point]) -> Numbers:
    """What is to be predicted."""
    return np.log10([point.measured for point in points])


def law(points: Sequence[Point], constants: Sequence[float]) -> Numbers:
    """log10 of the order parameter by the law with other constants: start, coherence, noise share."""
    start, coherence, share = constants
    keys = {"start": start, "coherence": abs(coherence), "noise_share": abs(share)}
    return np.log10([order_parameter(p.budget, p.nu, p.units, **keys) for p in points])


def hinge(points: Sequence[Point], constants: Sequence[float]) -> Numbers:
    """A line in the budget down to a floor."""
    start, slope, floor = constants
    return np.maximum(start - slope * np.array([point.budget for point in points]), floor)


def bands(points: Sequence[Point], constants: Sequence[float]) -> Numbers:
    """A number for each band of budgets."""
    return np.array(constants)[np.digitize([point.budget for point in points], BANDS)]


def fit(points: Sequence[Point]) -> dict[str, tuple[Law, list[float]]]:
    """Each law with its constants of least squares. Raises UserError where a band has no point."""
    measured = log10_measured(points)
    band = np.digitize([point.budget for point in points], BANDS)
    if len(set(band.tolist())) <= len(BANDS):
        raise UserError(
            f"too few runs to fit: a budget below {BANDS[0]:g}, between the limits {BANDS}, or above has no run"
        )
    found: dict[str, tuple[Law, list[float]]] = {}
    found["bands"] = (bands, [float(measured[band == number].mean()) for number in range(len(BANDS) + 1)])
    searched: dict[str, Law] = {"hinge": hinge, "law": law}
    for name, function in searched.items():
        found[name] = (function, _search(partial(_error, function, points), START[name]))
    return found


def judge(points: Sequence[Point], predicted: Numbers) -> dict[str, float]:
    """rms: error of log10; rank: Spearman's correlation; low, high: 5 % and 95 % of measured over predicted, log10."""
    residuals = log10_measured(points) - predicted
    low, high = np.quantile(residuals, (0.05, 0.95)).tolist()
    rank = np.corrcoef(_ranks(log10_measured(points)), _ranks(predicted))[0, 1] if np.ptp(predicted) else math.nan
    return {"rms": float(np.sqrt(np.square(residuals).mean())), "rank": float(rank), "low": low, "high": high}


def left_out(points: Sequence[Point]) -> tuple[list[Point], dict[str, Numbers]]:
    """The points, and what each law predicts of each run when it is fitted to all others."""
    order: list[Point] = []
    found: dict[str, list[Numbers]] = {}
    for run in dict.fromkeys(point.run for point in points):
        own = [point for point in points if point.run == run]
        order += own
        for name, (function, constants) in fit([point for point in points if point.run != run]).items():
            found.setdefault(name, []).append(function(own, constants))
    return order, {name: np.concatenate(parts) for name, parts in found.items()}


def main(words: list[str] | None = None) -> int:
    """Print constants and errors; write JSON."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.bench.contraction.law", description=__doc__)
    parser.add_argument("sweep", type=Path, help="run_dir of the sweep")
    parser.add_argument("--check", type=Path, nargs="+", default=[], help="other runs (run_dirs) to judge the laws on")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args(words)
    try:
        result = compare(arguments.sweep, arguments.check)
    except UserError as error:
        print(f"pipeline.bench.contraction.law: {error}", file=sys.stderr)
        return 1
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def compare(sweep: Path, others: Sequence[Path]) -> dict[str, Any]:
    """Fit and judge; prints a line for each law and set of points."""
    points = [point for run in find_runs(sweep) for point in points_of(run)]
    first = min((point.seed for point in points), default=0)
    sets = {
        "fitted": [point for point in points if point.seed == first],
        "other seeds": [point for point in points if point.seed != first],
        "other runs": [point for folder in others for run in find_runs(folder) for point in points_of(run)],
        "recorded": shipped_sweep(),
        "published": published(),
    }
    laws = fit(sets["fitted"])
    result: dict[str, Any] = {"points": {name: [asdict(p) for p in of] for name, of in sets.items()}}
    print(
        f"{'law':<8} {'points of':<12} {'runs':>5} {'n':>5} {'RMS log10':>10} {'rank':>6} {'5 %':>6} {'95 %':>6}  constants"
    )
    order, apart = left_out(sets["fitted"])
    sets = {"fitted": sets.pop("fitted"), "left out": order, **sets}
    for name, (function, constants) in laws.items():
        result[name] = {"constants": constants}
        for which, of in sets.items():
            if len(of) > 1:
                found = judge(of, apart[name] if which == "left out" else function(of, constants))
                result[name][which] = found
                text = " ".join(f"{value:.3g}" for value in constants) if which == "fitted" else ""
                print(
                    f"{name:<8} {which:<12} {len({p.run for p in of}):>5} {len(of):>5} {found['rms']:>10.2f} "
                    f"{found['rank']:>6.2f} {found['low']:>6.2f} {found['high']:>6.2f}  {text}"
                )
    return result


def _error(function: Law, points: Sequence[Point], constants: Sequence[float]) -> float:
    return float(np.square(function(points, constants) - log10_measured(points)).mean())


def _search(error: Callable[[Sequence[float]], float], start: Sequence[float]) -> list[float]:
    """The constants with the least error: by steps along each, halved where none helps."""
    best, least, step = list(start), error(start), 0.5
    while step > 1e-4:
        tried = [[*best[:i], best[i] + sign * step, *best[i + 1 :]] for i in range(len(best)) for sign in (1, -1)]
        errors = [error(constants) for constants in tried]
        if min(errors) < least:
            best, least = tried[int(np.argmin(errors))], min(errors)
        else:
            step /= 2
    return best


def _ranks(values: Numbers) -> Numbers:
    """Ranks; equal values have the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2)[inverse], dtype=np.float64)


if __name__ == "__main__":
    sys.exit(main())
