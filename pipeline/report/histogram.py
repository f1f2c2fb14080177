"""Length histograms as bars for SVG: only the geometry, templates draw it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

WIDTH, BASE, HEIGHT = 332.0, 125.0, 100.0  # of the bars, in the SVG's units
LEFT = 12.0
Tree = dict[str, Any]


def charts(rows: dict[str, dict[str, Tree]], splits: Sequence[str]) -> list[Tree]:
    """A row for each title -> split -> facts, with a chart for each of `splits` that has a non-empty `length_histogram`."""
    return [{"title": title, "charts": _row(facts, splits)} for title, facts in rows.items()]


def _row(facts: dict[str, Tree], splits: Sequence[str]) -> list[Tree]:
    """All charts over the same lengths, so that they can be compared."""
    histograms = {name: facts.get(name, {}).get("length_histogram") or [] for name in splits}
    used = [number for histogram in histograms.values() for number, count in enumerate(histogram) if count]
    if not used:
        return []
    first, last = min(used), max(used)
    return [
        {"split": name, "total": sum(histogram), "median": median(histogram), "bars": bars(histogram, first, last)}
        for name, histogram in histograms.items()
        if any(histogram)
    ]


def bars(histogram: list[int], first: int, last: int) -> list[Tree]:
    """Bars of the bins first..last, and one more without height whose label is the end of the last bin.

    Bin i counts documents with 2**i <= length < 2**(i+1).
    """
    total, highest = sum(histogram), max(histogram)
    step = WIDTH / (last - first + 1)
    width = min(step - 3, 46.0)
    labelled = 1 + (last - first) // 11  # one label per this many bins, so that labels do not touch
    out = []
    for number in range(first, last + 2):
        count = histogram[number] if number < min(len(histogram), last + 1) else 0
        height = max(HEIGHT * count / highest, 1.0) if count else 0.0
        x = LEFT + (number - first) * step
        out.append(
            {
                "x": round(x, 1),
                "y": round(BASE - height, 1),
                "middle": round(x + width / 2, 1),
                "width": round(width, 1),
                "height": round(height, 1),
                "title": f"{2**number:,} to {2 ** (number + 1) - 1:,}: {count:,} documents",
                "share": share(count, total) if last - first < 14 else "",
                "label": power(number) if (number - first) % labelled == 0 else "",
            }
        )
    return out


def share(count: int, total: int) -> str:
    """Percent without decimals; "<1%" for a small count that would round to zero."""
    return "" if not count else "<1%" if count * 200 < total else f"{count / total:.0%}"


def median(histogram: list[int]) -> str:
    """The upper end of the bin with the median."""
    half, seen = sum(histogram) / 2, 0
    for number, count in enumerate(histogram):
        seen += count
        if seen >= half:
            return power(number + 1)
    return ""


def power(exponent: int) -> str:
    """2**exponent, short: 512, 4k, 2M (k is 1024)."""
    unit = min(exponent // 10, 4)
    return f"{2 ** (exponent - 10 * unit)}{['', 'k', 'M', 'G', 'T'][unit]}"
