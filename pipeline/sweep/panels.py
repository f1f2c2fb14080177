"""Small multiples of lines for a comparison: each plot has the baseline and a few variants, all have the same axes.

Only the geometry, as parts.html draws it (`plot`). A plot has no more lines than there are styles to tell them apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.report.numbers import tick
from pipeline.report.plots import BOTTOM, HEIGHT, LEFT, STYLES, TOP, WIDTH, labels, span, ticks

Tree = dict[str, Any]
Lines = Mapping[str, Sequence[tuple[float, float]]]  # name -> points (x, y)


def panels(
    lines: Lines,
    first: str,
    *,
    title: str,
    unit: str,
    along: str,
    log_x: bool = False,
    log_y: bool = False,
    points: bool = False,
    newest: Callable[[Sequence[tuple[float, float]]], str],
) -> list[Tree]:
    """The plots, with the line `first` in each; none where there is nothing to draw. What has no place on a logarithmic axis
    is left out. points: mark each. newest: what stands beside a line's name."""
    drawn = {
        name: [(x, y) for x, y in sorted(line) if (x > 0 or not log_x) and (y > 0 or not log_y)]
        for name, line in lines.items()
    }
    drawn = {name: line for name, line in drawn.items() if line}
    rest = [name for name in drawn if name != first]
    if not drawn:
        return []
    to_x, to_y = (math.log10 if log else float for log in (log_x, log_y))
    every = [point for line in drawn.values() for point in line]
    xs = sorted({x for x, _ in every})
    left, right = (to_x(xs[0]) if log_x else 0.0), to_x(xs[-1])
    low, high = span([to_y(y) for _, y in every], log_y)

    def at(x: float, y: float) -> tuple[float, float]:
        share = (to_x(x) - left) / (right - left) if right > left else 0.5
        return round(LEFT + (WIDTH - LEFT) * share, 1), round(
            TOP + (HEIGHT - TOP - BOTTOM) * (high - to_y(y)) / (high - low), 1
        )

    marks = ticks(low, high, whole=log_y)
    x_marks = xs if log_x else sorted({0.0, xs[-1] / 2, xs[-1]})
    groups = [rest[i : i + STYLES - 1] for i in range(0, len(rest), STYLES - 1)] or [[]]
    plots = []
    for group in groups:
        names = [name for name in [first, *group] if name in drawn]
        shown = []
        for name in names:
            places = [at(x, y) for x, y in drawn[name]]
            piece = " ".join(f"{x},{y}" for x, y in places)
            style = 0 if name == first else 1 + group.index(name)
            shown.append(
                {
                    "name": name,
                    "style": style,
                    "newest": newest(drawn[name]),
                    "pieces": [piece] if len(places) > 1 else [],
                    "dots": places if points or len(places) == 1 else [],
                }
            )
        plots.append(
            {
                "title": title,
                "unit": unit + (", logarithmic" if log_y else ""),
                "along": along + (", logarithmic" if log_x else ""),
                "note": "",
                "lines": shown,
                "same": [],
                "marks": [
                    (at(xs[-1], 10**mark if log_y else mark)[1], label)
                    for mark, label in zip(marks, labels(marks, log=log_y), strict=True)
                ],
                "limits": [],
                "events": [],
                "steps": [
                    (at(x, 10**low if log_y else low)[0], f"{x:g}" if log_x else tick(x, log=False)) for x in x_marks
                ],
            }
        )
    return plots
