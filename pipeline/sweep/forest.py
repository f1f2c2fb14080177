"""A row for each variant: a dot for each seed, the mean, its interval; and the same of the differences to the baseline.

Only the geometry; comparison.html draws it. A name stands above its row, so that a narrow screen has room for both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.plots import labels, span, ticks
from pipeline.sweep import amounts
from pipeline.sweep.compare import Compared, Interval
from pipeline.sweep.config import CompareConfig
from pipeline.sweep.describe import is_told_apart

Tree = dict[str, Any]
Row = tuple[str, str, Sequence[float], Interval, str]  # variant, kind, dots, interval, its text
WIDTH, LEFT, RIGHT, TOP, ROW, BOTTOM = 480.0, 8.0, 472.0, 8.0, 30.0, 34.0  # in the SVG's units
WIDE = 100.0  # largest over smallest, from which on an axis is logarithmic
ROOM = 1.0  # an interval is drawn to so many times the width of the dots beyond them


def values(lines: Sequence[Compared], compare: CompareConfig) -> Tree:
    """The results of each variant, with the baseline's mean as a line."""
    every = [value for line in lines for value in line.values]
    log = compare.log or (min(every) > 0 and max(every) / min(every) > WIDE)
    rows = [
        (line.variant, _kind(line, compare), line.values, line.value, amounts.mean(line.value, log=compare.log))
        for line in lines
    ]
    baseline = next((one.value for one in lines if one.variant == compare.baseline), None)
    at = None if baseline is None else amounts.bounds(baseline, log=compare.log)[1]
    drawn = _drawn(rows, at, log=log, logs=compare.log)
    return drawn | {"title": compare.value, "log": log, "dotted": f"the mean of {compare.baseline}"}


def differences(lines: Sequence[Compared], compare: CompareConfig) -> Tree | None:
    """The paired differences of each variant to the baseline, with a line at none; None without any."""
    baseline = next((line for line in lines if line.variant == compare.baseline), None)
    if baseline is None:
        return None
    theirs: Mapping[Any, float] = dict(zip(baseline.pairs, baseline.values, strict=True))
    rows = []
    for line in lines:
        if line.difference is not None:
            pairs = [(v, theirs[pair]) for pair, v in zip(line.pairs, line.values, strict=True) if pair in theirs]
            dots = tuple(value / other if compare.log else value - other for value, other in pairs)
            text = amounts.difference(line.difference, log=compare.log)
            rows.append((line.variant, _kind(line, compare), dots, line.difference, text))
    if not rows:
        return None
    title = f"{'ratio' if compare.log else 'difference'} to {compare.baseline}"
    drawn = _drawn(rows, 1.0 if compare.log else 0.0, log=compare.log, logs=compare.log)
    return drawn | {"title": title, "log": compare.log, "dotted": "no difference; left of it is better"}


def _kind(line: Compared, compare: CompareConfig) -> str:
    """Of a row: what its color says."""
    if line.variant == compare.baseline:
        return "baseline"
    if line.difference is None or not is_told_apart(line):
        return "same"
    return "below" if line.difference.mean < 0 else "above"


def _drawn(rows: Sequence[Row], line: float | None, *, log: bool, logs: bool) -> Tree:
    """log: of the axis. logs: whether the intervals are of logarithms."""
    scale = math.log10 if log else float
    dots = [scale(value) for _, _, values, *_ in rows for value in values] + ([] if line is None else [scale(line)])
    room = ROOM * (max(dots) - min(dots)) or math.inf
    ends = [
        scale(end) for _, _, _, interval, _ in rows for end in amounts.bounds(interval, log=logs) if end > 0 or not log
    ]
    near = [min(max(end, min(dots) - room), max(dots) + room) for end in ends]
    low, high = span([*dots, *near], log)
    margin = 0.0 if log else 0.03 * (high - low)
    low, high = low - margin, high + margin

    def x(value: float) -> float:
        """Of a value, at most at the ends of the axis."""
        at = low if log and value <= 0 else min(max(scale(value), low), high)
        return round(LEFT + (RIGHT - LEFT) * (at - low) / (high - low), 1)

    def is_inside(value: float) -> bool:
        return (value > 0 or not log) and low <= scale(value) <= high

    height = TOP + ROW * len(rows) + BOTTOM
    drawn: list[Tree] = []
    for place, (name, kind, values, interval, text) in enumerate(rows):
        lower, mean, upper = amounts.bounds(interval, log=logs)
        ends_of = None
        if interval.half is not None:
            ends_of = {
                "from": x(lower),
                "to": x(upper),
                "open_from": not is_inside(lower),
                "open_to": not is_inside(upper),
            }
        drawn.append(
            {
                "name": name,
                "kind": kind,
                "y": TOP + ROW * place + 20,
                "label_y": TOP + ROW * place + 10,
                "dots": [(x(value), f"{value:.6g}") for value in values],
                "mean": x(mean),
                "ends": ends_of,
                "text": text,
            }
        )
    marks = ticks(low, high, whole=log)
    places = [x(10**mark if log else mark) for mark in marks]
    return {
        "rows": drawn,
        "line": None if line is None else x(line),
        "height": height,
        "bottom": height - BOTTOM + 4,
        "marks": list(zip(places, labels(marks, log=log), strict=True)),
        "has_open": any(row["ends"] and (row["ends"]["open_from"] or row["ends"]["open_to"]) for row in drawn),
    }
