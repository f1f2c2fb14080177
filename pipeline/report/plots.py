"""Line plots for SVG: only the geometry (scales, lines, labels); `parts.html` draws it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.report.numbers import MLFLOW_INFINITY, number, scientific, tick

Points = list[tuple[int, float]]
Tree = dict[str, Any]
MAX_POINTS = 400  # of a curve: about one per pixel
STYLES = 4  # colors, each with dashes of its own
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 480.0, 226.0, 52.0, 24.0, 38.0  # of a plot, in the SVG's units
APART = 2.0  # curves nearer than this everywhere are named: one hides the other


@dataclass(frozen=True)
class Limit:
    """A threshold, drawn as a line across the plot."""

    value: float
    label: str


@dataclass(frozen=True)
class Plot:
    """One plot: its title, its metrics (patterns), what its axes are called, and whether the vertical one is logarithmic."""

    title: str
    metrics: tuple[str, ...]
    unit: str = ""
    log: bool = False
    note: str = ""
    limits: tuple[Limit, ...] = ()
    from_zero: bool = False
    along: str = "training step"


def draw(plot: Plot, curves: dict[str, Points], steps: int, events: Sequence[tuple[int, str]] = ()) -> Tree | None:
    """Lines, axes, thresholds and labels of a plot; None if there is nothing to draw. events: (step, what happened). Values
    that are not finite, or not positive on a logarithmic axis, are gaps in the line."""
    scale: Callable[[float], float] = math.log10 if plot.log else float

    def good(value: float) -> bool:
        return math.isfinite(value) and abs(value) < MLFLOW_INFINITY and (value > 0 or not plot.log)

    values = [scale(value) for points in curves.values() for _, value in points if good(value)]
    if not values:
        return None
    limits = [limit for limit in plot.limits if good(limit.value)]
    low, high = span([*values, *(scale(limit.value) for limit in limits), *([0.0, 1.0] * plot.from_zero)], plot.log)

    def x(step: int) -> float:
        return round(LEFT + (WIDTH - LEFT) * step / max(1, steps), 1)

    def y(value: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low), 1)

    lines = []
    for place, (metric, points) in enumerate(curves.items()):
        pieces: list[list[str]] = [[]]
        for step, value in thinned(points):
            if good(value):
                pieces[-1].append(f"{x(step)},{y(scale(value))}")
            elif pieces[-1]:
                pieces.append([])
        drawn = [" ".join(piece) for piece in pieces if len(piece) > 1]
        alone = [piece[0].split(",") for piece in pieces if len(piece) == 1]
        newest = number(points[-1][1])
        lines.append({"name": metric, "style": place % STYLES, "newest": newest, "pieces": drawn, "dots": alone})
    heights = {name: {step: y(scale(v)) for step, v in points if good(v)} for name, points in curves.items()}
    marks = ticks(low, high, whole=plot.log or plot.from_zero)
    return {
        "title": plot.title,
        "unit": plot.unit + (", logarithmic" if plot.log and plot.unit else ""),
        "along": plot.along,
        "note": plot.note,
        "lines": lines,
        "same": _same(heights, {name: dict(points) for name, points in curves.items()}, log=plot.log),
        "marks": [(y(mark), label) for mark, label in zip(marks, labels(marks, log=plot.log), strict=True)],
        "limits": _drawn_limits([(y(scale(one.value)), one.label) for one in limits], heights, steps),
        "events": [{"x": x(step), "label": label, "end": step > steps / 2} for step, label in events if step <= steps],
        "steps": [(x(step), tick(step, log=False)) for step in sorted({0, steps // 2, steps})],
    }


def span(values: list[float], log: bool) -> tuple[float, float]:
    """The ends of an axis for these values; whole ones for the exponents of a logarithmic axis."""
    low, high = min(values), max(values)
    if log:
        low, high = math.floor(low), math.ceil(high)
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    return low, high


def _drawn_limits(limits: list[tuple[float, str]], heights: dict[str, dict[int, float]], steps: int) -> list[Tree]:
    """Thresholds with their labels: above the line, or below it where another one, or the axis's name, is close above."""
    drawn = []
    for at, label in limits:
        left = _is_freer_left(heights, at, steps)
        crowded = any(0 < at - other < 14 for other, _ in limits) or (left and at < TOP + 4)
        drawn.append({"y": at, "label": label, "left": left, "text_y": round(at + 10 if crowded else at - 4, 1)})
    return drawn


def _is_freer_left(heights: dict[str, dict[int, float]], y: float, steps: int) -> bool:
    """Whether the label of a line at the height `y` is farther from the curves at the left end than at the right one."""

    def nearest(*, left: bool) -> float:
        seen = (at for curve in heights.values() for step, at in curve.items() if (step < 0.4 * steps) is left)
        return min((abs(at - (y - 6)) for at in seen), default=math.inf)

    return nearest(left=True) > nearest(left=False)


def _same(heights: dict[str, dict[int, float]], values: dict[str, dict[int, float]], *, log: bool) -> list[str]:
    """A sentence for each curve on which later ones lie, at every step that both have."""
    found: dict[str, list[str]] = {}
    apart: dict[str, float] = {}  # the largest factor on a logarithmic axis, else the largest difference
    for name in heights:
        for other in heights:
            if other == name:
                break
            shared = heights[name].keys() & heights[other].keys()
            if not shared or max(abs(heights[name][s] - heights[other][s]) for s in shared) > APART:
                continue
            pairs = [(values[name][s], values[other][s]) for s in shared]
            gap = max(max(a / b, b / a) for a, b in pairs) if log else max(abs(a - b) for a, b in pairs)
            found.setdefault(other, []).append(name)
            apart[other] = max(gap, apart.get(other, 0.0))
            break
    notes = []
    for other, names in found.items():
        gap = apart[other]
        differ = f"by a factor of {gap:.4g} at most" if log else f"by {scientific(gap)} at most"
        end = "they are equal." if gap == log else f"they differ {differ}."  # a factor of 1, a difference of 0
        notes.append(f"{', '.join(names)} {'lies' if len(names) == 1 else 'lie'} on {other}: {end}")
    return notes


def labels(marks: list[float], *, log: bool) -> list[str]:
    """The labels of ticks: all different, with more digits where it takes them."""
    short = [tick(mark, log=log) for mark in marks]
    return short if len(set(short)) == len(short) else [f"{mark:,.10g}" for mark in marks]


def thinned(points: Points) -> Points:
    """At most 2 * MAX_POINTS points: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= 2 * MAX_POINTS:
        return points
    size = -(-len(points) // MAX_POINTS)
    out: Points = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        bad = [point for point in part if not math.isfinite(point[1])]
        rest = [point for point in part if math.isfinite(point[1])]
        kept = {*bad[:1], *([min(rest, key=lambda p: p[1]), max(rest, key=lambda p: p[1])] if rest else [])}
        out += sorted(kept)
    return out


def ticks(low: float, high: float, *, whole: bool) -> list[float]:
    """About four round numbers in [low, high]; integers (`whole`) for the exponents of a logarithmic axis."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    step = max(1.0, math.ceil(step)) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]
