"""G frozen in mid-training on two real ranks (pipeline/train/freeze.py): what is left, and resumes around it."""

import pytest

from pipeline.config.train import FreezeConfig, TrainConfig
from pipeline.errors import UserError
from pipeline.train.freeze import FreezeRule
from pipeline.train.state import TrainState

WORKER = "tests.pipeline.train.freeze_worker"


def check(results: dict, stage: str) -> None:
    """One stage's results."""
    result = results[stage]
    saved = result["saved"]
    assert saved["4"]["frozen"] is None and saved["4"]["model"] == "learned" and not saved["4"]["has_g"]
    for step in ("5", "6"):
        assert saved[step]["frozen"] == 4 and saved[step]["model"] == "file" and saved[step]["has_g"]
        # Nothing of the metric learner is left, in the model or in the optimizer, and everything else is.
        assert saved[step]["names"] == [name for name in saved["4"]["names"] if ".plga." not in name]
        assert saved[step]["budget"] == saved["4"]["budget"]
    assert len(saved["5"]["names"]) > 20
    switch = result["switch"]
    assert switch["g_error"] < 1e-5 < switch["varies"]
    assert switch["not_carried"] == [] and switch["moments"] > 20 and len(set(switch["adam_step"])) == 1
    assert switch["held"] == 0
    straight = result["straight"]
    assert [straight[step]["invariance/frozen"] for step in map(str, range(1, 7))] == [0, 0, 0, 0, 1, 1]
    assert straight["6"]["val/leak_gap"] == 0 and "invariance/order_parameter_G" not in straight["6"]
    for resumed, first in (("before", 5), ("after", 6)):
        assert list(result[resumed]) == [str(step) for step in range(first, 7)]
        for step, values in result[resumed].items():
            for key, value in values.items():
                if key != "train/tokens_per_second" and not key.startswith("system/"):
                    assert value == straight[step][key], (resumed, step, key)
    assert result["moved"]["6"]["train/loss"] == pytest.approx(straight["6"]["train/loss"], rel=1e-5)


@pytest.mark.slow
def test_a_frozen_run_continues_without_its_metric_learner_and_resumes_bit_equal(start_ranks, tmp_path):
    results = start_ranks(WORKER, tmp_path, "1", "fp32")
    check(results, "1")
    trained = results["trained"]
    assert trained["model"] == "constant" and trained["moved"]
    assert trained["g"] == ["layers.0.attention.plga.G_LM", "layers.1.attention.plga.G_LM"]
    # The step after the switch sees the same G, parameter or not; then it trains, and a resume continues alike.
    assert trained["points"]["5"]["train/loss"] == pytest.approx(results["1"]["straight"]["5"]["train/loss"], rel=1e-6)
    assert trained["again"]["6"]["train/loss"] == trained["points"]["6"]["train/loss"]
    # By the order parameter: frozen after the second validation under the threshold.
    assert [values["invariance/frozen"] for values in results["by_order"].values()] == [0, 0, 1, 1, 1, 1]


@pytest.mark.slow
def test_at_every_other_stage(start_ranks, tmp_path):
    results = start_ranks(WORKER, tmp_path, "0,2,3", "fp32")
    for stage in ("0", "2", "3"):
        check(results, stage)


def test_evaluations_below_the_threshold_are_counted_in_a_row():
    rule = FreezeRule(TrainConfig(freeze_g=FreezeConfig(below=1e-3, evaluations=2)))
    state, seen = TrainState(step=10), []
    for order in (1e-4, 1e-2, 1e-4, None, 1e-4, float("nan")):
        rule.count(state, order)
        seen.append((state.evaluations_below, rule.is_due(state)))
    assert seen == [(1, False), (0, False), (1, False), (1, False), (2, True), (0, False)]


def test_a_freeze_at_a_step_needs_its_checkpoints_and_waits_after_a_failed_save():
    rule = FreezeRule(TrainConfig(freeze_g=FreezeConfig(at_step=10), checkpoint_every=5))
    assert not rule.is_due(TrainState(step=9)) and rule.is_due(TrainState(step=10))
    assert rule.needs_checkpoint(TrainState(step=10)) and rule.needs_checkpoint(TrainState(step=11, frozen=10))
    assert not rule.needs_checkpoint(TrainState(step=12, frozen=10)) and not rule.is_due(TrainState(step=12, frozen=10))
    rule.postpone(TrainState(step=10))
    assert not rule.is_due(TrainState(step=14)) and rule.is_due(TrainState(step=15))
    assert not FreezeRule(TrainConfig()).is_due(TrainState(step=10**6, evaluations_below=10**6))


def test_a_rule_is_needed():
    with pytest.raises((ValueError, UserError), match="below"):
        FreezeConfig()
