"""A comparison in words and in cells, for the terminal, the pages and Markdown alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.report.numbers import number
from pipeline.sweep import amounts
from pipeline.sweep.compare import Compared
from pipeline.sweep.config import CompareConfig, Scalar

EDGE = "*"  # behind a best value that is the smallest or largest tried
AT_EDGE = f"{EDGE} the smallest or largest tried: a better one may lie outside."


def headings(compare: CompareConfig) -> list[str]:
    """Of the table's columns."""
    best = [] if compare.tune is None else [f"best {last(compare.tune)}"]
    order = [] if compare.value == "order_parameter" else ["order parameter"]
    return ["variant", f"against {compare.baseline}", compare.value, "n", *best, *order, "seconds"]


def cells(line: Compared, compare: CompareConfig) -> list[str]:
    """A line of the table."""
    best = [] if compare.tune is None else [shown(line.best) + EDGE * line.at_edge]
    seconds = "-" if line.train_seconds is None else f"{line.train_seconds:.0f}"
    order = [] if compare.value == "order_parameter" else [number(line.order_parameter)]
    numbers = [amounts.mean(line.value, log=compare.log), counted(line), *best, *order, seconds]
    return [line.variant, verdict(line, compare), *numbers]


def counted(line: Compared) -> str:
    """`3`, or `2 of 3` where a child at the best value has no result."""
    ended = line.value.n + len(line.missing)
    return f"{line.value.n}" if not line.missing else f"{line.value.n} of {ended}"


def verdict(line: Compared, compare: CompareConfig) -> str:
    """How a variant compares with the baseline: `below by 0.0120 ± 0.0040 (3 seeds)`."""
    if line.variant == compare.baseline:
        return "the baseline"
    if line.difference is None:
        return "no pair with the baseline yet"
    difference, pairs = line.difference, pairs_of(line.difference.n, compare)
    side, amount = "below" if difference.mean < 0 else "above", amounts.size(difference, log=compare.log)
    if difference.half is None:
        return f"{side} by {amount} in one pair: no interval" if difference.mean else "equal in one pair"
    if difference.mean == difference.half == 0:
        return f"equal ({pairs})"
    if is_told_apart(line):
        return f"{side} by {amount} ({pairs})"
    return f"cannot be told apart: {amounts.difference(difference, log=compare.log)} ({pairs})"


def is_told_apart(line: Compared) -> bool:
    """Whether the interval of a variant's difference to the baseline leaves out 0."""
    return (
        line.difference is not None
        and line.difference.half is not None
        and abs(line.difference.mean) > line.difference.half
    )


def pairs_of(n: int, compare: CompareConfig) -> str:
    """`3 seeds`."""
    word = "seed" if compare.pairs == "seed" else "pair"
    return f"{n} {word}{'' if n == 1 else 's'}"


def comparison_lines(lines: Sequence[Compared], compare: CompareConfig) -> list[str]:
    """The comparison for a terminal."""
    table = [headings(compare), *(cells(line, compare) for line in lines)]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    shown_lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in table
    ]
    return [*shown_lines, *([AT_EDGE] if any(line.at_edge for line in lines) else [])]


def conclusions(lines: Sequence[Compared], compare: CompareConfig) -> list[str]:
    """The comparison in two to four sentences: what is below the baseline, what above, what cannot be told apart."""
    rest = [line for line in lines if line.variant != compare.baseline]
    told = [line for line in rest if is_told_apart(line)]
    below = sorted((line for line in told if _mean(line) < 0), key=_mean)
    above = sorted((line for line in told if _mean(line) > 0), key=_mean)
    measured = [line for line in rest if line.difference is not None and line.difference.half is not None]
    same = [line for line in measured if line not in told]
    single = [line for line in rest if line not in measured]

    def named(found: Sequence[Compared]) -> str:
        pairs = [(line.variant, line.difference) for line in found if line.difference is not None]
        return ", ".join(f"{name} ({amounts.difference(one, log=compare.log)})" for name, one in pairs)

    found = [
        (below, f"Below {compare.baseline}: {named(below)}."),
        (above, f"Above {compare.baseline}: {named(above)}."),
        (same, f"Cannot be told apart from {compare.baseline}: {named(same)}."),
        (single, f"With one pair or none, so without an interval: {', '.join(line.variant for line in single)}."),
    ]
    if measured and not below:
        found.insert(0, (measured, f"No variant is below {compare.baseline}."))
    return [text for lines_of, text in found if lines_of]


def costs(lines: Sequence[Compared], compare: CompareConfig) -> str:
    """The seconds of training as multiples of the baseline's; empty where that is not known."""
    known = {line.variant: line.train_seconds for line in lines if line.train_seconds}
    base = known.pop(compare.baseline, None)
    if base is None or not known:
        return ""
    ratios = sorted((seconds / base, variant) for variant, seconds in known.items())
    return (
        f"{compare.baseline} {base:.0f} s; " + ", ".join(f"{variant} x {ratio:.2f}" for ratio, variant in ratios) + "."
    )


def unknown(lines: Sequence[Compared], compare: CompareConfig, to_come: int) -> list[str]:
    """What the comparison leaves open, a sentence each."""
    edges = [line.variant for line in lines if line.at_edge]
    missing = [name for line in lines for name in line.missing]
    measured = [line.difference for line in lines if line.difference is not None and line.difference.half is not None]
    fewest = min((difference.n for difference in measured), default=0)
    texts, kind = [], "positive" if compare.log else "finite"
    if to_come:
        texts.append(f"{to_come} children are still to run: everything here is so far.")
    if edges:
        texts.append(
            f"Best {compare.tune} at the edge of those tried: {', '.join(edges)}. A better one may lie outside."
        )
    if missing:
        texts.append(f"Failed, or without a {kind} {compare.value}, and not in the means: {', '.join(missing)}.")
    if measured:
        widest = max(difference.half or 0.0 for difference in measured)
        unseen = (
            f"ratio of up to {amounts.short(math.exp(widest))}" if compare.log else f"difference of up to {widest:.2g}"
        )
        texts.append(
            f"A {unseen} can go unseen: so wide is the widest interval, with {pairs_of(fewest, compare)} at least."
        )
    if len(measured) > 1:
        texts.append(
            f"{len(measured)} variants are compared, each with a 95 % interval of its own: where none differed, one in twenty "
            "would seem to."
        )
    return texts


def shown(scalar: Scalar) -> str:
    """A value of the grid."""
    return f"{scalar:g}" if isinstance(scalar, float) else str(scalar)


def last(key: str) -> str:
    """`max_lr` of `train.max_lr`."""
    return key.rpartition(".")[2]


def _mean(line: Compared) -> float:
    return line.difference.mean if line.difference is not None else 0.0
