"""Plots: curves that lose no spike, round ticks, and gaps for values that are not numbers."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from pipeline.report.plots import BOTTOM, HEIGHT, MAX_POINTS, TOP, Limit, Plot, draw, thinned, ticks


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


def test_a_threshold_is_drawn_inside_the_plot_also_where_no_curve_comes_near_it() -> None:
    plot = Plot("t", ("a",), "share", log=True, limits=(Limit(1e-5, "allowed"), Limit(-1.0, "has no place")))
    drawn = draw(plot, {"a": [(1, 0.5), (2, 0.3)]}, 2)
    assert drawn is not None and [limit["label"] for limit in drawn["limits"]] == ["allowed"]
    assert drawn["limits"][0]["y"] == HEIGHT - BOTTOM and drawn["unit"] == "share, logarithmic"
    budget = draw(Plot("t", ("a",), limits=(Limit(9.0, "9"),)), {"a": [(0, 0.0), (2, 0.1)]}, 2)
    assert budget is not None and budget["limits"][0]["y"] == TOP
    assert [label for _, label in drawn["marks"]] == ["1e-5", "1e-4", "1e-3", "1e-2", "0.1", "1"]


def test_the_label_of_a_threshold_stays_away_from_the_curve() -> None:
    rising = [(step, step / 10) for step in range(101)]
    sides = {}
    for name, curve in (("rising", rising), ("falling", [(100 - step, value) for step, value in reversed(rising)])):
        drawn = draw(Plot("t", ("a",), limits=(Limit(9.0, "9"),)), {"a": curve}, 100)
        assert drawn is not None
        sides[name] = drawn["limits"][0]["left"]
    assert sides == {"rising": True, "falling": False}


def test_curves_that_hide_one_another_are_named() -> None:
    loss = [(step, 5.0 - step / 100) for step in range(0, 101, 10)]
    near = [(step, value + 1e-4) for step, value in loss if step % 20 == 0]
    drawn = draw(Plot("t", ("a", "b", "c")), {"a": loss, "b": near, "c": [(0, 4.0), (100, 4.9)]}, 100)
    assert drawn is not None and drawn["same"] == ["b lies on a: they differ by 1e-4 at most."]
    assert [line["style"] for line in drawn["lines"]] == [0, 1, 2]
    equal = draw(Plot("t", ("a", "b"), from_zero=True), {"a": [(0, 0.0), (9, 0.0)], "b": [(0, 0.0), (9, 0.0)]}, 9)
    assert equal is not None and equal["same"] == ["b lies on a: they are equal."]
    assert [label for _, label in equal["marks"]] == ["0", "1"]
    ratio = draw(Plot("t", ("a", "b"), log=True), {"a": [(0, 1.0), (9, 1e-8)], "b": [(0, 1.0), (9, 1.01e-8)]}, 9)
    assert ratio is not None and ratio["same"] == ["b lies on a: they differ by a factor of 1.01 at most."]
    both = {"a": [(0, 1.0), (9, 0.1)], "b": [(0, 1.0), (9, 0.1)], "c": [(0, 1.0), (9, 0.1)]}
    three = draw(Plot("t", ("a",), log=True), both, 9)
    assert three is not None and three["same"] == ["b, c lie on a: they are equal."]


def test_labels_do_not_repeat_or_cover_one_another() -> None:
    drawn = draw(Plot("t", ("a",), limits=(Limit(6.0, "6"), Limit(9.0, "9"))), {"a": [(0, 0.0), (9, 60.0)]}, 9)
    assert drawn is not None
    six, nine = drawn["limits"]
    assert nine["text_y"] < nine["y"] < six["y"] < six["text_y"]
    late = draw(Plot("t", ("a",), "share", limits=(Limit(9.0, "9"),)), {"a": [(6, 1.0), (9, 2.0)]}, 9)
    assert late is not None and late["limits"][0]["left"]
    assert late["limits"][0]["text_y"] > late["limits"][0]["y"]  # above the line is the name of the axis
    flat = draw(Plot("t", ("a",)), {"a": [(0, 12345.6), (9, 12345.6)]}, 9)
    assert flat is not None
    assert flat["marks"][0][1] == "12,345.2" and flat["lines"][0]["newest"] == "12,346"


def test_an_event_is_a_line_at_its_step() -> None:
    drawn = draw(Plot("t", ("a",)), {"a": [(0, 1.0), (100, 2.0)]}, 100, [(50, "G_LM frozen"), (200, "later")])
    assert drawn is not None and [(event["x"], event["label"]) for event in drawn["events"]] == [(266.0, "G_LM frozen")]
