"""The proof over every input: never below what a search finds, small where the metric learner has forgotten its input."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.post.every_input.balls import PRECISION_BITS, exact, precision
from pipeline.post.every_input.proof import Head, _linear_part, prove
from pldr_model.config import ModelConfig
from pldr_model.model import PLDRModel

ROUND_OFF = 1e-12  # of the search, which is fp64: where a G is all but constant it and the bound are the same number
KEYS = {"bound", "per_head", "closed", "by_unit", "score_bound", "precision_bits", "reason"}


def build(
    *, seed: int, decay: float, K: int = 8, layers: int = 1, units: int = 4, eps: float = 1e-6, glus: int = 2
) -> PLDRModel:
    """A model whose metric learner is as AdamW leaves it: random values everywhere, gammas and matrices shrunk by `decay`."""
    torch.manual_seed(seed)
    config = ModelConfig(
        vocab_size=16, num_layers=layers, num_heads=2, head_dim=K, context_length=8, A_dff=5, num_reslayerA=units,
        layer_norm_eps=eps, num_denseA=glus,
    )  # fmt: skip
    model = PLDRModel(config)
    with torch.no_grad():
        for layer in model.layers:
            plga = layer.attention.plga
            for weight in plga.metric_learner.parameters():
                weight.add_(0.3 * torch.randn_like(weight)).mul_(decay)
            for unit in plga.metric_learner:
                unit.norm.bias.copy_(0.1 * torch.randn(K))
            plga.b.copy_(0.3 * torch.randn_like(plga.b))
            plga.b_a.copy_(torch.eye(K))
    return model.eval()


def rows(model: PLDRModel, count: int) -> Tensor:
    """Random z of full norm, and rows with one entry as far out as it can be: [count,K]."""
    K = model.config.head_dim
    z = torch.cat([torch.randn(count - 2 * K, K), torch.eye(K), -torch.eye(K)]).double()
    z = z - z.mean(dim=-1, keepdim=True)
    return z / z.norm(dim=-1, keepdim=True) * K**0.5


def deviation(model: PLDRModel, z_MHKK: Tensor, g_HKK: Tensor, layer: int = 0) -> Tensor:
    """Of G_LM from the cached one, [M,H]; z are the rows of the normalized density matrix. The model is fp64."""
    plga = model.layers[layer].attention.plga
    A = plga.metric_learner(z_MHKK * plga.density_norm.weight + plga.density_norm.bias)
    G = plga.power_law(A).G_LM
    return (G - g_HKK).square().mean((-2, -1)).sqrt() / g_HKK.square().mean((-2, -1)).sqrt()


def cached(model: PLDRModel) -> Tensor:
    with torch.no_grad():
        return model.compute_g(torch.arange(8).view(1, 8) + 4).mean(1)


def found(model: PLDRModel, g_LHKK: Tensor) -> list[list[float]]:
    """The worst deviation of every head by random rows and gradient ascent, in fp64."""
    model = _in_fp64(model)
    worst = []
    for layer, g_HKK in enumerate(g_LHKK.double()):
        H, K, _ = g_HKK.shape
        z = rows(model, 96).repeat(2, 1)
        z = torch.cat([z[:96].view(96, 1, 1, K).expand(96, H, K, K), z[torch.randint(96, (32, H, K))]])
        best = deviation(model, z, g_HKK, layer).amax(0)
        z = z[deviation(model, z, g_HKK, layer).sum(1).topk(8).indices].clone()
        for _ in range(15):
            z.requires_grad_()
            now = deviation(model, z, g_HKK, layer)
            best = torch.maximum(best, now.detach().nan_to_num(0.0).amax(0))
            (gradient,) = torch.autograd.grad(now.log().sum(), z)
            step = gradient / gradient.norm(dim=-1, keepdim=True).clamp_min(1e-300)
            z = z.detach() + 0.3 * K**0.5 * step
            z = z - z.mean(-1, keepdim=True)
            z = z / z.norm(dim=-1, keepdim=True) * K**0.5
        worst.append(best.tolist())
    return worst


def _in_fp64(model: PLDRModel) -> PLDRModel:
    copy = PLDRModel(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.eval().double().requires_grad_(False)


def assert_above(proof: dict, worst: list[list[float]]) -> None:
    for bounds, largest in zip(proof["per_head"], worst, strict=True):
        for bound, value in zip(bounds, largest, strict=True):
            assert bound is None or bound >= value - ROUND_OFF, (bound, value)


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**31), decay=st.floats(-4, 0.5), eps=st.sampled_from([1e-6, 1e-5, 1e-2]))
def test_a_search_never_finds_more(seed: int, decay: float, eps: float) -> None:
    model = build(seed=seed, decay=10**decay, eps=eps, layers=2, units=3)
    g = cached(model)
    assert_above(prove(model, g), found(model, g))


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**31), decay=st.floats(-4, 0.5), eps=st.sampled_from([1e-6, 1e-2]))
def test_a_search_never_finds_more_without_glus(seed: int, decay: float, eps: float) -> None:
    model = build(seed=seed, decay=10**decay, eps=eps, glus=0)
    g = cached(model)
    assert_above(prove(model, g), found(model, g))


def test_layer_norms_alone_are_proven_to_forget_and_the_bound_is_near() -> None:
    """A unit without GLUs is LN(x): LN(x + x) would not be the same, for its epsilon."""
    model = build(seed=3, decay=0.1, glus=0, eps=1.0)  # it matters more than the variance
    g = cached(model)
    proof = prove(model, g)
    assert proof["closed"] and len(proof["by_unit"][0]) == 4
    for bound, value in zip(proof["per_head"][0], found(model, g)[0], strict=True):
        assert value <= bound < 10 * value
    forgot = build(seed=3, decay=1e-3, glus=0)
    assert prove(forgot, cached(forgot))["bound"] < 1e-6


@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    unit=st.integers(0, 2),
    where=st.sampled_from(["glus.0.w12.weight", "glus.1.w3.weight", "norm.weight", "norm.bias"]),
    size=st.sampled_from([1e2, 1e5, -1e3]),
)
def test_a_search_never_finds_more_in_a_model_that_was_tampered_with(seed, unit, where, size) -> None:  # type: ignore[no-untyped-def]
    model = build(seed=seed, decay=1e-2, units=3)
    weight = model.layers[0].attention.plga.metric_learner[unit].get_parameter(where)
    with torch.no_grad():
        weight.view(-1)[torch.randint(weight.numel(), ())] *= size
    g = cached(model)
    assert_above(prove(model, g), found(model, g))


def test_a_model_that_forgot_its_input_is_proven_and_one_that_did_not_is_not() -> None:
    forgot, fresh = build(seed=3, decay=1e-3, layers=2), build(seed=3, decay=1.0, layers=2)
    proof = prove(forgot, cached(forgot))
    assert set(proof) == KEYS and proof["closed"] and proof["reason"] is None
    assert proof["bound"] < 1e-6
    assert proof["bound"] == max(max(heads) for heads in proof["per_head"])
    assert all(radii == sorted(radii, reverse=True) for radii in proof["by_unit"]), "each unit forgets"
    g = cached(fresh)
    proof = prove(fresh, g)
    assert proof["bound"] is None or proof["bound"] >= max(max(heads) for heads in found(fresh, g)) > 1e-2


def test_the_bound_is_near_what_is_found() -> None:
    model = build(seed=5, decay=2e-2)
    g = cached(model)
    for bound, value in zip(prove(model, g)["per_head"][0], found(model, g)[0], strict=True):
        assert value <= bound < 10 * value


def add_gate(model: PLDRModel, direction: Tensor) -> None:
    """The second unit's GLUs are shut unless z of the first is within 14 degrees of `direction`; then they drown x."""
    plga = model.layers[0].attention.plga
    first, second = plga.metric_learner[0], plga.metric_learner[1]
    with torch.no_grad():
        for weight in (*first.glus.parameters(), *second.glus.parameters(), plga.density_norm.bias):
            weight.zero_()
        plga.density_norm.weight.fill_(1.0)  # so that rows are z, for the first unit too
        probe = direction / first.norm.weight / len(direction) ** 0.5
        opens, passes = second.glus
        opens.w12.weight[0], opens.w12.bias[0] = 1e3 * probe, -1e3 * (probe @ first.norm.bias + 0.97)
        opens.w3.weight[0, 0] = passes.w12.weight[0, 0] = 1.0
        opens.w12.bias[5] = passes.w12.bias[5] = 1.0  # the values that are gated
        passes.w3.weight[:, 0] = torch.randn(len(direction))


def test_a_gate_that_no_gradient_sees_is_not_proven() -> None:
    model = build(seed=8, decay=1e-4, units=2)
    K = model.config.head_dim
    assert prove(model, cached(model))["bound"] < 1e-4
    direction = torch.randn(K) - 0.2
    direction = (direction - direction.mean()) / (direction - direction.mean()).norm()
    add_gate(model, direction)
    g, wide = cached(model), _in_fp64(model)
    searched = max(found(model, g)[0])
    z = (direction.double() * K**0.5).expand(1, 2, K, K)
    opened = float(deviation(wide, z, g[0].double()).amax())
    assert searched < 1e-4 < opened, "the gate is there, and the search does not see it"
    bound = prove(model, g)["bound"]
    assert bound is None or bound >= opened


@pytest.mark.parametrize("second", [0.0, 0.3, 1.0])
def test_the_linear_part_is_above_ascent_and_near_it(second: float) -> None:
    K = 8
    torch.manual_seed(0)
    for _ in range(4):
        W, P, a, slope = (torch.randn(K, K).double() for _ in range(4))
        axes = torch.randn(K, K).double() * torch.tensor([1.0, *[second] * (K - 1)]).double()
        x = torch.randn(K, K).double().sign()
        for _ in range(200):  # rows of dA are axes x, |x| <= 1 for every row: ascent of a convex function
            forward = a @ (slope * (W @ (x @ axes.T)))
            x = (W.T @ (slope * (a.T @ forward))) @ axes
            x = x / x.norm(dim=1, keepdim=True)
        with precision(PRECISION_BITS):
            head = Head(*map(exact, (W, W, P, a, a)))
            bound = float(_linear_part(head, exact(slope), exact(axes @ axes.T)))
        largest = float((a @ (slope * (W @ (x @ axes.T)))).norm())
        assert largest <= bound * (1 + 1e-12) and bound < 3 * largest


def test_rows_that_leave_along_other_axes_count() -> None:
    K = 8
    shape, one = torch.eye(K) + 0.1, torch.eye(K)  # row i may reach sqrt(1.1) in column i, and only that reaches G
    with precision(PRECISION_BITS):
        assert float(_linear_part(Head(*[exact(one)] * 5), exact(one), exact(shape))) >= (1.1 * K) ** 0.5


def test_scores_stay_within_their_bound() -> None:
    model = build(seed=11, decay=0.1, layers=2)
    g_LHKK = cached(model)
    bounds = prove(model, g_LHKK)["score_bound"]
    wide, K = _in_fp64(model), 8
    for layer, norm in enumerate([wide.embedding_norm, wide.layers[0].feed_forward_norm]):
        attention = wide.layers[layer].attention
        x = torch.nn.functional.layer_norm(10 * torch.randn(1, 64, 16).double(), (16,), norm.weight, norm.bias)
        q, k, _ = attention.qkv(x).unflatten(-1, (6, K)).transpose(1, 2).chunk(3, dim=1)
        plga = attention.plga
        z = rows(wide, 40)[torch.randint(40, (2, K))]
        A = plga.metric_learner(z * plga.density_norm.weight + plga.density_norm.bias)
        dG = plga.power_law(A.unsqueeze(0)).G_LM - g_LHKK[layer].double()
        assert float((q @ dG @ k.mT / K**0.5).abs().max()) <= bounds[layer]


def test_what_yarn_multiplies_queries_and_keys_by_is_in_the_bound_of_scores() -> None:
    model = build(seed=11, decay=0.1)
    scaling = {"type": "yarn", "factor": 2, "original_context_length": 8, "attention_factor": 3.0}
    scaled = PLDRModel(replace(model.config, rope_scaling=scaling))
    scaled.load_state_dict(model.state_dict())
    plain, other = prove(model, cached(model)), prove(scaled, cached(model))
    assert other["per_head"] == plain["per_head"]
    assert other["score_bound"] == pytest.approx([9 * bound for bound in plain["score_bound"]], rel=1e-8)


def test_the_cached_g_is_part_of_the_bound() -> None:
    model = build(seed=3, decay=1e-3)
    g = cached(model)
    assert prove(model, 1.001 * g)["bound"] >= 9.9e-4
    proof = prove(model, torch.zeros_like(g))
    assert proof["bound"] is None and not proof["closed"] and "cached G is zero" in proof["reason"]


def test_constant_g_needs_no_proof() -> None:
    model = PLDRModel(build(seed=3, decay=1.0).config.with_frozen_g("parameter"))
    assert prove(model, model.constant_g()) == {}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_prove_nothing(value: float) -> None:
    model = build(seed=3, decay=1e-3)
    g = cached(model)
    with torch.no_grad():
        model.layers[0].attention.plga.metric_learner[1].norm.weight[2] = value
    proof = prove(model, g)
    assert set(proof) == KEYS and not proof["closed"] and "not finite" in proof["reason"]


@pytest.mark.parametrize("what", ["norm.weight", "glus.0.w12.weight"])
@pytest.mark.parametrize("value", [0.0, 3e38])
def test_weights_at_the_ends_of_their_range_give_a_bound_or_none(what: str, value: float) -> None:
    model = build(seed=3, decay=1e-2, units=2)
    with torch.no_grad():
        model.layers[0].attention.plga.metric_learner[0].get_parameter(what).fill_(value)
    g = cached(model).nan_to_num(1.0, 1.0, 1.0)
    assert_above(prove(model, g), found(model, g))
