"""The scores as lines for a terminal of 100 columns."""

from __future__ import annotations

from typing import Any

Tree = dict[str, Any]
COLUMNS = (("task", 16), ("metric", 10), ("cached", 8), ("± stderr", 8), ("live", 8), ("difference", 10), ("± paired", 8),
           ("chance", 7), ("n", 6))  # fmt: skip


def table(results: Tree) -> list[str]:
    """A line per task, and notes below. Accuracies in percent; a perplexity as it is."""
    lines = [_line([name for name, _ in COLUMNS])]
    for task, one in results["tasks"].items():
        lines.append(_line([task, *_row(one)]))
        if "perplexity" in one["metrics"]:
            lines.append(_line(["", *_row({**one["metrics"]["perplexity"], "metric": "perplexity", "chance": None})]))
    return [*lines, *notes(results)]


def _row(one: Tree) -> list[str]:
    metric = one["metric"]
    names = ("cached", "cached_stderr", "live", "difference", "stderr", "chance")
    return [metric, *(shown(metric, one[name], signed=name == "difference") for name in names), f"{one['n']:,}"]


def shown(metric: str, value: float | None, *, signed: bool = False) -> str:
    """A score: accuracies in percent, with two decimals."""
    if value is None:
        return "-"
    if metric == "acc" or metric.startswith("acc_"):
        text = f"{100 * value:+.2f}" if signed else f"{100 * value:.2f}"
    else:
        text = f"{value:+,.3g}" if signed else f"{value:,.4g}"
    return text.lstrip("+-") if signed and not float(text.replace(",", "")) else text


def _line(cells: list[str]) -> str:
    widths = [width for _, width in COLUMNS]
    texts = [cells[0][: widths[0]].ljust(widths[0]), cells[1][: widths[1]].ljust(widths[1])]
    return "  ".join([*texts, *(cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True))]).rstrip()


def notes(results: Tree) -> list[str]:
    """What a reader of the scores has to know, a sentence each."""
    found = []
    if results["no_live"]:
        found.append(f"no live scores: {results['no_live']}")
    if results["leak"]:
        found.append(results["leak"])
    changes = [one["max_logprob_difference"] for one in results["tasks"].values()]
    if changes and None not in changes:
        found.append(f"log-likelihoods of answers differ by at most {max(changes):.1e}, cached and live")
    moved = {task: one["changed"] for task, one in results["tasks"].items() if one["changed"]}
    if moved and results["certified"]:
        found.append(
            f"the model is certified, yet items changed: {', '.join(f'{n} of {task}' for task, n in moved.items())}"
        )
    out = {task: one for task, one in results["tasks"].items() if one["left_out"]}
    if out:
        each = ", ".join(f"{task} {one['left_out']:,} of {one['left_out'] + one['n']:,}" for task, one in out.items())
        length = results["source"]["context_length"]
        found.append(f"items with an answer longer than the model's {length} tokens were left out: {each}")
    cut = {task: one for task, one in results["tasks"].items() if one["cut_contexts"]}
    if cut:
        each = ", ".join(f"{task} {one['cut_contexts']:,} of {one['requests']:,}" for task, one in cut.items())
        found.append(
            f"contexts longer than the model's {results['source']['context_length']} tokens lost their beginning: {each}"
        )
    if results["limit"] is not None:
        found.append(f"only the first {results['limit']:,} items of each task were scored")
    found += [f"{task} was not scored: {why}" for task, why in results["failed"].items()]
    return found
