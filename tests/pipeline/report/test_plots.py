"""Plots: curves that lose no spike, round ticks, and gaps for values that are not numbers."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from pipeline.report.plots import MAX_POINTS, Plot, draw, thinned, ticks


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5000))
def test_thinning_keeps_the_extremes_and_the_order(values: list[float]) -> None:
    points = list(enumerate(values))
    kept = thinned(points)
    assert set(kept) <= set(points) and kept == sorted(kept) and len(kept) <= 3 * MAX_POINTS
    assert {max(v for _, v in kept), min(v for _, v in kept)} == {max(values), min(values)}


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_and_inside(low: float, width: float) -> None:
    marks = ticks(low, low + width, whole=False)
    assert 1 <= len(marks) <= 7 and all(low - 1e-6 * width <= m <= low + width * (1 + 1e-6) + 1e-6 for m in marks)


def test_values_that_are_not_numbers_are_gaps() -> None:
    points = [(1, 1.0), (2, 2.0), (3, math.nan), (4, 1.7976931348623157e308), (5, 1.0), (6, 0.0), (7, 3.0), (8, 2.0)]
    drawn = draw(Plot("t", ("a",)), {"a": points}, 8)
    assert drawn is not None and [len(piece.split()) for piece in drawn["lines"][0]["pieces"]] == [2, 4]
    logarithmic = draw(Plot("t", ("a",), log=True), {"a": points}, 8)
    assert logarithmic is not None
    line = logarithmic["lines"][0]
    assert [len(piece.split()) for piece in line["pieces"]] == [2, 2] and len(line["dots"]) == 1
    assert draw(Plot("t", ("a",), log=True), {"a": [(1, 0.0)]}, 8) is None and draw(Plot("t", ("a",)), {}, 8) is None
    flat = draw(Plot("t", ("a",)), {"a": [(1, 5.0), (2, 5.0)]}, 2)
    assert flat is not None and flat["lines"][0]["newest"] == "5"
