"""The certificate for people: one self-contained HTML page, the verdict first, then the evidence.

The numbers are the certificate's own; pictures of G_LM are of the G_LM that it certifies. Page content may be hostile (samples
of a model, names of runs): every value goes through jinja2's escaping (pipeline/report/html.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.bundle.certificate.checks import causes
from pipeline.bundle.certificate.rules import FULL_PROMPTS
from pipeline.bundle.certificate.statement import rounded_up
from pipeline.bundle.certificate.verdict import looser
from pipeline.post.certificate import grids, inputs
from pipeline.post.certificate.labels import CHECK_LABELS, LOSS_LABELS, Tree, failures, plain_verdict, required
from pipeline.post.measure.generation import first_difference
from pipeline.report.head_maps import MAX_MAPS, head_maps
from pipeline.report.html import render
from pipeline.report.links import Link
from pipeline.report.numbers import number
from pipeline.report.plots import Plot, Points, draw
from pipeline.report.terms import explained
from pipeline.report.training import invariance_plots, limits_of

TERMS = ("A", "A_LM", "A_P", "G_LM", "live, cached", "relative deviation", "worst row", "proven", "tier", "round-off",
         "leak gap", "attention effect", "plain", "KL", "top-1 agreement", "greedy agreement", "budget", "order parameter",
         "nats")  # fmt: skip


@dataclass(frozen=True)
class Shown:
    """A sample as text; `differs`: the first token where cached and live differ (None: they do not)."""

    how: str
    prompt: str
    cached: str
    live: str
    differs: int | None


@dataclass(frozen=True)
class Evidence:
    """What the page shows beside the certificate. g_lm, spread: [L,H,K,K]; histories: metric -> (step, value) points of the
    training; twin: the SDPA twin's `loss` (None without one) and a `note` about it; pages: the run's other pages."""

    name: str
    g_lm: Tensor
    spread: Tensor
    histories: Mapping[str, Points] = field(default_factory=dict)
    samples: Sequence[Shown] = ()
    twin: Tree = field(default_factory=lambda: {"loss": None, "note": None})
    notes: Sequence[str] = ()
    pages: Sequence[Link] = ()


def show_sample(how: str, ids: tuple[list[int], list[int], list[int]], decode: Callable[[list[int]], str]) -> Shown:
    """A sample's ids (prompt, cached, live) as text."""
    prompt, cached, live = ids
    texts = [decode(prompt + new)[len(decode(prompt)) :] for new in (cached, live)]
    return Shown(how, decode(prompt), texts[0], texts[1], first_difference(cached, live))


def certificate_page(certificate: Tree, evidence: Evidence) -> str:
    """The page as HTML."""
    filters: dict[str, Callable[[Any], str]] = {
        "num": number,
        "bound": lambda x: number(None if x is None else rounded_up(x)),
        "loss": lambda x: "-" if x is None else f"{x:.4f}",
    }
    return render(Path(__file__).with_name("page.html"), _content(certificate, evidence), filters)


def _content(certificate: Tree, evidence: Evidence) -> Tree:
    """Everything the page shows, as plain values."""
    measures = certificate["measures"]
    steps = max((points[-1][0] for points in evidence.histories.values() if points), default=0)
    return {
        "name": evidence.name,
        "c": certificate,
        "m": measures,
        "not_finite": causes(measures["not_finite"]),
        "pages": evidence.pages,
        "verdict": plain_verdict(certificate),
        "failures": failures(certificate),
        "looser": looser(certificate),
        "full_prompts": FULL_PROMPTS,
        "checks": [
            {**check, "label": CHECK_LABELS.get(check["measure"], ""), "required": required(check)}
            for check in sorted(certificate["checks"], key=lambda check: check["passed"])
        ],
        "tiles": _tiles(certificate),
        "losses": _losses(measures["losses"], evidence.twin),
        "twin": evidence.twin,
        "layers": inputs.layers(certificate),
        "effects": measures.get("effects"),
        "grids": grids.of_tensors(measures, certificate["thresholds"]),
        "kinds": inputs.kinds(certificate),
        "sample": inputs.sample(certificate),
        "every_row": inputs.every_row(certificate),
        "maps": head_maps(evidence.g_lm, (measures["deviations"].get("fp32", {}).get("G_LM") or {}).get("per_head")),
        "maps_left_out": max(0, evidence.g_lm.shape[0] * evidence.g_lm.shape[1] - MAX_MAPS),
        "spectra": _spectra(evidence.g_lm),
        "ranks": _ranks(measures["cached_rank"]),
        "spread": _spread(evidence.g_lm, evidence.spread),
        "shapes": _shapes(measures),
        "plots": [
            drawn
            for plot in invariance_plots(limits_of(certificate["thresholds"]))
            if (
                drawn := draw(
                    plot, {m: sorted(evidence.histories[m]) for m in plot.metrics if evidence.histories.get(m)}, steps
                )
            )
        ],
        "orders": measures["order_parameter"],
        "samples": evidence.samples,
        "notes": evidence.notes,
        "terms": explained(*TERMS),
    }


def _tiles(certificate: Tree) -> list[Tree]:
    """The numbers most asked for: of a failed certificate what failed, and nothing that sounds like a success."""
    measures, losses = certificate["measures"], certificate["measures"]["losses"]
    passed = certificate["verdict"] == "certified"
    tiles = [
        {"value": one["value"], "label": f"{one['label']}; required {one['required']}", "bad": True}
        for one in [one for one in failures(certificate) if one["why"]][:4]
    ]
    if passed:
        tiles = [
            {"value": found["tier"], "label": f"tier in {name}: deviation {number(found['relative_deviation_g'])}"}
            for name, found in certificate["precision"].items()
        ]
        if certificate["tier"] == "proven":
            bound = number(rounded_up(measures["proof"]["bound"]))
            tiles.insert(0, {"value": "proven", "label": f"for every input: deviation at most {bound}"})
    count, length = certificate["prompts"]["kinds"]["text"]
    tiles.append({"value": f"{count} x {length}", "label": "held-out prompts x tokens"})
    if losses:
        tiles.append({"value": f"{losses['cached']:.4f}", "label": "held-out loss, cached (nats)"})
    if losses and passed:
        gap = next(check["value"] for check in certificate["checks"] if check["measure"] == "cache_gap")
        tiles.append({"value": number(gap), "label": "cost of caching (nats)"})
    if measures["greedy"] and passed:
        greedy = measures["greedy"]
        tiles.append(
            {"value": f"{greedy['per_decision']:.2%}", "label": f"of {greedy['decisions']:,} greedy tokens agree"}
        )
    if certificate["lineage"].get("invariance_budget") is not None:
        tiles.append({"value": f"{certificate['lineage']['invariance_budget']:.2f}", "label": "invariance budget"})
    return tiles


def _losses(losses: Tree, twin: Tree) -> list[Tree]:
    """A row per G_LM: its loss, and a bar for the gap to the live loss."""
    if not losses:
        return []
    rows = [
        {"label": text, "loss": losses[name], "name": name}
        for name, text in LOSS_LABELS.items()
        if losses.get(name) is not None
    ]
    if twin["loss"] is not None:
        rows.append({"label": "the SDPA twin: its own training without G_LM", "loss": twin["loss"], "name": "twin"})
    highest = max(abs(row["loss"] - losses["block"]) for row in rows) or 1.0
    for row in rows:
        row["gap"] = row["loss"] - losses["block"]
        row["bar"] = round(100 * abs(row["gap"]) / highest, 1)
    return rows


def _spectra(g_LHKK: Tensor) -> list[Tree]:
    """Singular values over the largest, a line per head, a plot per layer."""
    out = []
    for layer, g_HKK in enumerate(g_LHKK):
        if not g_HKK.isfinite().all():
            continue
        values_HK = torch.linalg.svdvals(g_HKK.double())
        values_HK = values_HK / values_HK[:, :1].clamp_min(torch.finfo(torch.float64).tiny)
        curves = {
            f"head {head}": [(i, max(value, 1e-12)) for i, value in enumerate(row)]
            for head, row in enumerate(values_HK.tolist())
        }
        plot = Plot(
            f"Layer {layer}", (), "singular value / largest", log=True, along="rank of the singular value, from 0"
        )
        if drawn := draw(plot, curves, g_HKK.shape[-1] - 1):
            out.append(drawn)
    return out


def _ranks(rank: Tree | None) -> list[str]:
    """Effective rank of the cached G_LM by layer: mean and range over the heads."""
    if rank is None:
        return []
    return [f"{sum(row) / len(row):.1f} ({min(row)}-{max(row)})" for row in rank["effective"]]


def _spread(g_LHKK: Tensor, spread_LHKK: Tensor) -> list[list[str]]:
    """Standard deviation over the extraction's prompts, divided by the head's RMS, [L][H]."""

    def rms(x: Tensor) -> Tensor:
        return x.double().square().mean(dim=(-2, -1)).sqrt()

    share_LH = rms(spread_LHKK) / rms(g_LHKK).clamp_min(torch.finfo(torch.float64).tiny)
    return [[number(x) for x in row] for row in share_LH.tolist()]


def _shapes(measures: Tree) -> list[Tree]:
    """Row-variance ratio, log|det| and rank of every tensor, layer and head."""
    rows = []
    for tensor, det in measures["log_abs_det"].items():
        rank, variance = measures["rank"][tensor], measures["row_variance_ratio_A"] if tensor == "A" else None
        for layer, means in enumerate(det["mean"]):
            for head, mean in enumerate(means):
                rows.append(
                    {
                        "tensor": tensor,
                        "layer": layer,
                        "head": head,
                        "log_det": mean,
                        "log_det_std": det["std"][layer][head],
                        "singular": det["singular"][layer][head],
                        "rank": [rank[key][layer][head] for key in ("low", "mean", "high")],
                        "of": rank["of"],
                        "row_variance": variance and variance["mean"][layer][head],
                    }
                )
    return rows
