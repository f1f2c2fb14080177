"""A sweep's table and plot: `sweep.json` for programs, `sweep.html` for people, and lines for a terminal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.io.storage import publish_bytes, publish_json
from pipeline.report.html import render
from pipeline.report.links import CERTIFICATE, TRAINING, Link, link, mlflow_link
from pipeline.report.numbers import number, scientific
from pipeline.report.plots import Limit
from pipeline.report.terms import explained
from pipeline.report.training import BUDGET_LIMITS
from pipeline.sweep.compare import from_json
from pipeline.sweep.config import CompareConfig
from pipeline.sweep.curves import CURVES
from pipeline.sweep.plot import scatter
from pipeline.sweep.view import view

SCHEMA_VERSION = 1
MOST_WANTED = ("budget", "order_parameter", "relative_deviation_g", "held_out_cached", "tier", "verdict", "status")
TERMS = (
    "G_LM",
    "live, cached",
    "relative deviation",
    "order parameter",
    "tier",
    "round-off",
    "budget",
    "nats",
    "fingerprint",
)
MEANINGS = {
    "order_parameter": "of G_LM, at the last validation of the training",
    "relative_deviation_g": "of the certificate: the worst head on the worst prompt",
    "held_out_cached": "held-out loss with a cached G_LM, nats per token",
    "held_out_block": "held-out loss with the live G_LM, nats per token",
    "loss": "of the last training step, nats per token",
    "val_loss_cached": "held-out loss at the last validation, cached G_LM, nats per token",
    "budget": "invariance budget that the training has spent",
    "data_fingerprint": "equal for children that trained on the same tokens",
}
LONGEST = 16  # letters of a cell: ids and fingerprints are known by their beginning
Row = dict[str, Any]
Result = dict[str, Any]


def write_sweep_report(
    facts: Result, rows: list[Row], folder: Path, *, limit: float | None = None, uri: str | None = None
) -> Result:
    """Write both files; returns {"table": rows, "plot", "files": {"table": path, "page": path}}.

    facts: name, run_id, config, set, grid (its keys), children (how many there will be), plot (x, y, log_x, log_y); where
    variants are compared: about, compare, compared. limit: the largest deviation that is certified; None where children
    differ in it. uri: the MLflow store. The rows' curves are a part of the file, apart from the table.
    """
    plain = [{key: _finite(value) for key, value in row.items() if key != CURVES} for row in rows]
    curves = {row["child"]: row[CURVES] for row in rows if row.get(CURVES)}
    files = {"table": str(folder / "sweep.json"), "page": str(folder / "sweep.html")}
    publish_json(files["table"], {"schema_version": SCHEMA_VERSION, **facts, "rows": plain, CURVES: curves})
    first = [*facts["grid"], *MOST_WANTED]
    keys = [*first, *(key for key in (plain[0] if plain else {}) if key not in first)]
    columns = [key for key in dict.fromkeys(keys) if any(row.get(key) is not None for row in plain)]
    deviation = [] if limit is None else [Limit(limit, f"{scientific(limit)}: certified below")]
    limits = {"budget": BUDGET_LIMITS, "order_parameter": deviation, "relative_deviation_g": deviation}
    content = {
        "facts": {"about": "", **facts},
        "headline": headline(plain, facts["children"]),
        "columns": sorted((key for key in columns if key != "child"), key=lambda key: key != "verdict"),
        "meanings": {key: text for key, text in MEANINGS.items() if key in columns},
        "rows": plain,
        "links": [_links(row, folder, uri) for row in plain],
        "pages": [] if uri is None else [mlflow_link(uri, facts["run_id"])],
        "compared": compared_in(facts, curves, to_come=facts["children"] - len(rows)),
        "drawn": scatter(plain, **facts["plot"], grid=facts["grid"], limits=limits),
        "terms": explained(*TERMS),
    }
    filters: dict[str, Callable[[Any], str]] = {
        "cell": cell,
        "shortened": lambda text: text if len(text) <= LONGEST else f"{text[:LONGEST]}\u2026",
    }
    source = Path(__file__).with_name("report.html")
    publish_bytes(files["page"], render(source, content, filters).encode("utf-8", errors="replace"))
    return {"table": plain, "files": files}


def compared_in(facts: Result, curves: Result, *, to_come: int) -> Result | None:
    """What a page shows of the comparison in a sweep's facts; None where there is none."""
    if not facts.get("compare") or not facts.get("compared"):
        return None
    compare = CompareConfig.model_validate(facts["compare"])
    return view(from_json(facts["compared"]), compare, curves, to_come)


def headline(rows: list[Row], children: int) -> str:
    """How many children were certified, and what became of the others."""
    verdicts = Counter(row.get("verdict") for row in rows if row["status"] != "failed")
    broken, waiting = sum(row["status"] == "failed" for row in rows), children - len(rows)
    finished = f"{verdicts['certified']} of {children} certified"
    if not verdicts["certified"] and not verdicts["failed"]:
        finished = f"{sum(verdicts.values())} of {children} finished; none was judged"
    parts = [
        finished,
        f"{verdicts['failed']} did not pass" if verdicts["failed"] else "",
        f"{broken} broke off with an error" if broken else "",
        f"{waiting} to come" if waiting > 0 else "",
    ]
    return "; ".join(part for part in parts if part)


def _links(row: Row, folder: Path, uri: str | None) -> list[Link]:
    """A child's certificate and run report where they are, and its run at an MLflow server."""
    root = folder.parent / "children" / row["child"]
    pages = [("certificate", root / CERTIFICATE), ("run report", root / TRAINING)]
    found = [link(label, folder / "sweep.html", target, "") for label, target in pages if target.exists()]
    if uri is not None and row.get("run_id") and (run := mlflow_link(uri, row["run_id"])).href:
        found.append(run)
    return found


def table_lines(grid: list[str], rows: list[Row]) -> list[str]:
    """The table for a terminal: what was varied, and the numbers most asked for."""
    keys = [*grid, *(key for key in MOST_WANTED if key not in grid)]
    cells = [[key.rpartition(".")[2] for key in keys], *([cell(row.get(key)) for key in keys] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def cell(value: Any) -> str:
    """A value of the table for a person."""
    if value is None:
        return "-"
    return number(value) if isinstance(value, float) else str(value)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
