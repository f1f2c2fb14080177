"""The report of a training run: one HTML page with the curves that MLflow has of it.

Losses stand beside one another as they must be read: the block-mode loss of a model that is not invariant sees the future,
the cached one cannot (docs/certificate.md). Order parameters are drawn on a logarithmic axis with the thresholds' tiers.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.io.storage import publish_bytes
from pipeline.io.urls import without_secrets
from pipeline.report.html import render

Points = list[tuple[int, float]]
Tree = dict[str, Any]
MAX_POINTS = 400  # of a curve: about one for each pixel
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 480.0, 200.0, 52.0, 8.0, 22.0  # of a plot, in the SVG's units


@dataclass(frozen=True)
class Plot:
    """One chart: its title, the metrics in it (patterns), and whether the axis is logarithmic."""

    title: str
    metrics: tuple[str, ...]
    log: bool = False
    note: str = ""


PLOTS = (
    Plot(
        "Loss (nats per token)",
        ("train/loss", "val/loss_block", "val/loss_cached"),
        note="val/loss_block may see the future until G is invariant; val/loss_cached cannot.",
    ),
    Plot(
        "Order parameters",
        tuple(f"invariance/order_parameter_{name}" for name in ("A", "A_LM", "A_P", "G")),
        log=True,
        note="RMS over inputs, relative: above 1e-2 variant, below 1e-5 invariant.",
    ),
    Plot("Invariance budget", ("invariance/budget",), note="Sum of learning rate x metric weight decay."),
    Plot("What attention is worth (nats)", ("invariance/attention_alive",)),
    Plot("Leak gap (nats)", ("val/leak_gap",)),
    Plot("Gradient norm", ("train/grad_norm",), log=True),
    Plot("Learning rate", ("train/lr",)),
    Plot("Tokens per second", ("train/tokens_per_second",)),
    Plot("Model FLOP utilisation", ("train/mfu",)),
    Plot("Skipped steps, spikes", ("train/skipped_steps", "train/spikes")),
    Plot(
        "Seconds of a step before ranks wait for one another",
        tuple(f"system/rank_seconds_{name}" for name in ("min", "median", "max")),
        note="Over ranks: the data and the forward pass. A maximum far above the median is a slow rank (system/slowest_rank).",
    ),
    Plot("Memory of the fullest rank (GB)", ("system/rss_gb", "system/gpu_peak_gb")),
    Plot("CPU of each node (%)", ("system/node-[0-3]/cpu_percent",)),
    Plot("GPUs of each node (%)", ("system/node-[0-3]/gpu_percent",)),
    Plot("Memory in use on each node (GB)", ("system/node-[0-3]/memory_gb",)),
)
TILES = (
    ("data/tokens", "tokens", "{:,.0f}"),
    ("train/loss", "training loss", "{:.4f}"),
    ("val/loss_cached", "held-out loss, cached G", "{:.4f}"),
    ("val/leak_gap", "leak gap", "{:+.1e}"),
    ("val/bits_per_byte", "bits per byte", "{:.4f}"),
    ("invariance/order_parameter_G", "order parameter of G", "{:.1e}"),
    ("invariance/budget", "invariance budget", "{:.2f}"),
)


def write_run_report(
    facts: Tree, params: dict[str, str], tags: dict[str, str], histories: dict[str, Points], target: Path
) -> Tree:
    """Write the page to `target`. facts: run_id, name, status, started, uri, verdict, checkpoints (as text or lists of it);
    histories: metric -> (step, value). Returns {"report", "step"} and the newest value of each metric on a tile."""
    content = page(facts, params, tags, histories)
    source = Path(__file__).with_name("training.html")
    filters: dict[str, Callable[[Any], str]] = {"joined": lambda parts: ", ".join(parts) or "none"}
    publish_bytes(target, render(source, content, filters).encode("utf-8", errors="replace"))
    newest = {metric: histories[metric][-1][1] for metric, _, _ in TILES if histories.get(metric)}
    return {"report": str(target), "step": content["step"], **newest}


def page(facts: Tree, params: dict[str, str], tags: dict[str, str], histories: dict[str, Points]) -> Tree:
    """Everything the page shows, as plain values."""
    ordered = {metric: sorted(points) for metric, points in histories.items() if points}
    steps = max((points[-1][0] for points in ordered.values()), default=0)
    planned = params.get("train.steps")
    return {
        "facts": facts,
        "step": steps,
        "planned": planned,
        "tiles": [
            {"label": label, "value": form.format(ordered[metric][-1][1])}
            for metric, label, form in TILES
            if metric in ordered
        ],
        "plots": [
            drawn
            for plot in PLOTS
            if (
                drawn := draw(
                    plot, {m: ordered[m] for p in plot.metrics for m in fnmatch.filter(sorted(ordered), p)}, steps
                )
            )
        ],
        "changes": sorted((key, value) for key, value in tags.items() if key.startswith("resumed.")),
        "params": sorted((key, without_secrets(value)) for key, value in params.items()),
    }


def draw(plot: Plot, curves: dict[str, Points], steps: int) -> Tree | None:
    """Lines, axes and labels of a plot; None where there is nothing to draw. What is not finite, or not positive on a
    logarithmic axis, is a gap in its line."""
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
    """At most 2 * MAX_POINTS of them: of each stretch the lowest and the highest, so that no spike is lost."""
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
    """About four round numbers in [low, high]; whole ones for the exponents of a logarithmic axis."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    step = max(1.0, math.ceil(step)) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]
