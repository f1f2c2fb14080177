"""What is said about the rate and the invariance budget of a run that goes on from a checkpoint."""

import pytest

from pipeline.config.continued import (
    budget_after,
    budget_line,
    budget_of,
    same_schedule,
    schedule_before,
    schedule_line,
    stable_until,
)
from pipeline.config.schedule import invariance_budget
from pipeline.config.train import FreezeConfig, TrainConfig


def recipe(**keys):
    return TrainConfig(**{"steps": 3000, "warmup_steps": 100, "max_lr": 1e-3, "metric_weight_decay": 6.0, **keys})


@pytest.mark.parametrize(
    ("before", "now", "step", "said"),
    [
        ({}, {}, 1000, "cosine: goes on at step 1,000 with rate 8.0e-4, then down to 1.0e-4 at step 3,000"),
        (
            {},
            {"steps": 6000},
            3000,
            "cosine stretched over 6,000 steps: at step 3,000 the rate goes from 1.0e-4 to 5.6e-4, then down to 1.0e-4 "
            "at step 6,000",
        ),
        (
            {"schedule": "wsd"},
            {"schedule": "wsd", "steps": 6000},
            2000,
            "wsd: goes on in the stable part (rate 1.0e-3) until step 4,800, then down (linear) to 1.0e-4 at step 6,000",
        ),
        (
            {"schedule": "wsd"},
            {"schedule": "wsd", "steps": 6000},
            3000,
            "wsd: at step 3,000 the rate goes from 1.0e-4 to 1.0e-3, stable until step 4,800, then down (linear) to 1.0e-4 "
            "at step 6,000",
        ),
        (
            {"schedule": "constant"},
            {"schedule": "constant", "steps": 6000},
            3000,
            "constant: goes on in the stable part (rate 1.0e-3) until step 6,000",
        ),
        (
            {"schedule": "constant"},
            {"schedule": "wsd", "steps": 3750, "decay_shape": "1-sqrt"},
            3000,
            "wsd: decays from step 3,000 on, 1-sqrt, to 1.0e-4 at step 3,750",
        ),
        ({"steps": 6000}, {"steps": 3000}, 3000, "cosine shortened over 3,000 steps: nothing is left after step 3,000"),
    ],
)
def test_what_is_said_of_the_schedule(before, now, step, said):
    assert schedule_line(recipe(**before), recipe(**now), step) == said


def test_which_keys_make_another_schedule():
    assert same_schedule(recipe(), recipe(metric_weight_decay=5.0, checkpoint_every=7))
    assert not any(same_schedule(recipe(), recipe(**keys)) for keys in ({"steps": 6000}, {"schedule": "constant"}))


def test_the_schedule_of_a_checkpoint_is_its_own_and_older_ones_were_cosines():
    now = recipe(schedule="wsd", steps=6000)
    before = schedule_before({"steps": 40, "max_lr": 2.0, "warmup_steps": 0, "min_lr_ratio": 0.5}, now)
    assert (before.steps, before.max_lr, before.schedule, before.decay_share) == (40, 2.0, "cosine", 0.2)


def test_the_budget_is_what_was_spent_and_what_this_recipe_adds():
    short, long = recipe(), recipe(steps=6000)
    state = {"step": 3000, "config": {"train": short.model_dump()}}
    assert budget_of(state, long) == pytest.approx(invariance_budget(short))  # not long's, which is larger there
    rest = invariance_budget(long) - invariance_budget(long, 3000)
    assert budget_after(long, {**state, "budget": 7.0}) == pytest.approx(7.0 + rest)
    assert budget_after(long, {**state, "budget": 7.0, "frozen": 2000}) == 7.0
    frozen = recipe(steps=6000, freeze_g=FreezeConfig(at_step=2000))
    assert budget_after(frozen, {**state, "budget": 7.0}) == 7.0
    said = budget_line(long, 8, {**state, "budget": 7.0})
    assert said.startswith(f"invariance budget 7.00 at step 3,000, {7 + rest:.2f} at the end: ")


def test_the_stable_part():
    wsd, constant = recipe(schedule="wsd"), recipe(schedule="constant")
    assert [stable_until(wsd, step) for step in (99, 100, 2400, 2401)] == [None, 2400, 2400, None]
    assert [stable_until(constant, step) for step in (99, 100, 3000)] == [None, 3000, 3000]
    assert stable_until(recipe(), 1000) is None
