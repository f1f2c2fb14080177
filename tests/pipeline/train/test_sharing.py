"""`train.g_from` and `train.share_g_below` (pipeline/train/sharing.py): the rule, and resumes around the step after which
G is shared. Gradients: test_mean.py."""

import numpy as np
import pytest

from pipeline.config.load import parse_config
from pipeline.config.train import FreezeConfig, TrainConfig
from pipeline.errors import ConfigError
from pipeline.train.sharing import g_in_use, share, training_flops
from pipeline.train.state import TrainState
from tests.pipeline.train.zero_worker import configuration

WORKER = "tests.pipeline.train.sharing_worker"


def check_switch(result):
    straight = result["straight"]
    assert result["saved"] == {"2": None, "4": 3, "6": 3} and result["rolled_back"] == {"4": 3, "2": None}
    assert straight["shared"] == 3 and straight["frozen"] is None
    points = straight["points"]
    assert [points[step]["invariance/shared"] for step in map(str, range(1, 7))] == [0, 0, 0, 1, 1, 1]
    for resumed, first in (("before", 3), ("after", 5)):
        assert result[resumed]["shared"] == 3
        assert list(result[resumed]["points"]) == [str(step) for step in range(first, 7)]
        for step, values in result[resumed]["points"].items():
            for key, value in values.items():
                if key not in ("train/tokens_per_second", "train/mfu") and not key.startswith("system/"):
                    assert value == points[step][key], (resumed, step, key)
    # Another threshold: what was below the old one is forgotten, and each sequence has its own G again.
    other = result["other_rule"]
    assert other["shared"] is None and other["points"]["5"]["invariance/shared"] == 0
    assert other["points"]["5"]["train/loss"] != points["5"]["train/loss"]
    config = configuration("/unused", 0, "fp32", "norm")
    own, shared = (training_flops(config.model, config.train, TrainState(shared=shared)) / 2e12 for shared in (None, 3))
    for step, flops in (("3", own), ("4", shared)):
        assert points[step]["train/mfu"] == pytest.approx(points[step]["train/tokens_per_second"] * flops)


@pytest.mark.slow
def test_resumes_around_the_step_after_which_g_is_shared_are_bit_equal(start_ranks, tmp_path):
    results = start_ranks(WORKER, tmp_path, "0,1,2,3", "fp32")
    for stage in "0123":
        check_switch(results[stage])
    # Shared after the first validation, then frozen: from there no G is deduced.
    later = results["frozen_later"]
    assert (later["shared"], later["frozen"]) == (1, 4)
    assert [p["invariance/shared"] for p in later["points"].values()] == [0, 1, 1, 1, 1, 1]
    assert all(np.isfinite(p["train/loss"]) for p in later["points"].values())


def test_g_is_shared_once_the_order_parameter_is_below():
    train, state = TrainConfig(share_g_below=1e-4), TrainState(step=10)
    for order in (None, float("nan"), 1e-4, 0.2):
        assert share(train, state, order) is None and g_in_use(train, state) == "own"
    assert "G is shared after step 10: order parameter 9.0e-05 is below 0.0001; one sequence of each 4" in str(
        share(train, state, 9e-5)
    )
    assert state.shared == 10 and g_in_use(train, state) == "batch"
    state.step = 20
    assert share(train, state, 1e-6) is None and state.shared == 10
    state.frozen = 20
    assert g_in_use(train, state) == "own"
    assert share(TrainConfig(), TrainState(), 0.0) is None
    assert g_in_use(TrainConfig(g_from="neighbor"), TrainState()) == "neighbor"
    both = TrainConfig(g_from="neighbor", share_g_below=1.0, freeze_g=FreezeConfig(below=0.5))
    assert g_in_use(both, TrainState(shared=3)) == "batch"


@pytest.mark.parametrize(
    ("train", "model", "message"),
    [
        ({"g_from": "neighbor", "micro_batch": 1}, {}, "g_from neighbor needs a micro_batch of 2 or more"),
        ({"g_from": "batch", "micro_batch": 1}, {}, "g_from batch needs a micro_batch of 2 or more"),
        ({"share_g_below": 1e-4, "micro_batch": 1}, {}, "share_g_below 0.0001 needs a micro_batch of 2 or more"),
        ({"g_from": "batch", "share_g_below": 1e-4}, {}, "share_g_below is not read with g_from batch"),
        ({"g_from": "batch"}, {"g_source": "constant"}, "train.g_from: model.g_source 'constant' has no learned G"),
        ({"share_g_below": 1e-4}, {"g_source": "identity"}, "train.share_g_below: model.g_source 'identity'"),
        ({"share_g_below": 0}, {}, "train.share_g_below"),
    ],
)
def test_what_would_mean_nothing_is_refused(train, model, message):
    sizes = {"vocab_size": 300, "num_layers": 1, "num_heads": 1, "head_dim": 4, "context_length": 8, **model}
    tree = {"name": "t", "run_dir": "runs/t", "data": {"sources": [{"url": "x"}]}, "model": sizes, "train": train}
    with pytest.raises(ConfigError, match=message):
        parse_config(tree, where="test")
