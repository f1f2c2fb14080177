"""Variants of a sweep beside each other: each at its own best value of one key, and differences between equal seeds.

    variants:                                # each is what it sets
      sdpa: {model.g_source: identity}
      constant: {model.g_source: constant}
    grid: {train.max_lr: [1.0e-3, 3.0e-3], seed: [1, 2, 3]}
    compare: {baseline: sdpa, tune: train.max_lr, pairs: seed, value: val_loss_cached}

Decisions. A recipe is judged at its own best learning rate (`tune`): the others' best may not be its. The best is chosen with
the first of `pairs` alone; the others run only there, which is a half to a third of the grid. The same rule holds for every
variant, the baseline included, so the choice favors none by more than the scatter between seeds. Differences to the baseline
are paired: equal seeds have the same tokens in the same order and the same draws of the weights that both have, so what they
share cancels. The interval is Student's t over the pairs, 95 %, two-sided; with three pairs it is wide (4.3 standard errors).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.sweep.config import VARIANT, Child, CompareConfig, Scalar

Row = Mapping[str, Any]
# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """A mean over n numbers and the half width of its 95 % interval (None for fewer than two)."""

    n: int
    mean: float
    half: float | None


@dataclass(frozen=True)
class Compared:
    """One line of the comparison.

    difference: paired, to the baseline, over the seeds that both have; None for the baseline and where they share none.
    at_edge: `best` is the smallest or largest of several values tried, so a better one may lie outside.
    """

    variant: str
    best: Scalar
    at_edge: bool
    value: Interval
    difference: Interval | None
    order_parameter: float | None
    train_seconds: float | None


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval of independent numbers. Raises StatisticsError without any."""
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return Interval(n, mean, None)
    quantile = T_95[n - 2] if n - 2 < len(T_95) else 1.96
    return Interval(n, mean, quantile * statistics.stdev(values) / math.sqrt(n))


def is_wanted(
    child: Child, children: Sequence[Child], rows: Mapping[str, Row], compare: CompareConfig | None
) -> bool | None:
    """Whether a child is to run. With `tune` those of later seeds run at the best of the first; None: not yet known.

    rows: of the children that ended, by name. Where all of the first seed failed, none of the others is wanted.
    """
    if compare is None or compare.tune is None:
        return True
    first = children[0].values[compare.pairs]
    if child.values[compare.pairs] == first:
        return True
    theirs = {key: value for key, value in child.values.items() if key not in (compare.tune, compare.pairs)}
    rivals = [
        other for other in children if other.values[compare.pairs] == first and theirs.items() <= other.values.items()
    ]
    if any(rival.name not in rows for rival in rivals):
        return None
    measured = [(_value(rows[rival.name], compare), rival) for rival in rivals]
    finite = [(value, rival) for value, rival in measured if value is not None]
    best = min(finite, key=lambda pair: pair[0], default=None)
    return best is not None and best[1].values[compare.tune] == child.values[compare.tune]


def in_order(children: Sequence[Child], compare: CompareConfig | None) -> list[int]:
    """Numbers of the children, from 1, in the order in which they run: those that others wait for first."""
    numbers = list(range(1, len(children) + 1))
    if compare is None:
        return numbers
    seeds = list(dict.fromkeys(child.values[compare.pairs] for child in children))
    return sorted(numbers, key=lambda number: seeds.index(children[number - 1].values[compare.pairs]))


def compared(rows: Sequence[Row], compare: CompareConfig) -> list[Compared]:
    """A line for each variant with a result, in the sweep's order: at its best value of `tune`, over `pairs`."""
    at_best: dict[str, tuple[Scalar, bool, dict[Scalar, Row]]] = {}
    for variant in dict.fromkeys(row[VARIANT] for row in rows):
        mine = [row for row in rows if row[VARIANT] == variant and _value(row, compare) is not None]
        if mine:
            at_best[variant] = _best(mine, compare)
    baseline = at_best.get(compare.baseline, (None, False, {}))[2]
    lines = []
    for variant, (best, at_edge, by_pair) in at_best.items():
        values = {pair: _number(row, compare) for pair, row in by_pair.items()}
        shared = [pair for pair in values if pair in baseline and variant != compare.baseline]
        differences = [values[pair] - _number(baseline[pair], compare) for pair in shared]
        lines.append(
            Compared(
                variant=variant,
                best=best,
                at_edge=at_edge,
                value=interval(list(values.values())),
                difference=interval(differences) if differences else None,
                order_parameter=_largest(row.get("order_parameter") for row in by_pair.values()),
                train_seconds=_mean(row.get("train_seconds") for row in by_pair.values()),
            )
        )
    return lines


def as_json(lines: Sequence[Compared]) -> list[dict[str, Any]]:
    """The lines for sweep.json."""
    return [asdict(line) for line in lines]


def _best(rows: Sequence[Row], compare: CompareConfig) -> tuple[Scalar, bool, dict[Scalar, Row]]:
    """The best value of `tune` by the first of `pairs` that ran, whether it is the smallest or largest tried, its rows."""
    if compare.tune is None:
        return None, False, {row[compare.pairs]: row for row in rows}
    first = rows[0][compare.pairs]
    tried = [row for row in rows if row[compare.pairs] == first]
    best = min(tried, key=lambda row: _number(row, compare))[compare.tune]
    values = [row[compare.tune] for row in tried]
    at_edge = len(values) > 1 and best in (min(values), max(values))
    return best, at_edge, {row[compare.pairs]: row for row in rows if row[compare.tune] == best}


def _value(row: Row, compare: CompareConfig) -> float | None:
    value = row.get(compare.value)
    finished = row.get("status") == "finished"
    return value if finished and isinstance(value, int | float) and math.isfinite(value) else None


def _number(row: Row, compare: CompareConfig) -> float:
    value = _value(row, compare)
    assert value is not None, "rows without the value are left out"
    return value


def _largest(values: Any) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
