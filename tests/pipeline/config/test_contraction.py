"""The law of contraction: what `pldr plan` predicts of the order parameter of G."""

import math

import pytest

from pipeline.config.contraction import (
    COHERENCE,
    INVARIANT,
    ROUND_OFF,
    START,
    Expected,
    expected,
    noise,
    order_parameter,
    verdict,
)
from pipeline.config.schedule import invariance_budget
from pipeline.config.train import FreezeConfig, TrainConfig


def recipe(**keys):
    return TrainConfig(**{"steps": 1500, "warmup_steps": 50, "max_lr": 3e-3, "metric_weight_decay": 8.0, **keys})


def test_the_noise_is_that_of_random_updates_that_decay():
    """In equilibrium lr / (2 wd - lr wd^2); and in a simulation of updates of size lr and random sign."""
    train = recipe(schedule="constant", warmup_steps=0)
    rate, decay = train.max_lr, train.metric_decay
    assert noise(train, 1500) == pytest.approx(math.sqrt(rate / (2 * decay - rate * decay**2)), rel=1e-6)
    assert noise(train, 1) == rate and noise(train, 0) == 0.0
    shrinking = recipe(min_lr_ratio=0.1)
    assert noise(shrinking, 1500) < noise(shrinking, 700)  # it follows the rate


def test_units_forget_nothing_at_first_and_a_fixed_share_each_in_the_end():
    nu = 0.01
    assert order_parameter(0.0, nu, 8) == pytest.approx(10**START, rel=0.1)
    end = [order_parameter(math.inf, nu, units) - ROUND_OFF for units in (1, 2, 4)]
    assert end == pytest.approx([10**START / (1 + COHERENCE) ** units for units in (1, 2, 4)])
    fall = [order_parameter(budget, nu, 8) for budget in (1, 2, 3, 4, 5, 6, 8, 12)]
    assert fall == sorted(fall, reverse=True) and fall[-1] == pytest.approx(order_parameter(math.inf, nu, 8), rel=0.01)
    assert order_parameter(4.0, nu, 8) < order_parameter(4.0, nu / 3, 8)  # more noise forgets earlier


def test_more_units_are_advised_where_no_budget_is_enough():
    train = recipe()
    budget = invariance_budget(train)
    eight, two = (expected(train, units, budget) for units in (8, 2))
    assert eight.middle <= INVARIANT < two.low and eight.low < eight.middle < eight.high
    assert verdict(eight).startswith("invariant expected") and "num_reslayerA" in verdict(two)
    assert "raise train.metric_weight_decay" in verdict(expected(train, 8, 2.0))


def test_a_small_budget_is_never_called_enough():
    """The papers' SUB-1 had 8.2, and was variant."""
    assert Expected(8.2, middle=1e-7, low=2e-8, high=1e-6).word == "perhaps invariant"
    assert Expected(20.0, middle=1e-2, low=1e-3, high=0.1).word == "at best approximately invariant"
    assert Expected(20.0, middle=1e-1, low=1e-2, high=1.0).word == "NOT invariant expected"


def test_the_noise_is_that_of_the_step_at_which_g_is_frozen():
    frozen = recipe(freeze_g=FreezeConfig(at_step=100))
    assert expected(frozen, 8, 9.0).middle == order_parameter(9.0, noise(recipe(), 100), 8)


def test_no_order_parameter_is_promised_for_decays_that_were_not_fitted():
    papers = TrainConfig(steps=250_000, max_lr=1e-3)
    said = verdict(expected(papers, 8, invariance_budget(papers)))
    assert said.startswith("invariant expected by the budget; ") and "9 of 10" not in said and "says 1e-07" in said
    assert "order parameter of G" in verdict(expected(recipe(), 8, 9.0))


def test_a_decay_of_the_glus_alone_contracts_nothing():
    """The law is of the norms: theirs is then the usual weight decay."""
    budget = invariance_budget(recipe())
    norms, glus = (expected(recipe(metric_decay_on=on), 8, budget) for on in ("norms", "glus"))
    assert norms == expected(recipe(), 8, budget)
    assert glus.word == "NOT invariant expected" and glus.budget == pytest.approx(budget * 0.1 / 8)
    assert "set units or norms" in verdict(glus)


def test_glus_that_do_not_decay_leave_the_budget_of_the_norms():
    none, some = (expected(recipe(metric_decay_on="glus", metric_weight_decay=wd), 8, budget)
                  for wd, budget in ((0.0, 0.0), (8.0, invariance_budget(recipe()))))  # fmt: skip
    assert none.budget == pytest.approx(some.budget) and none.budget == pytest.approx(invariance_budget(recipe()) / 80)
