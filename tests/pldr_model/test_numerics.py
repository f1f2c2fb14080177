"""Initialization, precision, compilation, and the regularizer where naive arithmetic overflows."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pldr_model import layers
from pldr_model.config import ModelConfig
from pldr_model.layers import GatedLinear, Linear
from pldr_model.loss import cross_entropy, dag_regularizer, total_loss
from pldr_model.model import PLDRModel


def test_fused_matrices_are_drawn_one_by_one():
    """Xavier-uniform with each matrix's own fan, wv among them (the reference forgets it), biases zero."""
    config = ModelConfig(vocab_size=500, num_layers=1, num_heads=4, head_dim=16, context_length=8, d_ff=100, A_dff=40)
    model = PLDRModel(config)
    attention = model.layers[0].attention
    unit = attention.plga.metric_learner[0].glus[1]
    drawn = [(part, 64, 64) for part in attention.qkv.weight.chunk(3)] + [(attention.output.weight, 64, 64)]
    drawn += [(part, 64, 100) for part in model.layers[0].feed_forward.w12.weight.chunk(2)]
    drawn += [(part, 16, 40) for part in unit.w12.weight.chunk(2)] + [(unit.w3.weight, 40, 16)]
    drawn += [(model.output.weight, 64, 500)]
    for weight, fan_in, fan_out in drawn:
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert weight.abs().max() <= bound
        assert weight.abs().max() > 0.97 * bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    assert len(linears) == 5 + 8 * 2 * 2
    assert all((linear.bias == 0).all() for linear in linears)
    assert model.embedding.weight.std().item() == pytest.approx(1, rel=0.05)


def test_power_law_tensors_start_where_the_papers_start():
    config = ModelConfig(vocab_size=50, num_layers=1, num_heads=4, head_dim=32, context_length=64)
    model = PLDRModel(config)
    plga = model.layers[0].attention.plga
    std = math.sqrt(2 / (32 * 32 + 4 * 32))  # torch's fans of a [H,K,K] tensor
    for drawn in (plga.W, plga.P, plga.a):
        assert drawn.std().item() == pytest.approx(std, rel=0.05)
    assert (plga.b == 0).all()
    assert (plga.b_a == 0).all()
    _, (outputs,) = model(torch.randint(4, 50, (2, 64)), return_outputs=True)
    assert outputs.A_LM.min() >= 1e-9
    assert outputs.A_P.median().item() == pytest.approx(1, abs=0.3)  # P ~ 0


def test_weights_come_from_the_global_generator(tiny):
    torch.manual_seed(3)
    first = PLDRModel(tiny).state_dict()
    torch.manual_seed(3)
    second = PLDRModel(tiny).state_dict()
    torch.manual_seed(4)
    third = PLDRModel(tiny).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], third["embedding.weight"])


def test_bf16_weights_train_with_wide_powers(tiny):
    model = PLDRModel(tiny)
    ids = torch.randint(4, 61, (2, 48))
    wide = model(ids, g_lm=torch.eye(8).expand(2, 2, 8, 8))
    model.bfloat16()
    logits, outputs = model(ids, return_outputs=True)
    assert logits.dtype == torch.bfloat16
    assert {layer.G_LM.dtype for layer in outputs} == {torch.float32}
    cross_entropy(logits, ids).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    narrow = model(ids, g_lm=torch.eye(8).expand(2, 2, 8, 8)).float()
    assert (narrow - wide).abs().max() < 0.1 * wide.std()


def test_autocast_keeps_the_power_law_in_fp32(tiny):
    model = PLDRModel(tiny)
    ids = torch.randint(4, 61, (2, 20))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, outputs = model(ids, return_outputs=True)
    assert logits.dtype == torch.bfloat16
    assert {layer.A_P.dtype for layer in outputs} == {torch.float32}


def test_cross_entropy_ignores_padding_targets():
    logits = torch.randn(2, 5, 7, dtype=torch.float64)
    targets = torch.tensor([[1, 2, 3, 0, 0], [4, 5, 6, 1, 0]])
    by_hand = -torch.stack([logits[b, s].log_softmax(-1)[targets[b, s]] for b, s in (targets > 0).nonzero()]).mean()
    assert cross_entropy(logits, targets) == pytest.approx(by_hand.item(), abs=1e-12)
    changed = logits.clone()
    changed[:, -1] += torch.randn(7)
    assert cross_entropy(changed, targets) == cross_entropy(logits, targets)


def test_total_loss_adds_only_the_terms_asked_for(tiny):
    config = ModelConfig.from_dict({**tiny.to_dict(), "dag_coefficients": [0.5, 0.0, 0.25]})
    model = PLDRModel(config)
    ids = torch.randint(4, 61, (2, 21))
    tokens, outputs = model(ids[:, :-1], targets=ids[:, 1:], return_outputs=True)
    losses = total_loss(tokens, config, outputs=outputs)
    assert set(losses.dag) == {"A_LM", "G_LM"}
    by_hand = losses.cross_entropy + 0.5 * losses.dag["A_LM"] + 0.25 * losses.dag["G_LM"]
    assert losses.total.item() == pytest.approx(by_hand.item(), rel=1e-6)
    plain = total_loss(tokens, tiny)
    assert plain.dag == {}
    assert plain.total is tokens.loss and plain.total == plain.cross_entropy


def naive_dag(x):
    h = torch.linalg.matrix_exp(x * x).diagonal(dim1=-2, dim2=-1).sum(-1)
    return (h / x.shape[-1]).log().abs().mean()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 4.0), size=st.integers(1, 9))
def test_dag_term_and_gradient_equal_the_naive_ones_where_those_exist(seed, scale, size):
    x = scale * torch.randn(3, 2, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ours, naive = x.clone().requires_grad_(), x.clone().requires_grad_()
    value = dag_regularizer([ours])
    expected = naive_dag(naive)
    assert value.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)
    value.backward()
    expected.backward()
    assert torch.allclose(ours.grad, naive.grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("exponent", [87.0, 90.0, 700.0, 1e4, 1e12])
def test_dag_term_beyond_overflow(exponent):
    """X = sqrt(c) I has tr(expm(X∘X)) / K = e^c: fp32 overflows at c = 88, fp64 at 709."""
    x = torch.full((2, 1, 6), math.sqrt(exponent)).diag_embed().requires_grad_()
    value = dag_regularizer([x])
    assert value.item() == pytest.approx(exponent, rel=1e-6)
    value.backward()
    assert x.grad.isfinite().all()
    # d/dX_ii of mean_N log(tr/K) = 2 X_ii / (K N)
    assert x.grad[0, 0, 0, 0].item() == pytest.approx(2 * math.sqrt(exponent) / (6 * 2), rel=1e-5)


def test_dag_term_vanishes_on_a_directed_acyclic_graph():
    assert dag_regularizer([torch.randn(2, 3, 5, 5).tril(-1)]).item() == pytest.approx(0, abs=1e-12)


def test_dag_term_refuses_what_is_not_finite():
    x = torch.ones(1, 1, 3, 3)
    x[0, 0, 1, 1] = float("nan")
    with pytest.raises(FloatingPointError, match="A_P holds inf or NaN"):
        dag_regularizer([x], name="A_P")


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"num_denseA": 0},
        {"g_source": "random"},
        {"g_source": "constant", "g_constraint": "low_rank", "g_rank": 2},
        {"g_source": "constant", "g_constraint": "rotary"},
        {"g_source": "constant", "g_constraint": "nonrotary"},
    ],
    ids=str,
)
def test_a_layer_traces_as_one_graph(tiny, variant):
    """fullgraph: a graph break inside a layer is an error. aot_eager traces as the compiler does, without its code. In fp64:
    eager, the metric learner is another function, and PLGA makes much of what fp32 rounds."""
    model = PLDRModel(ModelConfig.from_dict({**tiny.to_dict(), **variant})).double()
    ids = torch.randint(4, 61, (2, 16))
    eager = model(ids, padded=False)
    eager.sum().backward()
    gradient = model.output.weight.grad.clone()
    model.zero_grad()
    for layer in model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    compiled = model(ids, padded=False)
    compiled.sum().backward()
    assert (compiled - eager).abs().max() < 1e-10
    assert (model.output.weight.grad - gradient).abs().max() < 1e-10


@pytest.mark.slow
def test_compiled_layers_compute_the_same(tiny):
    model = PLDRModel(tiny)
    ids = torch.randint(4, 61, (2, 16))
    eager = model(ids, padded=False)
    for layer in model.layers:
        layer.compile(fullgraph=True)
    compiled = model(ids, padded=False)
    compiled.sum().backward()
    assert (compiled - eager).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_large_gated_linear_has_the_bits_of_autograd_and_keeps_its_input_only(dtype, monkeypatch):
    torch.manual_seed(0)
    linear = GatedLinear(7, 4).to(dtype)
    x, grad = torch.randn(5, 3, 14, dtype=dtype, requires_grad=True), torch.randn(5, 3, 4, dtype=dtype)
    right = linear(x)
    monkeypatch.setattr(layers, "LEAN_FROM", 0)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        ours = linear(x)
    assert torch.equal(ours, right)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr(), linear.weight.data_ptr()]
    for mine, theirs in zip(
        *(torch.autograd.grad(y, [x, *linear.parameters()], grad) for y in (ours, right)), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_a_large_gated_linear_can_be_differentiated_twice(monkeypatch):
    monkeypatch.setattr(layers, "LEAN_FROM", 0)
    linear = GatedLinear(7, 4).double()
    x = torch.randn(3, 14, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(linear, [x]) and torch.autograd.gradgradcheck(linear, [x])


def test_a_frozen_gated_linear_has_the_gradient_of_its_input(monkeypatch):
    monkeypatch.setattr(layers, "LEAN_FROM", 0)
    linear = GatedLinear(7, 4).double().requires_grad_(False)
    assert torch.autograd.gradcheck(linear, [torch.randn(3, 14, dtype=torch.float64, requires_grad=True)])
