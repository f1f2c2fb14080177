"""`train.optimizer: muon` on two real ranks: torch's own Muon and AdamW, resumed, converted, frozen and rolled back."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config.load import parse_config
from pipeline.config.schedule import learning_rate
from pipeline.errors import ConfigError
from pipeline.stages.compatible import check_inputs
from pldr_model.loss import total_loss
from pldr_model.model import PLDRModel
from tests.helpers.recipe_runs import RECIPE_WORKER
from tests.pipeline.train.recipe_worker import MUON, muon
from tests.pipeline.train.test_zero import plain_pytorch as adamw_alone
from tests.pipeline.train.zero_worker import STEPS, configuration

MUON_WORKER = "tests.pipeline.train.muon_worker"
MATRIX = re.compile(r"layers\.\d+\.(attention\.(qkv|output)|feed_forward\.(w12|w3))\.weight")  # what Muon trains


@pytest.fixture(scope="module")
def fp32(recipe_runs):
    return recipe_runs


@pytest.fixture(scope="module")
def more(more_recipe_runs):
    return more_recipe_runs


def losses(points: dict) -> list[float]:
    return [points[str(step)]["train/loss"] for step in sorted(int(s) for s in points)]


def plain_pytorch(clip_by: str, g_source: str, *, momentum: float = 0.9, decay: float = 0.3) -> list[float]:
    """The same run on one process: torch.optim.Muon and torch.optim.AdamW side by side, clipped by torch's functions."""
    config = muon(Path("/unused"), "fp32", clip_by, g_source)
    train = config.train
    torch.manual_seed(config.seed)
    model = PLDRModel(config.model)
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if MATRIX.fullmatch(name)]
    assert len(matrices) == 4 * config.model.num_layers
    metric = [p for name, p in named.items() if ".metric_learner." in name]
    rest = [p for p in model.parameters() if all(p is not other for other in (*matrices, *metric))]
    groups = [{"params": rest, "weight_decay": 0.3}, {"params": metric, "weight_decay": 2.0}]
    adamw = torch.optim.AdamW(groups, betas=train.betas, eps=train.eps)
    other = torch.optim.Muon(matrices, momentum=momentum, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    seen = []
    for step in range(STEPS):
        rng = np.random.default_rng(step * train.global_batch)
        ids = torch.from_numpy(rng.integers(4, 67, size=(8, 17)))
        loss = total_loss(model(ids[:, :-1], targets=ids[:, 1:]), config.model).total
        model.zero_grad()
        loss.backward()
        if clip_by == "norm":
            torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip)
        else:
            torch.nn.utils.clip_grad_value_(model.parameters(), train.clip)
        for optimizer, scale in ((adamw, 1.0), (other, 50.0)):  # muon_lr is 50 times max_lr
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(train, step) * scale
            optimizer.step()
        seen.append(loss.item())
    return seen


def apart(one: list[float], other: list[float]) -> float:
    assert len(one) == len(other) == STEPS
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def test_two_ranks_train_like_torchs_muon_beside_torchs_adamw(fp32):
    """Newton-Schulz runs in bf16, so a sum in another order moves the update by a rounding of bf16, not of fp32. Another
    momentum, another weight decay of the matrices and AdamW alone are further away than that."""
    ours = losses(fp32["sdpa"])
    assert apart(ours, plain_pytorch("value", "identity")) < 5e-4
    for other in ({"momentum": 0.95}, {"decay": 0.1}):
        assert apart(ours, plain_pytorch("value", "identity", **other)) > 1e-3
    assert apart(ours, adamw_alone("value", "identity")) > 5e-3


@pytest.mark.slow
def test_clipped_by_norm_too(more):
    assert apart(losses(more["norm"]), plain_pytorch("norm", "identity")) < 5e-4


def test_a_learned_g_too(fp32):
    """Its gradients are ill-conditioned at the start (test_zero.py): the first two updates are compared."""
    assert losses(fp32["straight"])[:4] == pytest.approx(plain_pytorch("value", "learned")[:4], abs=5e-3)


def test_a_resumed_run_is_bit_equal_also_when_the_checkpoint_is_converted(fp32):
    assert losses(fp32["resumed"]) == losses(fp32["converted"]) == losses(fp32["straight"])[3:]


@pytest.mark.slow
def test_a_frozen_run_keeps_its_moments_and_resumes_bit_equal(fp32, more):
    assert losses(more["frozen"])[:3] == losses(fp32["straight"])[:3]
    assert losses(more["frozen_resumed"]) == losses(more["frozen"])[4:]
    assert abs(losses(more["frozen"])[3] - losses(fp32["straight"])[3]) < 0.05


@pytest.mark.slow
def test_a_rollback_restores_every_weight_and_moment(more):
    assert more["rolled_back"]["wrong"] == []
    assert more["rolled_back"]["kinds"] == [["exp_avg", "exp_avg_sq"], ["momentum_buffer"]]


@pytest.mark.slow
def test_it_resumes_on_another_number_of_ranks(recipe_runs_on_one_rank, fp32):
    assert losses(recipe_runs_on_one_rank["resumed"]) == pytest.approx(losses(fp32["straight"])[3:], abs=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-5), ("bf16", 2e-4)])
def test_on_one_rank_nothing_of_two_is_lost_and_the_losses_are_as_close_as_adamws(
    start_ranks, tmp_path, precision, limit
):
    """fp32: the limit of tests/pipeline/checkpoint/test_reshard.py, at its rate. bf16: gradients are summed in bf16, on one
    rank in another order."""
    first = start_ranks(MUON_WORKER, tmp_path, "straight", precision)
    again = start_ranks(MUON_WORKER, tmp_path, "resumed", precision, world=1)
    for clip_by in ("value", "norm"):
        right, run = losses(first[clip_by]["points"])[3:], again[clip_by]
        off = {
            key: max(abs(a / b - 1) for a, b in zip(losses(run[key]), right, strict=True)) for key in ("points", "lost")
        }
        assert run["wrong"] == [] and off["points"] < limit
        assert off["lost"] > 3 * limit  # moments that were lost would be noticed


@pytest.mark.slow
def test_in_bf16_a_converted_checkpoint_has_the_same_moments(start_ranks, tmp_path):
    bf16 = start_ranks(RECIPE_WORKER, tmp_path, "quick", "bf16")
    assert losses(bf16["resumed"])[0] == losses(bf16["converted"])[0] == losses(bf16["straight"])[3]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_where_zero_cuts_matrices_it_is_refused(stage):
    tree = configuration(Path("/unused"), stage, "fp32", "value").as_dict()
    tree["train"]["optimizer"] = "muon"
    with pytest.raises(ConfigError, match=rf"train: .*ZeRO stage {stage} cuts matrices .* set zero_stage=0"):
        parse_config(tree, where="test")


@pytest.mark.parametrize("key", ["muon_lr", "muon_momentum"])
def test_its_keys_are_not_read_by_adamw(key):
    tree = configuration(Path("/unused"), 0, "fp32", "value").as_dict()
    tree["train"][key] = MUON[key]
    with pytest.raises(ConfigError, match=f"{key} is only read with optimizer muon"):
        parse_config(tree, where="test")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("before", ["adamw", "muon", None])
def test_a_checkpoint_of_the_other_optimizer_is_refused(before, force):
    config = muon(Path("/unused"), "fp32", "value")
    if before == "muon":
        config = configuration(Path("/unused"), 0, "fp32", "value")
    saved = config.as_dict() | {"train": {} if before is None else {"optimizer": before}}
    state = {"config": saved, "data_fingerprint": "d"}
    with pytest.raises(
        ConfigError, match=rf"moments are {before or 'adamw'}'s; set train.optimizer={before or 'adamw'}"
    ):
        check_inputs(Path("c"), state, config, {"data_fingerprint": "d"}, force=force, report=print)


def test_an_old_torch_is_one_line(monkeypatch):
    from pipeline.train.optim import build_optimizer

    monkeypatch.delattr(torch.optim, "Muon")
    config = muon(Path("/unused"), "fp32", "value")
    with pytest.raises(ConfigError, match=r"torch .* has no Muon; install torch>=2\.9"):
        build_optimizer(PLDRModel(config.model), config.train)
