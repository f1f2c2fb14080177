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
A child that failed or diverged is no number: it is named beside the mean, which would flatter its variant without it. Nothing
here depends on the order of the rows, which is that in which children ended.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from pipeline.sweep.config import VARIANT, CompareConfig, Scalar

Row = Mapping[str, Any]
# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


class Varied(Protocol):
    """A child, as far as it matters here."""

    @property
    def name(self) -> str:
        """Of its folder, and of its row."""

    @property
    def values(self) -> Mapping[str, Scalar]:
        """What is varied: the variant, and the keys of the grid."""


@dataclass(frozen=True)
class Interval:
    """A mean over n numbers and the half width of its 95 % interval (None for fewer than two)."""

    n: int
    mean: float
    half: float | None


@dataclass(frozen=True)
class Compared:
    """One line of the comparison.

    at_edge: several values were tried, and `best` is the smallest or largest with a result: a better one may lie outside.
    tried: of the first of `pairs`: each value of `tune` with its result (None: failed, diverged, or not there yet).
    children, pairs, values: at `best`, those that have the value, in the order of the pairs.
    missing: at `best`, those that ended without it.
    value: the mean over `values`.
    difference: paired, to the baseline, over the seeds that both have; None for the baseline and where they share none.
    With `log` in the sweep's `compare` both are of natural logarithms, so that a difference is that of a ratio.
    """

    variant: str
    best: Scalar
    at_edge: bool
    tried: tuple[tuple[Scalar, float | None], ...]
    children: tuple[str, ...]
    pairs: tuple[Scalar, ...]
    values: tuple[float, ...]
    missing: tuple[str, ...]
    value: Interval
    difference: Interval | None
    order_parameter: float | None
    train_seconds: float | None


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval of independent numbers. Raises StatisticsError without any."""
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return Interval(n, mean, None)
    quantile = T_95[min(n - 1, len(T_95)) - 1]  # beyond 30 degrees of freedom that of 30, wider by 4 % at most
    return Interval(n, mean, quantile * statistics.stdev(values) / math.sqrt(n))


def is_wanted(
    child: Varied, children: Sequence[Varied], rows: Mapping[str, Row], compare: CompareConfig | None
) -> bool | None:
    """Whether a child is to run. With `tune` those of later seeds run at the best of the first; None: not yet known.

    rows: of the children that ended, by name. Where all of the first seed failed, none of the others is wanted. One that
    finished and whose run MLflow did not show (an outage) decides nothing.
    """
    if compare is None or compare.tune is None:
        return True
    first = children[0].values[compare.pairs]
    if child.values[compare.pairs] == first:
        return True
    rivals = _rivals(child, children, compare)
    if any(rival.name not in rows or _is_unread(rows[rival.name], compare) for rival in rivals):
        return None
    best = _best(rivals, rows, compare)
    return best is not None and best.values[compare.tune] == child.values[compare.tune]


def to_come(children: Sequence[Varied], rows: Mapping[str, Row], compare: CompareConfig | None) -> int:
    """How many children are still to run. Of later seeds whose value of `tune` is not yet known one counts for all values."""
    sure, open_ = 0, set()
    for child in (child for child in children if child.name not in rows):
        wanted = is_wanted(child, children, rows, compare)
        sure += wanted is True
        if wanted is None and compare is not None:
            open_.add(tuple(value for key, value in child.values.items() if key != compare.tune))
    return sure + len(open_)


def in_order(children: Sequence[Varied], compare: CompareConfig | None) -> list[int]:
    """Numbers of the children, from 1, in the order in which they run: those that others wait for first."""
    numbers = list(range(1, len(children) + 1))
    if compare is None:
        return numbers
    seeds = list(dict.fromkeys(child.values[compare.pairs] for child in children))
    return sorted(numbers, key=lambda number: seeds.index(children[number - 1].values[compare.pairs]))


def compared(children: Sequence[Varied], rows: Mapping[str, Row], compare: CompareConfig) -> list[Compared]:
    """A line for each variant with a result, in the sweep's order: at its best value of `tune`, over `pairs`.

    rows: of the children that ended, by name.
    """
    found = [
        line for v in dict.fromkeys(c.values[VARIANT] for c in children) if (line := _line(v, children, rows, compare))
    ]
    baseline = next((line for line in found if line.variant == compare.baseline), None)
    if baseline is None:
        return found
    theirs = dict(zip(baseline.pairs, baseline.values, strict=True))
    lines = []
    for line in found:
        pairs = zip(line.pairs, line.values, strict=True)
        shared = [(value, theirs[pair]) for pair, value in pairs if pair in theirs and line is not baseline]
        differences = [_scaled(value, compare) - _scaled(other, compare) for value, other in shared]
        lines.append(replace(line, difference=interval(differences) if differences else None))
    return lines


def as_json(lines: Sequence[Compared]) -> list[dict[str, Any]]:
    """The lines for sweep.json."""
    return [asdict(line) for line in lines]


def from_json(lines: Sequence[Mapping[str, Any]]) -> list[Compared]:
    """The lines of a sweep.json."""
    return [
        Compared(
            **{
                **line,
                "tried": tuple((value, result) for value, result in line["tried"]),
                **{key: tuple(line[key]) for key in ("children", "pairs", "values", "missing")},
                "value": Interval(**line["value"]),
                "difference": line["difference"] and Interval(**line["difference"]),
            }
        )
        for line in lines
    ]


def _line(
    variant: Scalar, children: Sequence[Varied], rows: Mapping[str, Row], compare: CompareConfig
) -> Compared | None:
    """A variant's line without its difference; None where no child of the first of `pairs` has a result."""
    mine = [child for child in children if child.values[VARIANT] == variant]
    first = children[0].values[compare.pairs]
    best: Scalar
    tried: tuple[tuple[Scalar, float | None], ...] = ()
    if compare.tune is None:
        best, at_edge, at_best = None, False, mine
    else:
        rivals = [child for child in mine if child.values[compare.pairs] == first]
        winner = _best(rivals, rows, compare)
        if winner is None:
            return None
        best = winner.values[compare.tune]
        tried = tuple((rival.values[compare.tune], _value(rows.get(rival.name), compare)) for rival in rivals)
        at_edge = len(tried) > 1 and _is_at_edge(best, [rate for rate, value in tried if value is not None])
        at_best = [child for child in mine if child.values[compare.tune] == best]
    results = {child.name: _value(rows.get(child.name), compare) for child in at_best}
    values = {name: value for name, value in results.items() if value is not None}
    if not values:
        return None
    ended = [rows[name] for name in values]
    return Compared(
        variant=str(variant),
        best=best,
        at_edge=at_edge,
        tried=tried,
        children=tuple(values),
        pairs=tuple(child.values[compare.pairs] for child in at_best if child.name in values),
        values=tuple(values.values()),
        missing=tuple(name for name in results if name in rows and name not in values),
        value=interval([_scaled(value, compare) for value in values.values()]),
        difference=None,
        order_parameter=max(_known(ended, "order_parameter"), default=None),
        train_seconds=statistics.fmean(known) if (known := _known(ended, "train_seconds")) else None,
    )


def _rivals(child: Varied, children: Sequence[Varied], compare: CompareConfig) -> list[Varied]:
    """Those of the first of `pairs` that differ from a child in nothing else but `tune`."""
    fixed = {key: value for key, value in child.values.items() if key not in (compare.tune, compare.pairs)}
    fixed[compare.pairs] = children[0].values[compare.pairs]
    return [other for other in children if fixed.items() <= other.values.items()]


def _best(rivals: Sequence[Varied], rows: Mapping[str, Row], compare: CompareConfig) -> Varied | None:
    """The one with the smallest value, of equal ones the first; None where none has a value."""
    values = [(_value(rows.get(rival.name), compare), rival) for rival in rivals]
    finite = [(value, rival) for value, rival in values if value is not None]
    return min(finite, key=lambda pair: pair[0])[1] if finite else None


def _is_at_edge(best: Scalar, tried: Sequence[Scalar]) -> bool:
    """Whether a number is the smallest or largest of those with a result."""
    numbers = [value for value in tried if isinstance(value, int | float) and not isinstance(value, bool)]
    return len(numbers) == len(tried) and best in (min(numbers), max(numbers))


def _value(row: Row | None, compare: CompareConfig) -> float | None:
    """A child's result; None where it failed, diverged, has no logarithm that is asked for, or is not there."""
    if row is None or row.get("status") != "finished":
        return None
    value = row.get(compare.value)
    is_good = isinstance(value, int | float) and math.isfinite(value) and (value > 0 or not compare.log)
    return value if is_good else None


def _scaled(value: float, compare: CompareConfig) -> float:
    return math.log(value) if compare.log else value


def _is_unread(row: Row, compare: CompareConfig) -> bool:
    return row.get("status") == "finished" and row.get(compare.value) is None and row.get("run_id") is None


def _known(rows: Iterable[Row], column: str) -> list[float]:
    return [value for row in rows if isinstance(value := row.get(column), int | float) and math.isfinite(value)]
