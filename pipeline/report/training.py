"""The report of a training run: one HTML page with its curves from MLflow.

Losses are in one plot so that they are read together: the block-mode loss of a model that is not invariant sees the future, the
cached one cannot (docs/certificate.md). Order parameters are on a logarithmic axis.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.io.storage import publish_bytes
from pipeline.io.urls import without_secrets
from pipeline.report.html import render
from pipeline.report.plots import Plot, Points, Tree, draw

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
    Plot("Contribution of attention (nats)", ("invariance/attention_alive",)),
    Plot("Leak gap (nats)", ("val/leak_gap",)),
    Plot("Gradient norm", ("train/grad_norm",), log=True),
    Plot("Learning rate", ("train/lr",)),
    Plot("Tokens per second", ("train/tokens_per_second",), note="Targets; padding does not count."),
    Plot("Model FLOPs utilization", ("train/mfu",)),
    Plot("Skipped steps, loss spikes", ("train/skipped_steps", "train/spikes")),
    Plot(
        "Seconds per step before ranks synchronize",
        tuple(f"system/rank_seconds_{name}" for name in ("min", "median", "max")),
        note="Over ranks: data and forward pass. A maximum far above the median means a slow rank (system/slowest_rank).",
    ),
    Plot("Peak memory over ranks (GB)", ("system/rss_gb", "system/gpu_peak_gb")),
    Plot("CPU use of each node (%)", ("system/node-[0-3]/cpu_percent",)),
    Plot("GPU use of each node (%)", ("system/node-[0-3]/gpu_percent",)),
    Plot("Memory used on each node (GB)", ("system/node-[0-3]/memory_gb",)),
)
TILES = (
    ("data/tokens", "tokens", "{:,.0f}"),
    ("data/padding_share", "padding", "{:.1%}"),
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
