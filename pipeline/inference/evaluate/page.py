"""evaluation.html: the scores for people, beside chance and published models, and what they do not say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.inference.evaluate.table import notes, shown
from pipeline.io.storage import publish_bytes
from pipeline.report.html import render
from pipeline.report.links import EVALUATION, Link
from pipeline.report.numbers import number
from pipeline.report.terms import explained

TERMS = ("live, cached", "acc", "acc_norm", "acc_bytes", "mc1, mc2", "perplexity", "paired standard error", "chance",
         "leak gain", "proven")  # fmt: skip
FAR = 2.0  # standard errors from chance, from which on a score says something
Tree = dict[str, Any]


def write_page(results: Tree, pages: Sequence[Link], folder: Path) -> Path:
    """Write the page of these results into `folder`."""
    target = folder / Path(EVALUATION).name
    html = render(Path(__file__).with_name("evaluation.html"), content(results, pages), {"num": number})
    publish_bytes(target, html.encode("utf-8", errors="replace"))
    return target


def content(results: Tree, pages: Sequence[Link]) -> Tree:
    """Everything the page shows, as plain values."""
    tasks = [_task(name, one) for name, one in results["tasks"].items()]
    return {
        "r": results,
        "pages": pages,
        "verdict": _verdict(results),
        "warnings": notes({**results, "no_live": None, "leak": None, "tasks": {}}) + _cut(results),
        "tiles": _tiles(results),
        "tasks": tasks,
        "at_chance": [task["name"] for task in tasks if task["at_chance"]],
        "leaks": results["leak"] is not None,
        "published": _published(results),
        "metrics": [
            {"task": name, **_cells(metric, values)}
            for name, one in results["tasks"].items()
            for metric, values in one["metrics"].items()
        ],
        "terms": explained(*TERMS),
    }


def _verdict(results: Tree) -> Tree:
    """What the comparison of cached and live says: a heading and a sentence."""
    tasks = results["tasks"]
    if not tasks:
        return {"kind": "no", "title": "Nothing was scored", "why": "See the reasons below."}
    if results["no_live"]:
        return {"kind": None, "title": "Scores with the cached G_LM", "why": f"No live scores: {results['no_live']}."}
    changed = sum(one["changed"] for one in tasks.values())
    items = sum(one["n"] for one in tasks.values())
    apart = max(one["max_logprob_difference"] or 0.0 for one in tasks.values())
    facts = (
        f"Of {items:,} items {changed or 'none'} changed. The log-likelihood of any answer changed by at most "
        f"{number(apart)} nats."
    )
    if not results["certified"]:
        gains = [one["leak_gain"] for one in tasks.values() if one["leak_gain"] is not None]
        above = f"Live scores are above the cached ones in {sum(gain > 0 for gain in gains)} of {len(gains)} tasks."
        why = f"{results['leak'][0].upper()}{results['leak'][1:]}. {above} {facts}"
        return {"kind": "no", "title": "Not certified: a live score may have seen the answer", "why": why}
    if changed:
        return {
            "kind": "no",
            "title": "Scores change with the cache",
            "why": f"{facts} The model is certified, so this needs an explanation: round-off at ties, or a wrong G_LM.",
        }
    return {"kind": "yes", "title": "Scores remain unchanged with the cached G_LM", "why": facts}


def _cut(results: Tree) -> list[str]:
    alone = {**results, "no_live": None, "leak": None, "limit": None, "failed": {}}
    return [note for note in notes(alone) if note.startswith(("contexts", "items with"))]


def _tiles(results: Tree) -> list[Tree]:
    tasks = results["tasks"].values()
    tiles = [
        {"value": f"{len(results['tasks'])}", "label": "tasks, zero-shot"},
        {"value": f"{sum(one['n'] for one in tasks):,}", "label": "items"},
        {"value": number(results["source"]["parameters"]), "label": "parameters"},
        {"value": f"{results['source']['context_length']:,}", "label": "tokens of context"},
    ]
    apart = [abs(one["difference"]) for one in tasks if one["difference"] is not None and one["metric"][:3] == "acc"]
    if apart:
        largest = number(float(f"{100 * max(apart):.2g}"))
        tiles.append({"value": largest, "label": "points: largest difference of an accuracy, cached and live"})
    return tiles


def _cells(metric: str, values: Tree) -> Tree:
    """A row's numbers as texts."""
    texts = {
        name: shown(metric, values[name], signed=name == "difference")
        for name in ("cached", "cached_stderr", "live", "live_stderr", "difference", "stderr")
    }
    return {"metric": metric, **texts, "n": f"{values['n']:,}", "changed": values["changed"]}


def _task(name: str, one: Tree) -> Tree:
    metric, chance = one["metric"], one["chance"]
    share = one["cached"] if metric == "acc" or metric.startswith("acc_") else None
    error = one["cached_stderr"] or 0.0
    return {
        "name": name,
        **_cells(metric, one),
        "leak_gain": shown(metric, one["leak_gain"], signed=True),
        "chance": shown(metric, chance),
        "bar": None if share is None else round(100 * share, 2),
        "tick": None if share is None or chance is None else round(100 * chance, 2),
        "at_chance": share is not None and chance is not None and abs(share - chance) <= FAR * error,
        "documents": one["documents"],
        "data": one["data_sha256"],
        "definition": one["definition_sha256"],
    }


def _published(results: Tree) -> Tree:
    """Published models beside this one, for the tasks that both have."""
    published: Tree = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    ours = {name: 100 * one["cached"] for name, one in results["tasks"].items() if one["cached"] is not None}
    names = [name for name in ours if any(name in row["scores"] for row in published["rows"])]
    rows = [
        {
            "task": name,
            "ours": f"{ours[name]:.2f}",
            "stderr": shown("acc", results["tasks"][name]["cached_stderr"]),
            "chance": shown("acc", results["tasks"][name]["chance"]),
            "theirs": [f"{row['scores'][name]:.2f}" if name in row["scores"] else "-" for row in published["rows"]],
        }
        for name in names
    ]
    whole = all(name in ours for name in published["average_of"])
    average = sum(ours[name] for name in published["average_of"]) / len(published["average_of"]) if whole else None
    return {**published, "table": rows, "average": None if average is None else f"{average:.2f}"}
