"""Everything that the pages show of a comparison, as plain values: comparison.html draws it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.numbers import number
from pipeline.sweep import describe, forest
from pipeline.sweep.compare import Compared
from pipeline.sweep.config import CompareConfig
from pipeline.sweep.curves import METRICS, mean_curve
from pipeline.sweep.panels import panels

Tree = dict[str, Any]
Curves = Mapping[str, Mapping[str, Sequence[Sequence[float]]]]  # child -> metric -> (step, value)


def view(lines: Sequence[Compared], compare: CompareConfig, curves: Curves, to_come: int) -> Tree | None:
    """A comparison's table, plots, conclusions and open questions; None where no child has a result."""
    if not lines:
        return None
    return {
        "headings": describe.headings(compare),
        "rows": [(describe.cells(line, compare), _class(line)) for line in lines],
        "note": describe.AT_EDGE if any(line.at_edge for line in lines) else "",
        "conclusions": describe.conclusions(lines, compare),
        "unknown": describe.unknown(lines, compare, to_come),
        "forests": [drawn for drawn in (forest.values(lines, compare), forest.differences(lines, compare)) if drawn],
        "plots": [*_tuned(lines, compare), *_curves(lines, compare, curves)],
    }


def _class(line: Compared) -> str:
    """The color of a verdict."""
    if line.difference is None or not describe.is_told_apart(line):
        return ""
    return "ok" if line.difference.mean < 0 else "fail"


def _tuned(lines: Sequence[Compared], compare: CompareConfig) -> list[Tree]:
    """The first seed's results against the key that is tuned, where that is a number."""
    tried = {
        line.variant: [(value, result) for value, result in line.tried if _is_number(value) and result is not None]
        for line in lines
    }
    numbers = [value for points in tried.values() for value, _ in points]
    if compare.tune is None or len(set(numbers)) < 2:
        return []
    return panels(
        tried,  # type: ignore[arg-type]
        compare.baseline,
        title=f"{compare.value} against {describe.last(compare.tune)}",
        unit=compare.value,
        along=describe.last(compare.tune),
        log_x=min(numbers) > 0,  # type: ignore[type-var,operator]
        points=True,
        newest=lambda points: f"{number(min(y for _, y in points))} at {min(points, key=lambda point: point[1])[0]:g}",
    )


def _curves(lines: Sequence[Compared], compare: CompareConfig, curves: Curves) -> list[Tree]:
    """Each metric along training: the mean over the seeds at a variant's best."""
    found: list[Tree] = []
    for metric, log in METRICS.items():
        means = {}
        for line in lines:
            theirs = [curves[child][metric] for child in line.children if metric in curves.get(child, {})]
            means[line.variant] = mean_curve(theirs, log=log)
        found += panels(
            means,
            compare.baseline,
            title=metric,
            unit="RMS over inputs / RMS" if log else "nats per token",
            along="training step",
            log_y=log,
            newest=lambda points: number(points[-1][1]),
        )
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
