"""Numbers of the pages."""

from __future__ import annotations

import math

from pipeline.report.numbers import number, scientific, short, size, tick


def test_numbers_are_short_and_never_nan() -> None:
    assert [number(x) for x in (None, math.nan, math.inf, 0, 128.0, 1e-5, 4.63e-8, 0.41553, 4.0)] == [
        "-", "-", "-", "0", "128", "1e-5", "4.6e-8", "0.4155", "4",
    ]  # fmt: skip


def test_counts_have_three_digits_and_a_unit() -> None:
    counts = (0, 9_999, 10_000, 999_500, 1_536_000, 8 * 10**12, 5 * 10**20)
    assert [short(count) for count in counts] == ["0", "9,999", "10 k", "1 M", "1.54 M", "8 T", "5e20"]
    assert (size(12), size(5_318_858)) == ("12 bytes", "5.32 MB")


def test_labels_of_axes() -> None:
    assert [tick(power, log=True) for power in (-8, -2, -1, 0, 3, 4)] == ["1e-8", "1e-2", "0.1", "1", "1000", "1e4"]
    assert [tick(value, log=False) for value in (0.0, 0.0002, -0.5, 1500, 2.5e6)] == [
        "0",
        "2e-4",
        "-0.5",
        "1500",
        "2.5 M",
    ]
    assert (scientific(1e-5), scientific(4.7e-8), number(1.797e308)) == ("1e-5", "4.7e-8", "infinite")
