"""The metric learner as one function, against its modules: results and gradients, what it keeps, where it is not used."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pldr_model import metric_learner
from pldr_model.config import ModelConfig
from pldr_model.metric_learner import MetricLearner, run_as_modules

TOO_FAR = 1e-12


def learner(num_reslayerA: int = 3, num_denseA: int = 2, *, dtype: torch.dtype = torch.float64) -> MetricLearner:
    """With norms and biases that are not those of the start."""
    torch.manual_seed(num_reslayerA)
    sizes = {"vocab_size": 20, "context_length": 8, "num_layers": 1, "num_heads": 2, "head_dim": 6, "A_dff": 5}
    module = MetricLearner(ModelConfig(**sizes, num_reslayerA=num_reslayerA, num_denseA=num_denseA))
    for weight in module.parameters():
        if weight.dim() == 1:
            nn.init.normal_(weight)
    return module.to(dtype)


def gradients(module: MetricLearner, x: torch.Tensor, *, fused: bool) -> list[torch.Tensor]:
    """The result, and the gradients of a sum with random weights, of the rows and of every parameter that is trained."""
    module.fused = fused
    x = x.clone().requires_grad_()
    out = module(x)
    weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), [x, *trained])]


@pytest.mark.parametrize("units, glus", [(1, 1), (3, 2), (2, 3)])
def test_results_and_gradients_are_the_modules(units, glus):
    module = learner(units, glus)
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    ours, theirs = gradients(module, x, fused=True), gradients(module, x, fused=False)
    assert len(ours) == 2 + units * (4 * glus + 2)
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= TOO_FAR * other.abs().max()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_half_and_single_precision(dtype, tolerance):
    module = learner(dtype=dtype)
    x = torch.randn(2, 2, 6, 6).to(dtype)
    for one, other in zip(gradients(module, x, fused=True), gradients(module, x, fused=False), strict=True):
        assert one.dtype == dtype
        assert (one - other).abs().max() <= tolerance * other.abs().max()


def test_rows_that_do_not_lie_together_and_weights_that_are_not_trained():
    module = learner()
    x = torch.randn(6, 2, 2, 6, dtype=torch.float64).permute(1, 2, 0, 3)
    for part in (module[0].requires_grad_(False), module.requires_grad_(False)):
        assert part is not None
        for one, other in zip(gradients(module, x, fused=True), gradients(module, x, fused=False), strict=True):
            assert (one - other).abs().max() <= TOO_FAR * other.abs().max()


def test_a_second_backward_pass_gives_the_same():
    """Nothing that is kept is written to."""
    module = learner()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    out = module(x).square().sum()
    first = torch.autograd.grad(out, [x, *module.parameters()], retain_graph=True)
    assert all(a.equal(b) for a, b in zip(first, torch.autograd.grad(out, [x, *module.parameters()]), strict=True))


def test_recomputed_in_the_backward_pass_it_gives_the_same():
    module = learner()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    wanted = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])
    again = checkpoint(module, x, use_reentrant=False, preserve_rng_state=False)
    got = torch.autograd.grad(again.square().sum(), [x, *module.parameters()])
    assert all(a.equal(b) for a, b in zip(got, wanted, strict=True))


def test_it_keeps_less_than_the_modules_for_the_backward_pass():
    module, x, kept = learner(), torch.randn(40, 6, dtype=torch.float64, requires_grad=True), {}
    weights = {weight.data_ptr() for weight in module.parameters()}
    for module.fused in (True, False):
        seen = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, seen=seen: seen.setdefault(t.data_ptr(), t), lambda t: t
        ):
            module(x)
        kept[module.fused] = sum(t.numel() for place, t in seen.items() if place not in weights)
    assert kept[True] < 0.65 * kept[False]


def test_without_gradients_and_under_autocast_the_modules_run():
    module = learner(dtype=torch.float32)
    ran = []
    module[0].register_forward_hook(lambda *_: ran.append(1))
    x = torch.randn(3, 6)
    module(x)
    assert not ran
    with torch.no_grad():
        module(x)
    with torch.autocast("cpu", torch.bfloat16):
        module(x)
    assert len(ran) == 2


def test_where_a_run_gathers_weights_by_module_the_modules_run():
    """ZeRO-3 (pipeline/train/engine.py)."""
    module, ran = learner(), []
    module[2].glus[1].w3.register_forward_hook(lambda *_: ran.append(1))
    run_as_modules(nn.Sequential(module))
    module(torch.randn(3, 6, dtype=torch.float64))
    assert ran


def test_a_copy_and_a_loaded_state_have_weights_of_their_own():
    module = learner()
    x, other = torch.randn(3, 6, dtype=torch.float64), copy.deepcopy(module)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(2)
    assert not torch.allclose(other(x), module(x))
    module.load_state_dict(other.state_dict())
    assert module(x).equal(other(x))


def test_without_glus_a_unit_is_layer_norm_alone(monkeypatch):
    """In both directions, also where the function or its kernels would run otherwise."""
    module = learner(3, 0)
    monkeypatch.setattr(metric_learner, "_functions", None)  # would raise
    monkeypatch.setenv("PLDR_METRIC_LEARNER", "triton")
    x = torch.randn(4, 6, dtype=torch.float64)
    got = gradients(module, x, fused=True)
    y = x = x.requires_grad_()
    for unit in module:
        centered = y - y.mean(-1, keepdim=True)
        spread = (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        y = centered / spread * unit.norm.weight + unit.norm.bias
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    wanted = [y.detach(), *torch.autograd.grad((y * weights).sum(), [x, *module.parameters()])]
    assert len(got) == 2 + 3 * 2
    for one, other in zip(got, wanted, strict=True):
        assert (one - other).abs().max() <= TOO_FAR * other.abs().max()
    assert list(module.state_dict()) == [f"{unit}.norm.{name}" for unit in range(3) for name in ("weight", "bias")]
