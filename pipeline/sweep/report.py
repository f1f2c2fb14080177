"""A sweep's table and plot: `sweep.json` for programs, `sweep.html` for people, and lines for a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.io.storage import publish_bytes, publish_json
from pipeline.report.html import render
from pipeline.report.plots import ticks

SCHEMA_VERSION = 1
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 640.0, 320.0, 64.0, 12.0, 34.0  # of the plot, in the SVG's units
MOST_WANTED = ("budget", "order_parameter", "relative_deviation_g", "held_out_cached", "tier", "verdict", "status")
Row = dict[str, Any]
Result = dict[str, Any]


def write_sweep_report(facts: Result, rows: list[Row], folder: Path) -> Result:
    """Write both files; returns {"table": rows, "plot", "files": {"table": path, "page": path}}.

    facts: name, run_id, config, set, grid (its keys), children (how many there will be), plot (x, y, log_x, log_y).
    """
    plain = [{key: _finite(value) for key, value in row.items()} for row in rows]
    files = {"table": str(folder / "sweep.json"), "page": str(folder / "sweep.html")}
    publish_json(files["table"], {"schema_version": SCHEMA_VERSION, **facts, "rows": plain})
    first = [*facts["grid"], *MOST_WANTED]
    keys = [*first, *(key for key in (plain[0] if plain else {}) if key not in first)]
    columns = [key for key in dict.fromkeys(keys) if any(row.get(key) is not None for row in plain)]
    content = {"facts": facts, "columns": columns, "rows": plain, "drawn": scatter(plain, **facts["plot"])}
    filters: dict[str, Callable[[Any], str]] = {"cell": cell}
    source = Path(__file__).with_name("report.html")
    publish_bytes(files["page"], render(source, content, filters).encode("utf-8", errors="replace"))
    return {"table": plain, "files": files}


def table_lines(grid: list[str], rows: list[Row]) -> list[str]:
    """The table for a terminal: what was varied, and the numbers most asked for."""
    keys = [*grid, *(key for key in MOST_WANTED if key not in grid)]
    cells = [[key.rpartition(".")[2] for key in keys], *([cell(row.get(key)) for key in keys] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def scatter(rows: list[Row], *, x: str, y: str, log_x: bool, log_y: bool) -> Result | None:
    """Points, axes and labels; None where no row has both numbers. What does not fit the axes (not a number, or not
    positive on a logarithmic one), and every child that failed, is left out and counted."""
    scales = [math.log10 if log else float for log in (log_x, log_y)]

    def fits(row: Row, key: str, log: bool) -> bool:
        value = row.get(key)
        return isinstance(value, int | float) and math.isfinite(value) and (value > 0 or not log)

    finished = [row for row in rows if row["status"] != "failed"]
    shown = [row for row in finished if fits(row, x, log_x) and fits(row, y, log_y)]
    if not shown:
        return None
    spans = []
    for key, scale, log in ((x, scales[0], log_x), (y, scales[1], log_y)):
        values = [scale(row[key]) for row in shown]
        low, high = (math.floor(min(values)), math.ceil(max(values))) if log else (min(values), max(values))
        margin = 0.5 if high - low < 1e-12 else 0.0 if log else 0.05 * (high - low)
        spans.append((low - margin, high + margin))
    (left, right), (low, high) = spans

    def at_x(value: float) -> float:
        return round(LEFT + (WIDTH - LEFT) * (value - left) / (right - left), 1)

    def at_y(value: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low), 1)

    def label(mark: float, log: bool) -> str:
        return f"{10**mark:.0e}" if log else f"{mark:.4g}"

    return {
        "x": x,
        "y": y,
        "left_out": len(rows) - len(shown),
        "points": [
            {
                "x": at_x(scales[0](row[x])),
                "y": at_y(scales[1](row[y])),
                "title": f"{row['child']}: {cell(row[x])}, {cell(row[y])}",
            }
            for row in shown
        ],
        "x_marks": [(at_x(mark), label(mark, log_x)) for mark in ticks(left, right, whole=log_x)],
        "y_marks": [(at_y(mark), label(mark, log_y)) for mark in ticks(low, high, whole=log_y)],
    }


def cell(value: Any) -> str:
    """A value of the table for a person."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
