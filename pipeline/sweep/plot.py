"""The plot of a sweep: a labelled point for each child, in the color and shape of its verdict. Only the geometry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pipeline.report.numbers import number, tick
from pipeline.report.plots import Limit, ticks

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 640.0, 320.0, 64.0, 24.0, 38.0  # in the SVG's units
LETTER, LINE = 5.6, 11.0  # about the size of a label's letter
LONGEST = 22  # letters of a label; longer ones, and those of many children, are the number of the child
MANY = 24
Row = dict[str, Any]
Box = tuple[float, float, float, float]  # left, top, right, bottom


def scatter(
    rows: list[Row],
    *,
    x: str,
    y: str,
    log_x: bool,
    log_y: bool,
    grid: Sequence[str] = (),
    limits: dict[str, Sequence[Limit]] | None = None,
) -> dict[str, Any] | None:
    """Points, axes, labels and thresholds; None where no row has both numbers. What does not fit the axes (not a number, or
    not positive on a logarithmic one), and every child that failed, is left out and counted.

    grid: the keys whose values label a point. limits: column -> thresholds, drawn where it is an axis.
    """
    scales = [math.log10 if log else float for log in (log_x, log_y)]

    def fits(value: Any, log: bool) -> bool:
        return isinstance(value, int | float) and math.isfinite(value) and (value > 0 or not log)

    shown = [
        (place, row)
        for place, row in enumerate(rows, start=1)
        if row["status"] != "failed" and fits(row.get(x), log_x) and fits(row.get(y), log_y)
    ]
    if not shown:
        return None
    lines = [
        [one for one in (limits or {}).get(key, ()) if fits(one.value, log)] for key, log in ((x, log_x), (y, log_y))
    ]
    spans = []
    for key, scale, log, thresholds in zip((x, y), scales, (log_x, log_y), lines, strict=True):
        values = [scale(row[key]) for _, row in shown] + [scale(one.value) for one in thresholds]
        low, high = (math.floor(min(values)), math.ceil(max(values))) if log else (min(values), max(values))
        margin = 0.5 if high - low < 1e-12 else 0.0 if log else 0.05 * (high - low)
        spans.append((low - margin, high + margin))
    (left, right), (low, high) = spans

    def at_x(value: float) -> float:
        return round(LEFT + (WIDTH - LEFT) * (value - left) / (right - left), 1)

    def at_y(value: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low), 1)

    points = [
        {
            "x": at_x(scales[0](row[x])),
            "y": at_y(scales[1](row[y])),
            "verdict": row.get("verdict") or "none",
            "label": _label(place, row, grid, len(shown)),
            "title": f"{place}. {row['child']}: {number(row[x])}, {number(row[y])}, {row.get('verdict') or 'no certificate'}",
        }
        for place, row in shown
    ]
    _place_labels(points)
    return {
        "x": x,
        "y": y,
        "log_x": log_x,
        "log_y": log_y,
        "left_out": len(rows) - len(shown),
        "points": points,
        "x_limits": [{"x": at_x(scales[0](one.value)), "label": one.label} for one in lines[0]],
        "y_limits": [{"y": at_y(scales[1](one.value)), "label": one.label} for one in lines[1]],
        "x_marks": [(at_x(mark), tick(mark, log=log_x)) for mark in ticks(left, right, whole=log_x)],
        "y_marks": [(at_y(mark), tick(mark, log=log_y)) for mark in ticks(low, high, whole=log_y)],
    }


def _label(place: int, row: Row, grid: Sequence[str], count: int) -> str:
    """The values that were varied, where there is room for them; else the child's number in the table."""
    text = ", ".join(f"{row[key]:g}" if isinstance(row.get(key), float) else str(row.get(key)) for key in grid)
    return text if text and len(text) <= LONGEST and count <= MANY else str(place)


def _place_labels(points: list[Row]) -> None:
    """Give each point the side on which its label covers no point and no other label; no label where there is none."""
    taken: list[Box] = [(p["x"] - 5, p["y"] - 5, p["x"] + 5, p["y"] + 5) for p in points]
    for point in points:
        width = LETTER * len(point["label"])
        for anchor, dx, dy in (("start", 8, 3.5), ("end", -8, 3.5), ("middle", 0, -9), ("middle", 0, 16)):
            x, y = point["x"] + dx, point["y"] + dy
            left = x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
            box = (left, y - LINE + 3, left + width, y + 3)
            inside = box[0] >= LEFT and box[2] <= WIDTH + 15 and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM
            if inside and not any(_overlap(box, other) for other in taken):
                point["at"] = {"x": round(x, 1), "y": round(y, 1), "anchor": anchor}
                taken.append(box)
                break
        else:
            point["at"] = None


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
