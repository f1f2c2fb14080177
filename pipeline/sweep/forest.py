"""A row for each variant: a dot for each seed, the mean, its interval; and the same of the differences to the baseline.

Only the geometry; comparison.html draws it. A name stands above its row, so that a narrow screen has room for both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.plots import labels, span, ticks
from pipeline.sweep.compare import Compared, Interval
from pipeline.sweep.config import CompareConfig
from pipeline.sweep.describe import is_told_apart, with_half

Tree = dict[str, Any]
WIDTH, LEFT, RIGHT, TOP, ROW, BOTTOM = 480.0, 8.0, 472.0, 8.0, 30.0, 34.0  # in the SVG's units
WIDE = 100.0  # largest over smallest, from which on an axis is logarithmic
ROOM = 1.0  # an interval is drawn to so many times the width of the dots beyond them


def values(lines: Sequence[Compared], compare: CompareConfig) -> Tree:
    """The results of each variant, with the baseline's mean as a line."""
    every = [value for line in lines for value in line.values]
    log = min(every) > 0 and max(every) / min(every) > WIDE
    rows = [(line.variant, _kind(line, compare), line.values, line.value) for line in lines]
    line = next((one.value.mean for one in lines if one.variant == compare.baseline), None)
    return _drawn(rows, line, log=log) | {
        "title": compare.value,
        "log": log,
        "dotted": f"the mean of {compare.baseline}",
    }


def differences(lines: Sequence[Compared], compare: CompareConfig) -> Tree | None:
    """The paired differences of each variant to the baseline, with a line at 0; None without any."""
    baseline = next((line for line in lines if line.variant == compare.baseline), None)
    if baseline is None:
        return None
    theirs: Mapping[Any, float] = dict(zip(baseline.pairs, baseline.values, strict=True))
    rows = []
    for line in lines:
        if line.difference is not None:
            pairs = zip(line.pairs, line.values, strict=True)
            dots = tuple(value - theirs[pair] for pair, value in pairs if pair in theirs)
            rows.append((line.variant, _kind(line, compare), dots, line.difference))
    if not rows:
        return None
    title = f"difference to {compare.baseline}"
    return _drawn(rows, 0.0, log=False) | {
        "title": title,
        "log": False,
        "dotted": "no difference; left of it is better",
    }


def _kind(line: Compared, compare: CompareConfig) -> str:
    """Of a row: what its color says."""
    if line.variant == compare.baseline:
        return "baseline"
    if line.difference is None or not is_told_apart(line):
        return "same"
    return "below" if line.difference.mean < 0 else "above"


def _drawn(rows: Sequence[tuple[str, str, Sequence[float], Interval]], line: float | None, *, log: bool) -> Tree:
    scale = math.log10 if log else float
    dots = [scale(value) for _, _, values, _ in rows for value in values] + ([] if line is None else [scale(line)])
    room = ROOM * (max(dots) - min(dots)) or math.inf
    ends = [
        scale(end)
        for _, _, _, interval in rows
        for end in (interval.mean - (interval.half or 0.0), interval.mean + (interval.half or 0.0))
        if end > 0 or not log
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
    for place, (name, kind, values, interval) in enumerate(rows):
        half = interval.half
        ends_of = None
        if half is not None:
            lower, upper = interval.mean - half, interval.mean + half
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
                "mean": x(interval.mean),
                "ends": ends_of,
                "text": with_half(interval, sign=line == 0.0),
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
