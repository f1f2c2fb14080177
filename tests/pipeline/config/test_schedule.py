"""The learning rate of every step, by schedule, and the budget that it adds up to."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.config.schedule import invariance_budget, learning_rate
from pipeline.config.train import TrainConfig


def settings(**changes):
    return TrainConfig(**{"steps": 1000, "warmup_steps": 100, "max_lr": 2.0, "min_lr_ratio": 0.1} | changes)


def test_the_cosine_is_half_way_down_half_way_through():
    train = settings()
    assert learning_rate(train, 50) == 1.0 and learning_rate(train, 100) == 2.0
    assert learning_rate(train, 550) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert learning_rate(train, 1000) == pytest.approx(0.2)


def test_a_constant_schedule_stays_where_the_warm_up_ends():
    train = settings(schedule="constant")
    assert {learning_rate(train, step) for step in range(100, 1001)} == {2.0}


@pytest.mark.parametrize(("shape", "half"), [("linear", 0.5), ("1-sqrt", 1 - math.sqrt(0.5))])
def test_wsd_is_stable_and_then_falls(shape, half):
    train = settings(schedule="wsd", decay_share=0.3, decay_shape=shape)
    assert train.decay_begins == 700
    assert {learning_rate(train, step) for step in range(100, 701)} == {2.0}
    assert learning_rate(train, 850) == pytest.approx(2.0 * (0.1 + 0.9 * half))
    assert learning_rate(train, 1000) == pytest.approx(0.2)


@given(
    steps=st.integers(2, 5000),
    share=st.floats(0.01, 1),
    schedule=st.sampled_from(["cosine", "wsd", "constant"]),
    shape=st.sampled_from(["linear", "1-sqrt"]),
)
def test_after_the_warm_up_no_schedule_rises_or_leaves_its_bounds(steps, share, schedule, shape):
    own = {"decay_share": share, "decay_shape": shape} if schedule == "wsd" else {}
    train = settings(steps=steps, warmup_steps=0, schedule=schedule, **own)
    rates = [learning_rate(train, step) for step in range(steps + 1)]
    assert all(earlier >= later for earlier, later in pairwise(rates))
    assert rates[0] == 2.0 and min(rates) >= 0.2 - 1e-12


def test_the_budget_is_the_area_below_the_schedule():
    decay = {"weight_decay": 0.5}
    constant = invariance_budget(settings(schedule="constant", **decay))
    wsd = invariance_budget(settings(schedule="wsd", decay_share=0.5, **decay))
    cosine = invariance_budget(settings(**decay))
    assert constant == pytest.approx(0.5 * 2.0 * (900 + 49.5))
    assert wsd == pytest.approx(constant - 0.5 * 2.0 * 0.9 * (sum(range(500)) / 500))
    assert constant > wsd > cosine


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decay_share": 0.5}, "decay_share is only read with schedule wsd, not cosine"),
        ({"schedule": "constant", "decay_shape": "1-sqrt"}, "decay_shape is only read with schedule wsd, not constant"),
        ({"schedule": "wsd", "decay_share": 0.95}, "begins at step 50, before the warm-up ends at 100"),
        ({"schedule": "wsd", "decay_share": 0.0}, "greater than 0"),
    ],
)
def test_a_schedule_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        settings(**changes)


def test_a_configuration_with_every_default_written_out_is_the_same():
    train = settings(schedule="constant")
    assert TrainConfig.model_validate(train.model_dump()) == train
