"""Line plots for SVG: only the geometry (scales, lines, labels), templates draw it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Points = list[tuple[int, float]]
Tree = dict[str, Any]
MAX_POINTS = 400  # of a curve: about one per pixel
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 480.0, 200.0, 52.0, 8.0, 22.0  # of a plot, in the SVG's units


@dataclass(frozen=True)
class Plot:
    """One plot: its title, its metrics (patterns), and whether the axis is logarithmic."""

    title: str
    metrics: tuple[str, ...]
    log: bool = False
    note: str = ""


def draw(plot: Plot, curves: dict[str, Points], steps: int) -> Tree | None:
    """Lines, axes and labels of a plot; None if there is nothing to draw. Values that are not finite, or not positive on a
    logarithmic axis, are gaps in the line."""
    scale: Callable[[float], float] = math.log10 if plot.log else float

    def good(value: float) -> bool:
        return math.isfinite(value) and abs(value) < 1e300 and (value > 0 or not plot.log)  # MLflow's inf is 1.8e308

    values = [scale(value) for points in curves.values() for _, value in points if good(value)]
    if not values:
        return None
    low, high = min(values), max(values)
    if plot.log:
        low, high = math.floor(low), math.ceil(high)
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5

    def x(step: int) -> float:
        return round(LEFT + (WIDTH - LEFT) * step / max(1, steps), 1)

    def y(value: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low), 1)

    lines = []
    for number, (metric, points) in enumerate(curves.items()):
        pieces: list[list[str]] = [[]]
        for step, value in thinned(points):
            if good(value):
                pieces[-1].append(f"{x(step)},{y(scale(value))}")
            elif pieces[-1]:
                pieces.append([])
        newest = f"{points[-1][1]:.4g}"
        drawn = [" ".join(piece) for piece in pieces if len(piece) > 1]
        alone = [piece[0].split(",") for piece in pieces if len(piece) == 1]
        lines.append({"name": metric, "number": number, "newest": newest, "pieces": drawn, "dots": alone})
    marks = [(y(mark), f"{10**mark:.0e}" if plot.log else f"{mark:.4g}") for mark in ticks(low, high, whole=plot.log)]
    return {
        "title": plot.title,
        "note": plot.note,
        "lines": lines,
        "marks": marks,
        "steps": [(x(step), f"{step:,}") for step in sorted({0, steps // 2, steps})],
    }


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
