"""`train.g_from` and `train.share_g_below` (pipeline/train/sharing.py): the rule, gradients on real ranks, and resumes around
the step after which G is shared."""

import numpy as np
import pytest
import torch

from pipeline.config.load import parse_config
from pipeline.config.train import FreezeConfig, TrainConfig
from pipeline.errors import ConfigError
from pipeline.train.sharing import g_in_use, share, training_flops
from pipeline.train.state import TrainState
from pldr_model.loss import dag_regularizer
from pldr_model.model import PLDRModel
from tests.helpers.definition import logits_by_definition
from tests.pipeline.train.mean_worker import DAG, Padded
from tests.pipeline.train.sharing_worker import GRADIENTS, settings
from tests.pipeline.train.test_mean import nll

WORKER = "tests.pipeline.train.sharing_worker"


def definition(stage, g_from):
    """Loss and gradient of the first step, over the micro batches of both ranks, in fp64."""
    config = settings("/unused", stage, micro_batch=2)
    torch.manual_seed(config.seed)
    torch.set_default_dtype(torch.float32 if stage == 3 else torch.float64)
    model = PLDRModel(config.model).double()
    torch.set_default_dtype(torch.float32)
    ids = torch.from_numpy(Padded(config).global_batch(0))
    logits, terms = [], []
    for micro in ids.split(2):
        some, deduced = logits_by_definition(model, micro[:, :-1], g_from)
        logits.append(some)
        used = [alone[0] for alone in deduced] if g_from == "batch" else [one for alone in deduced for one in alone]
        terms += [c * dag_regularizer([getattr(one, name) for one in used])
                  for c, name in zip(DAG, ("A_LM", "A_P", "G_LM"), strict=True) if c]  # fmt: skip
    loss, _ = nll(torch.cat(logits), ids[:, 1:])
    (loss + sum(terms) / len(logits)).backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


def check_gradient(folder, stage, g_from):
    """Of the loss and of every weight; as far as fp32 allows at stage 3, where PLGA's gradients are ill-conditioned."""
    found = torch.load(folder / f"{stage}-{g_from}.pt")
    loss, right = definition(stage, g_from)
    ours = torch.cat([g.flatten().double() for g in found["gradient"].values()])
    assert found["loss"] == pytest.approx(loss, rel=1e-5 if stage == 3 else 1e-12)
    tolerance = 1e-2 if stage == 3 else 1e-6
    assert ((ours - right).norm() / right.norm()).item() < tolerance
    assert ((ours - definition(stage, "own")[1]).norm() / right.norm()).item() > 5 * tolerance


def check_switch(result):
    straight = result["straight"]
    assert result["saved"] == {"2": None, "4": 3, "6": 3}
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
    config = settings("/unused", 0)
    own, shared = (training_flops(config.model, config.train, TrainState(shared=shared)) / 2e12 for shared in (None, 3))
    for step, flops in (("3", own), ("4", shared)):
        assert points[step]["train/mfu"] == pytest.approx(points[step]["train/tokens_per_second"] * flops)


@pytest.fixture(scope="module")
def one_stage(start_ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharing")
    return folder, start_ranks(WORKER, folder, "1", "fp64")


@pytest.mark.parametrize("g_from", GRADIENTS)
def test_the_gradient_is_that_of_the_definition(one_stage, g_from):
    check_gradient(one_stage[0], 1, g_from)


def test_resumes_around_the_step_after_which_g_is_shared_are_bit_equal(one_stage):
    check_switch(one_stage[1]["1"])


@pytest.mark.slow
def test_at_every_other_stage(start_ranks, tmp_path):
    results = start_ranks(WORKER, tmp_path, "0,2,3", "fp64")
    for stage in (0, 2, 3):
        check_switch(results[str(stage)])
        for g_from in GRADIENTS:
            check_gradient(tmp_path, stage, g_from)
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
