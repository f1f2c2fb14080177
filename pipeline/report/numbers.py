"""Numbers as the pages show them: few digits, no exponent with a leading zero, units for large counts."""

from __future__ import annotations

import math
from typing import Any

UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
MLFLOW_INFINITY = 1e300  # MLflow stores infinity as 1.8e308


def number(value: Any) -> str:
    """A measure: short; a dash for a missing one."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if abs(value) > MLFLOW_INFINITY:
        return "infinite"
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e6):
        return f"{int(value):,}"
    if abs(value) < 1e-2 or abs(value) >= 1e5:
        return scientific(value)
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def beside(value: float | None, threshold: float) -> str:
    """A measured value for a line that also names its threshold: three digits, or as many as tell the two apart; a count in
    full."""
    if value is None:
        return "not measured"
    if value == int(value) and abs(value) < 1e9:
        return str(int(value))
    digits = next((n for n in range(3, 10) if value == threshold or float(f"{value:.{n}g}") != threshold), 9)
    return f"{value:.{digits}g}"


def fixed(value: float, digits: int) -> str:
    """With this many decimals, where that is not a long number."""
    return f"{value:.{digits}f}" if abs(value) < 1e5 else number(value)


def scientific(value: float, digits: int = 1) -> str:
    """1e-5, 4.7e-8."""
    mantissa, _, exponent = f"{value:.{digits}e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"


def short(count: float) -> str:
    """A count: three digits and a decimal unit, for ten thousand and more."""
    if abs(count) < 10_000:
        return f"{count:,.4g}" if isinstance(count, float) else f"{count:,}"
    for unit, name in UNITS:
        if abs(count) >= unit * 0.9995:
            return f"{count / unit:.3g} {name}" if abs(count) < 999.5 * unit else f"{scientific(count)}"
    raise AssertionError(count)


def size(number_of_bytes: int) -> str:
    """Bytes: exact when few."""
    return f"{short(number_of_bytes)}B" if number_of_bytes >= 10_000 else f"{number_of_bytes:,} bytes"


def tick(value: float, *, log: bool) -> str:
    """The label of an axis: of a logarithmic one `value` is the exponent."""
    if log:
        return f"{10**value:g}" if -1 <= value <= 3 else scientific(10**value, 0)
    return short(value) if abs(value) >= 10_000 else number(value) if value and abs(value) < 1e-3 else f"{value:.4g}"
