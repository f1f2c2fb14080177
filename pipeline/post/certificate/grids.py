"""The page's tables of layers by heads, each cell colored by its relative deviation."""

from __future__ import annotations

import math
from typing import Any

from pipeline.report.numbers import number

Tree = dict[str, Any]
HOT = 0.63  # a cell that is colored more strongly has dark text in both color schemes


def grid(title: str, per_head: list[list[float | None]], where: str, *, allowed: float | None = None) -> Tree:
    """One table. where: what is said beside the title; allowed: cells above it, or not measured, are marked."""

    def cell(value: float | None) -> Tree:
        over = allowed is not None and (value is None or value > allowed)
        return {"text": _short(value), "shade": _shade(value), "hot": _shade(value) > HOT, "over": over}

    rows = [[cell(value) for value in row] for row in per_head]
    return {"title": title, "rows": rows, "wide": len(rows[0]) > 5, "where": where}


def of_tensors(measures: Tree, thresholds: Tree) -> list[Tree]:
    """Relative deviation of each tensor and precision, G_LM first, and of G_LM as the queries see it."""
    allowed = {"fp64": thresholds["max_relative_deviation_g"]}
    allowed["fp32"] = thresholds.get("max_relative_deviation_g_fp32", allowed["fp64"])
    out = [
        grid(
            f"{tensor}, {precision}",
            found["per_head"],
            f"{worst(found)}; max |Δ| {number(found['max_abs_delta'])}",
            allowed=allowed[precision] if tensor == "G_LM" else None,
        )
        for precision, tensors in measures["deviations"].items()
        for tensor, found in tensors.items()
    ]
    if query := measures.get("query_deviation"):
        limit = thresholds["max_query_deviation"]
        out.append(grid("G_LM, times the queries, fp64", query["per_head"], worst(query), allowed=limit))
    return sorted(out, key=lambda one: (not one["title"].startswith("G_LM"), one["title"]))


def worst(found: Tree) -> str:
    """The largest value and where it is."""
    spot = found["worst"]
    kind = f", prompts {spot['kind']}" if "kind" in spot else ""
    return f"worst {number(found['max'])} (layer {spot['layer']}, head {spot['head']}{kind})"


def _short(value: float | None) -> str:
    """Two digits, for a cell."""
    return number(value) if value is None or value < 1e-2 else f"{value:.2g}"


def _shade(value: float | None) -> float:
    """How strongly a cell is colored: 0 at 1e-8 and below, 0.9 at 1."""
    if value is None:
        return 0.9
    return round(min(0.9, max(0.0, 0.9 * (math.log10(max(value, 1e-12)) + 8) / 8)), 2)
