"""Means and differences of a comparison as numbers and as text, on a linear or on a logarithmic scale (compare.log)."""

from __future__ import annotations

import math

from pipeline.report.numbers import scientific
from pipeline.sweep.compare import Interval


def bounds(interval: Interval, *, log: bool) -> tuple[float, float, float]:
    """Lower end, mean and upper end: of a logarithmic one, of the numbers themselves, or of ratios."""
    half = interval.half or 0.0
    ends = (interval.mean - half, interval.mean, interval.mean + half)
    return (math.exp(ends[0]), math.exp(ends[1]), math.exp(ends[2])) if log else ends


def mean(interval: Interval, *, log: bool) -> str:
    """`4.172 ± 0.003`, or `2e-6 x/÷ 1.4`."""
    return f"{short(math.exp(interval.mean))}{_factor(interval)}" if log else with_half(interval)


def difference(interval: Interval, *, log: bool) -> str:
    """`-0.012 ± 0.004`, or `factor 2.3e-5 x/÷ 1.4`."""
    return f"factor {mean(interval, log=True)}" if log else with_half(interval, sign=True)


def size(interval: Interval, *, log: bool) -> str:
    """Of a difference, without its direction: `0.0120 ± 0.0040`, or `a factor of 43000 x/÷ 1.4`."""
    without = Interval(interval.n, abs(interval.mean), interval.half)
    return f"a factor of {mean(without, log=True)}" if log else with_half(without)


def with_half(interval: Interval, *, sign: bool = False) -> str:
    """`4.172 ± 0.003`: two digits of the half width, and as many of the mean."""
    if interval.half is None:
        return alone(interval.mean, sign=sign)
    if interval.half == 0 or not 1e-4 <= interval.half < 1e4:
        return f"{alone(interval.mean, sign=sign)} ± {alone(interval.half)}"
    digits = max(0, 1 - math.floor(math.log10(interval.half)))
    return f"{interval.mean:{'+' if sign else ''}.{digits}f} ± {interval.half:.{digits}f}"


def alone(value: float, *, sign: bool = False) -> str:
    """A number without an interval."""
    plus = "+" if sign and value > 0 else ""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{plus}{value:.4f}" if abs(value) < 100 else f"{plus}{value:.1f}"
    return plus + scientific(value)


def short(value: float) -> str:
    """Two digits."""
    return f"{value:.2g}" if 1e-2 <= value < 100 else scientific(value)


def _factor(interval: Interval) -> str:
    """What a logarithmic interval multiplies and divides by."""
    if interval.half is None:
        return ""
    return f" x/÷ {short(math.exp(interval.half)) if interval.half < 300 else 'any factor'}"
