"""The report of a training run: one HTML page with its curves from MLflow.

Losses are in one plot so that they are read together: the block-mode loss of a model that is not invariant sees the future, the
cached one cannot (docs/certificate.md). Order parameters are on a logarithmic axis.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config.post import PostConfig
from pipeline.config.schedule import BUDGET_INVARIANT, BUDGET_PUBLISHED
from pipeline.io.storage import publish_bytes
from pipeline.io.urls import without_secrets
from pipeline.report.html import render
from pipeline.report.numbers import fixed, number, scientific, short
from pipeline.report.plots import Limit, Plot, Points, Tree, draw
from pipeline.report.terms import explained

LIMITS = ("max_relative_deviation_g", "variant_above", "min_attention_effect", "max_leak_gap")  # of `post`, drawn in
BUDGET_LIMITS = (
    Limit(BUDGET_INVARIANT, f"{BUDGET_INVARIANT:g}: invariance is possible"),
    Limit(BUDGET_PUBLISHED, f"{BUDGET_PUBLISHED:g}: invariance is expected"),
)
TERMS = ("A", "A_LM", "A_P", "G_LM", "live, cached", "block loss", "cached loss", "order parameter", "round-off", "leak gap",
         "budget", "attention effect", "nats", "loss spike", "MFU")  # fmt: skip
TILES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("data/tokens", "training tokens", lambda value: short(round(value))),
    ("data/padding_share", "padding", "{:.1%}".format),
    ("train/loss", "training loss, nats", partial(fixed, digits=4)),
    ("val/loss_cached", "held-out loss, cached G_LM, nats", partial(fixed, digits=4)),
    ("val/leak_gap", "leak gap, nats", number),
    ("val/bits_per_byte", "held-out bits per byte", partial(fixed, digits=4)),
    ("invariance/order_parameter_G", "order parameter of G_LM", number),
    ("invariance/budget", "invariance budget", partial(fixed, digits=2)),
)
NOT_VALIDATED = "No validation yet: held-out loss, order parameters and leak gap come with train.validate_every."


def limits_of(settings: Mapping[str, Any]) -> dict[str, float]:
    """The thresholds that the plots show, from settings of `post`; the default for one that is absent or no number."""
    found = {name: float(PostConfig.model_fields[name].default) for name in LIMITS}
    for name in LIMITS:
        try:
            found[name] = float(settings[name])
        except (KeyError, TypeError, ValueError):
            continue
    return found


def invariance_plots(limits: Mapping[str, float]) -> tuple[Plot, ...]:
    """The plots that show whether G_LM becomes a constant, with the thresholds `limits` (`limits_of`)."""
    largest, variant = limits["max_relative_deviation_g"], limits["variant_above"]
    effect, gap = limits["min_attention_effect"], limits["max_leak_gap"]
    return (
        Plot(
            "Order parameters",
            tuple(f"invariance/order_parameter_{name}" for name in ("A", "A_LM", "A_P", "G")),
            "RMS over inputs / RMS",
            log=True,
            note="How much each tensor changes with the input; G is G_LM. The certificate judges the worst head and prompt.",
            limits=(
                Limit(largest, f"{scientific(largest)}: certified below"),
                Limit(variant, f"{scientific(variant)}: variant above"),
            ),
        ),
        Plot(
            "Invariance budget",
            ("invariance/budget",),
            "sum of learning rate x metric weight decay",
            note="Predicts invariance; the certificate measures it.",
            limits=BUDGET_LIMITS,
        ),
        Plot(
            "Attention effect",
            ("invariance/attention_alive",),
            "nats per token",
            note="What G_LM is worth: loss with G_LM = 0 or the identity (the smaller), minus the cached loss.",
            limits=(Limit(effect, f"{effect:g}: certified above"),),
        ),
        Plot(
            "Leak gap",
            ("val/leak_gap",),
            "nats per token",
            note="Cached loss minus block loss: what a G_LM that has seen the future seems to gain.",
            limits=(Limit(gap, f"±{scientific(gap)}: certified between"), Limit(-gap, "")),
        ),
    )


SCORES = (
    "Of checkpoints (train.evaluate, pldr evaluate): with the cached G_LM, perhaps on the first items of a task only."
)
BENCHMARKS = (  # no more in a plot than it has styles of lines
    ("Benchmarks: questions", ("arc_easy", "arc_challenge", "openbookqa", "piqa")),
    ("Benchmarks: sentences", ("hellaswag", "social_iqa", "winogrande", "lambada_openai")),
    ("Benchmarks: TruthfulQA", ("truthfulqa_mc1", "truthfulqa_mc2")),
)


def run_plots(limits: Mapping[str, float]) -> tuple[Plot, ...]:
    """All plots of a run report."""
    return (
        Plot(
            "Loss",
            ("train/loss", "val/loss_block", "val/loss_cached"),
            "nats per token",
            note="val/loss_block may see the future until G_LM is invariant; val/loss_cached cannot.",
        ),
        *(
            Plot(title, tuple(f"eval/{task}/acc" for task in tasks), "accuracy", note=SCORES)
            for title, tasks in BENCHMARKS
        ),
        *invariance_plots(limits),
        Plot("Gradient norm", ("train/grad_norm",), "norm", log=True),
        Plot("Learning rate", ("train/lr",), "learning rate"),
        Plot("Throughput", ("train/tokens_per_second",), "tokens per second", note="Targets; padding does not count."),
        Plot("Model FLOPs utilization", ("train/mfu",), "share of the peak"),
        Plot(
            "Skipped steps, loss spikes",
            ("train/skipped_steps", "train/spikes"),
            "number since the start",
            from_zero=True,
        ),
        Plot(
            "Step time before ranks synchronize",
            tuple(f"system/rank_seconds_{name}" for name in ("min", "median", "max")),
            "seconds",
            note="Over ranks: data and forward pass. A maximum far above the median means a slow rank (system/slowest_rank).",
        ),
        Plot("Peak memory over ranks", ("system/rss_gb", "system/gpu_peak_gb"), "GB"),
        Plot("CPU use of each node", ("system/node-[0-3]/cpu_percent",), "%"),
        Plot("GPU use of each node", ("system/node-[0-3]/gpu_percent",), "%"),
        Plot("Memory used on each node", ("system/node-[0-3]/memory_gb",), "GB"),
    )


def write_run_report(
    facts: Tree, params: dict[str, str], tags: dict[str, str], histories: dict[str, Points], target: Path
) -> Tree:
    """Write the page to `target`. facts: run_id, name, status, started, uri, verdict, checkpoints (as text or lists of it), and
    pages (the other ones, `Link`s); histories: metric -> (step, value). Returns {"report", "step"} and the newest value of
    each metric on a tile."""
    content = page(facts, params, tags, histories)
    source = Path(__file__).with_name("training.html")
    filters: dict[str, Callable[[Any], str]] = {"joined": lambda parts: ", ".join(parts) or "none", "count": _count}
    publish_bytes(target, render(source, content, filters).encode("utf-8", errors="replace"))
    newest = {metric: histories[metric][-1][1] for metric, _, _ in TILES if histories.get(metric)}
    return {"report": str(target), "step": content["step"], **newest}


def page(facts: Tree, params: dict[str, str], tags: dict[str, str], histories: dict[str, Points]) -> Tree:
    """Everything the page shows, as plain values."""
    ordered = {metric: sorted(points) for metric, points in histories.items() if points}
    steps = max((points[-1][0] for points in ordered.values()), default=0)
    limits = limits_of({key.removeprefix("post."): value for key, value in params.items() if key.startswith("post.")})
    changes = _changes(tags)
    validated = any(metric.startswith("val/") for metric in ordered)
    return {
        "facts": {"pages": (), **facts},
        "step": steps,
        "planned": params.get("train.steps"),
        "notes": [NOT_VALIDATED] if ordered and not validated else [],
        "tiles": [
            {"label": label, "value": form(ordered[metric][-1][1]), "exact": f"{ordered[metric][-1][1]:.9g}"}
            for metric, label, form in TILES
            if metric in ordered
        ],
        "plots": [
            drawn
            for plot in run_plots(limits)
            if (
                drawn := draw(
                    plot,
                    {m: ordered[m] for p in plot.metrics for m in fnmatch.filter(sorted(ordered), p)},
                    steps,
                    _events(changes, ordered),
                )
            )
        ],
        "changes": changes,
        "params": sorted((key, without_secrets(value)) for key, value in params.items()),
        "terms": explained(*TERMS),
    }


def _changes(tags: Mapping[str, str]) -> list[tuple[int | str, str, str]]:
    """What was changed on resume: (step, key, "old -> new"), from tags `resumed.STEP.KEY`."""
    found: list[tuple[int | str, str, str]] = []
    for tag, value in tags.items():
        if tag.startswith("resumed."):
            step, _, key = tag.removeprefix("resumed.").partition(".")
            found.append((int(step) if step.isdecimal() else step, key, without_secrets(value)))
    return sorted(found, key=lambda change: (str(change[0]).zfill(12), change[1]))


def _events(changes: list[tuple[int | str, str, str]], histories: Mapping[str, Points]) -> list[tuple[int, str]]:
    """Steps at which the training became another one: resumed with other settings, G_LM frozen."""
    found = dict.fromkeys((step for step, _, _ in changes if isinstance(step, int)), "resumed, changed")
    frozen = next((step for step, value in histories.get("invariance/frozen", ()) if value), None)
    return sorted([*found.items(), *([] if frozen is None else [(frozen, "G_LM frozen")])])


def _count(text: str) -> str:
    """A parameter that should be a whole number."""
    return f"{int(text):,}" if text.isdecimal() else text
