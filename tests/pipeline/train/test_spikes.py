"""The robust bound and the guard: properties over many series, and that a guard survives JSON."""

import json
import math
import statistics
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.train import TrainConfig
from pipeline.errors import ConfigError
from pipeline.train.spikes import KEPT_EVENTS, MIN_LOSSES, Guard, describe, judge, robust_bound
from pipeline.train.step import Outcome

values = st.floats(0.1, 100, allow_nan=False)
series = st.lists(values, min_size=1, max_size=60)


@given(series, st.floats(0.5, 20), st.floats(0.01, 100), st.randoms())
def test_the_bound_is_above_the_median_scales_and_ignores_order(losses, threshold, factor, random):
    bound = robust_bound(losses, threshold)
    assert bound > statistics.median(losses)
    assert robust_bound([v * factor for v in losses], threshold) == pytest.approx(bound * factor, rel=1e-6)
    shuffled = random.sample(losses, len(losses))
    assert robust_bound(shuffled, threshold) == bound


@given(st.lists(st.floats(2, 3), min_size=21, max_size=60), st.lists(st.floats(1e3, 1e30), max_size=10))
def test_a_minority_of_huge_losses_moves_it_only_within_the_others_range(losses, huge):
    """Median and MAD stay within what the majority spans, whatever the rest is."""
    assert robust_bound(losses + huge, 8) <= 3 + 8 * max(1.4826, 1e-2 * 3)


@given(st.lists(st.floats(-1, 1), min_size=MIN_LOSSES, max_size=60), st.integers(0, 60))
def test_a_loss_spike_is_found_once_wherever_it_is(noise, position):
    guard = Guard()
    for number in range(MIN_LOSSES):
        assert guard.loss(4 + 0.1 * (-1) ** number, window=50, threshold=8) is None
    position = min(position, len(noise) - 1)
    found = []
    for number, wobble in enumerate(noise):
        height = 40.0 if number in (position, position + 1) else 4 + 0.1 * wobble
        if guard.loss(height, window=50, threshold=8) is not None:
            found.append(number)
    assert found == [position] and guard.spikes == 1  # the second high loss belongs to the same spike


@given(st.lists(st.one_of(values, st.sampled_from([math.nan, math.inf])), max_size=120), st.integers(0, 120))
def test_a_guard_that_went_through_json_decides_the_same(losses, cut):
    straight = Guard()
    expected = [straight.loss(value, window=30, threshold=2) for value in losses]
    first = Guard()
    before = [first.loss(value, window=30, threshold=2) for value in losses[:cut]]
    second = Guard(**json.loads(json.dumps(asdict(first), allow_nan=False)))
    assert before + [second.loss(value, window=30, threshold=2) for value in losses[cut:]] == expected
    assert second == straight and len(straight.losses) <= 30


def test_the_order_parameter_jumps_by_a_factor():
    guard = Guard()
    assert [guard.order(v) for v in (1.0, 0.5, 0.1, math.nan, 0.08)] == [None] * 5
    assert guard.order(3.1) == pytest.approx(3.0)  # ten times the median of 1, 0.5, 0.1, 0.08
    assert guard.order(0.05) is None and guard.spikes == 1


def train(**keys):
    return TrainConfig(steps=100, warmup_steps=0, **keys)


def never():
    raise AssertionError("sequence numbers are only computed for an event")


def test_only_steps_in_a_row_stop_the_run():
    guard, config = Guard(), train(max_skipped_steps=2)
    bad, good = Outcome(math.nan, 64, True, None), Outcome(3.0, 64, False, None)
    numbers = np.arange(100, 170)
    for outcome in (bad, good, bad, good):
        event = judge(guard, config, 5, outcome, {}, (lambda: numbers) if outcome.skipped else never)
        assert (event is not None) is outcome.skipped
    assert "step 5: skipped, not finite; the batch is sequences 100, 101" in describe(guard.events[0])
    json.dumps(guard.events, allow_nan=False)
    judge(guard, config, 6, bad, {}, lambda: numbers)
    with pytest.raises(ConfigError, match="the 2 steps up to it") as error:
        judge(guard, config, 7, bad, {}, lambda: numbers)
    assert "163 and 6 more" in str(error.value) and "\n" not in str(error.value)


def test_events_are_kept_within_bounds_and_rollbacks_counted():
    guard = Guard()
    for number in range(KEPT_EVENTS + 5):
        guard.record({"step": number})
    assert [e["step"] for e in guard.events] == list(range(5, KEPT_EVENTS + 5))
    earlier = Guard(losses=[1.0])
    earlier.roll_back(guard, "step-000010")
    again = Guard(losses=[1.0])
    again.roll_back(earlier, "step-000010")
    assert again.rollbacks == {"step-000010": 2} and again.events == guard.events and again.losses == [1.0]
