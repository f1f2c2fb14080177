"""Scores, their standard errors, and what chance gives."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest

from pipeline.inference.evaluate import tasks

tasks.quiet(offline=True)
from lm_eval.api import metrics as theirs  # noqa: E402

from pipeline.inference.evaluate.scores import Items, compare, finite, largest_change, mean_stderr  # noqa: E402


def items(values: list[Any], name: str = "acc") -> Items:
    return Items({name: values}, [], 0)


def test_a_mean_and_its_error_are_lm_evals() -> None:
    values = [float(random.Random(i).random() < 0.3) for i in range(50)]
    one = compare(items(values), None, {"acc": theirs.mean})["acc"]
    assert one["cached"] == theirs.mean(values) and one["n"] == 50
    assert one["cached_stderr"] == pytest.approx(theirs.mean_stderr(values), rel=1e-12)
    assert one["live"] is one["difference"] is one["stderr"] is one["changed"] is None


def test_the_error_of_a_difference_is_paired() -> None:
    cached = [1.0, 0.0] * 20
    live = [1.0, 0.0] * 19 + [1.0, 1.0]
    one = compare(items(cached), items(live), {"acc": theirs.mean})["acc"]
    assert one["difference"] == pytest.approx(-1 / 40) and one["changed"] == 1
    # One item of 40 differs by one: sqrt((1/40 - 1/1600) / 39). Unpaired it would be 0.11.
    assert one["stderr"] == pytest.approx(math.sqrt((1 / 40 - 1 / 1600) / 39))
    same = compare(items(cached), items(list(cached)), {"acc": theirs.mean})["acc"]
    assert (same["difference"], same["stderr"], same["changed"]) == (0.0, 0.0, 0)


def test_a_perplexity_is_resampled_with_the_same_items() -> None:
    draw = random.Random(1)
    cached = [-draw.random() * 4 for _ in range(200)]
    live = [value + 1e-6 for value in cached]
    one = compare(items(cached, "perplexity"), items(live, "perplexity"), {"perplexity": theirs.perplexity})[
        "perplexity"
    ]
    mean, error = theirs.mean(cached), mean_stderr(cached)
    assert one["cached"] == pytest.approx(math.exp(-mean)) and error is not None
    assert one["cached_stderr"] == pytest.approx(math.exp(-mean) * error, rel=0.2)
    assert one["stderr"] < 1e-5 and one["changed"] == 0  # round-off is no change
    again = compare(items(cached, "perplexity"), items(live, "perplexity"), {"perplexity": theirs.perplexity})[
        "perplexity"
    ]
    assert again == one


def test_items_of_several_numbers_change_beyond_round_off_only() -> None:
    """Such as a log-likelihood and a number of words."""

    def perplexity(items: Sequence[Any]) -> float:
        return sum(logprob for logprob, _ in items) / sum(words for _, words in items)

    cached = [(-5.0, 2), (-7.0, 3)]
    near, far = [(-5.000001, 2), (-7.0, 3)], [(-5.1, 2), (-7.0, 3)]
    compared = [compare(items(cached, "p"), items(live, "p"), {"p": perplexity})["p"] for live in (near, far)]
    assert [one["changed"] for one in compared] == [0, 1] and compared[0]["cached"] == -2.4


def test_one_item_has_no_error() -> None:
    assert compare(items([1.0]), items([1.0]), {"acc": theirs.mean})["acc"]["stderr"] is None
    one = compare(items([-1.0], "perplexity"), None, {"perplexity": theirs.perplexity})["perplexity"]
    assert one["cached_stderr"] is None


def test_the_largest_change_is_over_all_answers() -> None:
    assert largest_change(Items({}, [-1.0, -2.0], 0), Items({}, [-1.5, -2.0], 0)) == 0.5
    assert largest_change(Items({}, [-1.0], 0), None) is None


def test_json_has_no_nan() -> None:
    assert finite({"a": [math.nan, math.inf, 1.0, 3, "x"]}) == {"a": [None, None, 1.0, 3, "x"]}
