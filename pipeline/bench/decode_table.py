"""The result of `pldr bench decode` as a Markdown table: what docs/speed.md shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

LABELS = {
    "sdpa": "SDPA twin, fp32",
    "bundle": "bundle, fp32",
    "live": "live model, cached G, fp32",
    "low_rank": "bundle, low-rank keys, fp32",
    "bf16": "bundle, bf16",
    "int8": "bundle, int8",
    "int4": "bundle, int4",
}


def table(result: Mapping[str, Any]) -> Iterator[str]:
    """Line by line: where and how, steps by batch and cached tokens, long caches, then what has no columns."""
    found, gb = result["machine"], {name: value / 1e9 for name, value in result["bandwidth"].items()}
    yield (
        f"{found['date']}, {found['device']}, {found['cores']} cores, load {found['load_average']}, threads: "
        f"{found['threads']}, torch {found['torch']}; {result['parameters'] / 1e6:.1f}M parameters, {result['rounds']} rounds; "
        f"reading {gb['read']:.1f} GB/s, copying {gb['copy']:.1f} GB/s"
    )
    yield from (f"left out: {line}" for line in result["left_out"])
    cells = [
        (size, length, cell) for size, by_prompt in result["by_batch"].items() for length, cell in by_prompt.items()
    ]
    heads = [f"{size} x {length}" for size, length, _ in cells]
    yield ""
    yield "tokens/s (beside the SDPA twin) by rows x cached tokens; of the first column also the ratio of CPU seconds, which a"
    yield "busy machine moves less, and the share of the floor"
    yield ""
    yield from _rows(
        ["", "weights, MB", *heads, "CPU seconds", "of the floor"], _step_rows(result, [cell for *_, cell in cells])
    )
    if result["cached"]:
        yield ""
        yield "long caches, one row: tokens/s (beside full keys)"
        yield ""
        yield from _rows(["", *(f"{int(length):,}" for length in result["cached"])], _long_rows(result["cached"]))
    yield ""
    yield from _rest(result)


def _step_rows(result: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    for name, megabytes in result["weights_mb"].items():
        speeds = [f"{cell[name]['tokens_per_second']:,.4g} ({cell[name]['ratio_to_sdpa']:.2f})" for cell in cells]
        first = cells[0][name]
        shares = [f"{first['cpu_ratio_to_sdpa']:.2f}", f"{first['share_of_floor']:.0%}"]
        yield [LABELS[name], f"{megabytes:,.4g}", *speeds, *shares]


def _long_rows(cached: Mapping[str, Mapping[str, Any]]) -> Iterator[list[str]]:
    for name in next(iter(cached.values())):
        cells = [cell[name] for cell in cached.values()]
        yield [LABELS[name], *(f"{c['tokens_per_second']:,.4g} ({c['ratio_to_full']:.2f})" for c in cells)]


def _rest(result: Mapping[str, Any]) -> Iterator[str]:
    if "batch_speedup" in result:
        yield f"{result['largest_batch']} rows together are {result['batch_speedup']:.1f} times as fast as one"
    for size, one in result["sampling"].items():
        yield (
            f"sampling, {size} rows: a step of {1e3 * one['greedy_step_s']:.2f} ms greedy, "
            f"{1e3 * one['sampled_step_s']:.2f} ms sampled ({one['cost']:+.0%})"
        )
    speculation = ", ".join(f"{ratio:.2f} on {text} text" for text, ratio in result["speculation"].items())
    yield f"prompt lookup, times as fast: {speculation}"
    gain = result["huge_pages_gain"]
    yield (
        "huge pages: none here"
        if gain is None
        else f"huge pages: the fp32 products of a step are {gain:.2f} times as fast"
    )


def _rows(head: Sequence[str], rows: Iterator[list[str]]) -> Iterator[str]:
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(row)} |"
