"""What a metric learner's weights say of the deviation of A, against autograd and against stacks whose contraction is known."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from pipeline.bench.contraction.law import fit, judge, law
from pipeline.bench.contraction.points import Point
from pipeline.bench.contraction.runs import find_runs, of_model
from pipeline.bench.contraction.units import contraction, jacobians, predict
from pipeline.config.load import load_config
from pipeline.errors import UserError
from pipeline.io.storage import publish_json
from pldr_model.config import ModelConfig
from pldr_model.metric_learner import MetricLearner
from pldr_model.model import PLDRModel

K, UNITS = 16, 4


@pytest.fixture
def config() -> ModelConfig:
    sizes = {"vocab_size": 64, "context_length": 24, "num_layers": 2, "num_heads": 2}
    return ModelConfig(**sizes, head_dim=K, num_reslayerA=UNITS, A_dff=24)


def stack(config: ModelConfig, *, gamma: float, beta: float, glus: float, seed: int = 0) -> MetricLearner:
    """Units with normal gammas and betas of these sizes, and GLUs scaled by `glus`, in fp64."""
    torch.manual_seed(seed)
    learner = MetricLearner(config).double()
    with torch.no_grad():
        for unit in learner:
            unit.norm.weight.normal_(std=gamma)
            unit.norm.bias.normal_(std=beta)
            for parameter in unit.glus.parameters():
                parameter.mul_(glus)
    return learner


@pytest.mark.parametrize(("gamma", "beta"), [(1.0, 0.0), (0.3, 0.4), (1e-3, 2e-2), (1e-4, 1e-4)])
def test_the_formula_is_the_rms_gain_of_autograds_jacobian_without_glus(config, gamma, beta):
    """RMS of J d over directions d of RMS 1 is |J|_F / sqrt(K); the smallest sizes need LayerNorm's eps."""
    unit = stack(config, gamma=gamma, beta=beta, glus=0.0)[0]
    rows_RK = gamma * torch.randn(5, K, dtype=torch.float64) + beta
    J_RKK = jacobians(unit, rows_RK)
    gain = math.sqrt(float(J_RKK.square().sum((1, 2)).mean()) / K)
    assert contraction(unit, rows_RK).contraction == pytest.approx(gain, rel=1e-12)
    # And differences do shrink by that: 4000 directions, relative error of their mean square below 3 %.
    steps_DK = 1e-7 * gamma * torch.randn(4000, K, dtype=torch.float64)
    with torch.no_grad():
        moved_DK = unit(rows_RK[:1] + steps_DK) - unit(rows_RK[:1])
    one = contraction(unit, rows_RK[:1]).contraction
    assert float(moved_DK.square().sum() / steps_DK.square().sum()) == pytest.approx(one**2, rel=0.1)


def test_with_equal_gammas_and_no_bias_iterated_norms_contract_nothing(config):
    """n -> LN(gamma n) is n. With beta each unit contracts by gamma / std beta, up to what LN projects away."""
    learner = stack(config, gamma=0.0, beta=0.0, glus=0.0)
    rows_RK = torch.randn(6, K, dtype=torch.float64)
    rows_RK = (rows_RK - rows_RK.mean(-1, keepdim=True)) / rows_RK.std(-1, correction=0, keepdim=True)
    turned = 1e-6 * torch.randn(3, 6, K, dtype=torch.float64)
    turned -= turned.mean(-1, keepdim=True)
    turned -= rows_RK * (turned * rows_RK).mean(-1, keepdim=True)  # along the sphere that a norm maps to
    with torch.no_grad():
        for unit in learner:
            unit.norm.weight.fill_(0.02)
    alone = predict(learner, rows_RK, rows_RK + turned)
    assert alone.jacobian == pytest.approx(
        float(turned.square().mean().sqrt()), rel=1e-2
    )  # eps in 0.02^2: 0.25 % a unit
    direction_K = torch.randn(K, dtype=torch.float64)
    with torch.no_grad():
        for unit in learner:
            unit.norm.bias.copy_(direction_K)
    with_beta = predict(learner, rows_RK, rows_RK + turned)
    sigma = float(direction_K.std(correction=0))
    assert with_beta.jacobian == pytest.approx(alone.jacobian * (0.02 / sigma) ** UNITS, rel=0.5)
    assert [unit.contraction for unit in with_beta.units[1:]] == pytest.approx([0.02 / sigma] * 3, rel=0.2)


@pytest.mark.parametrize("glus", [0.0, 0.5, 1.0])
def test_the_product_of_jacobians_predicts_small_deviations(config, glus):
    learner = stack(config, gamma=0.05, beta=0.03, glus=glus)
    rows_RK = torch.randn(8, K, dtype=torch.float64)
    found = predict(learner, rows_RK, rows_RK + 1e-5 * torch.randn(4, 8, K, dtype=torch.float64))
    assert found.jacobian == pytest.approx(found.fp64, rel=1e-3) and found.fp64 < 1e-5
    assert all((unit.glu_std > 0) is (glus > 0) for unit in found.units)


def test_a_models_rows_are_those_that_reach_its_metric_learners(config):
    """The deviation of A that is computed from the captured rows is that of the model's own A."""
    torch.manual_seed(0)
    model, ids_NS = PLDRModel(config), torch.randint(4, 64, (3, 24))
    layers = of_model(model, ids_NS)
    with torch.no_grad():
        outputs = model(ids_NS, padded=False, return_outputs=True)[1]
    for layer, out in zip(layers, outputs, strict=True):
        deviation = (out.A[1:] - out.A[:1]).square().mean().sqrt() / out.A[0].square().mean().sqrt()
        assert layer.fp64 == pytest.approx(float(deviation), rel=1e-9)
    without = PLDRModel(ModelConfig(**{**config.to_dict(), "num_denseA": 0}))
    assert all(unit.glu_std == 0 for layer in of_model(without, ids_NS) for unit in layer.units)


def test_the_fit_finds_the_constants_that_made_the_numbers():
    constants = (-0.7, 4.0, 0.2)
    cases = [
        (budget, nu, units) for budget in (0.5, 2.0, 3.5, 5.0, 7.0, 12.0) for nu in (0.01, 0.03) for units in (2, 4, 8)
    ]
    points = [Point("made", 1, number, *case, measured=1.0) for number, case in enumerate(cases)]
    points = [replace(p, measured=float(10**y)) for p, y in zip(points, law(points, constants), strict=True)]
    laws = fit(points)
    assert laws["law"][1] == pytest.approx(constants, abs=0.02)
    found = {name: judge(points, function(points, its)) for name, (function, its) in laws.items()}
    assert found["law"]["rms"] < 0.01 < 0.5 < found["hinge"]["rms"] and found["law"]["rank"] == pytest.approx(1.0)
    with pytest.raises(UserError, match="too few runs"):
        fit(points[:6])


def test_the_rank_correlation_is_spearmans():
    """1 - 6 sum d^2 / (n^3 - n) without ties; ties share their mean rank."""
    points = [Point("made", 1, 0, 0.0, 0.0, 8, measured=10.0**y) for y in (1, 3, 2, 4)]
    assert judge(points, np.array([1.0, 2.0, 3.0, 4.0]))["rank"] == pytest.approx(1 - 6 * 2 / 60)
    tied = np.corrcoef([1, 3, 2, 4], [1.5, 1.5, 3.5, 3.5])[0, 1]
    assert judge(points, np.array([1.0, 1.0, 2.0, 2.0]))["rank"] == pytest.approx(tied)


def test_a_norms_beta_and_the_last_bias_of_the_next_units_glus_have_one_gradient(config):
    """So they stay equal, and add up in what LN divides by; gamma's gradient is that times n. (GLUs have decayed.)"""
    learner = stack(config, gamma=0.05, beta=0.03, glus=0.0)
    row_1K = torch.randn(1, K, dtype=torch.float64)
    (learner(row_1K) * torch.randn(K, dtype=torch.float64)).sum().backward()
    for before, after in pairwise(learner):
        gradient_K = before.norm.bias.grad
        assert torch.allclose(after.glus[-1].w3.bias.grad, gradient_K, rtol=1e-12, atol=0)
        n_K = before.norm.weight.grad / gradient_K
        assert float(n_K.square().mean()) == pytest.approx(1, abs=0.01)  # LN's eps


@pytest.mark.parametrize("source", ["learned", "identity"])
def test_runs_are_found_wherever_they_were_moved(tmp_path, repository, source):
    """Their store is gone with the folder that the checkpoint names; those with a constant G are left out."""
    keys = [f"model.g_source={source}", f"tracking.uri=sqlite:///{tmp_path}/gone/mlflow.db"]
    config = load_config(repository / "configs" / "quickstart.yaml", keys)
    checkpoint = tmp_path / "sweep" / "children" / "one" / "checkpoints" / "step-000300"
    publish_json(checkpoint / "state.json", {"schema_version": 2, "step": 300, "config": config.as_dict()})
    (checkpoint / "COMMITTED").write_text("x")
    if source == "identity":
        with pytest.raises(UserError, match="no run with a metric learner and a checkpoint"):
            find_runs(tmp_path / "sweep")
        return
    (run,) = find_runs(tmp_path / "sweep")
    assert (run.name, run.measured, run.checkpoints) == ("one", {}, [checkpoint])
    assert find_runs(tmp_path / "sweep" / "children" / "one") == [run]
