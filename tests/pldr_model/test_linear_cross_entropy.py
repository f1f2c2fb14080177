"""Losses without whole logits: those of plain PyTorch, their gradients, and the largest tensor on the way."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pldr_model import linear_cross_entropy as module
from pldr_model.config import ModelConfig
from pldr_model.linear_cross_entropy import linear_cross_entropy
from pldr_model.loss import losses_of_logits, total_loss
from pldr_model.model import PLDRModel

N, D, V = 37, 24, 101  # N is no multiple of 8, the rows of a chunk


def inputs(dtype, padded=True):
    generator = torch.Generator().manual_seed(1)
    x, w, b = (
        torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype) for size in ((N, D), (V, D), (V,))
    )
    target = torch.randint(1, V, (N,), generator=generator)
    if padded:
        target[::5] = 0
    return [each.requires_grad_() for each in (x, w, b)], target


def plain(x, w, b, target, z_loss):
    """Written out: sums over rows whose target is not 0."""
    logits = F.linear(x, w, b).to(torch.promote_types(x.dtype, torch.float32))
    real = target != 0
    nll = -logits.log_softmax(-1).gather(1, target[:, None]).squeeze(1)
    return (nll[real] + z_loss * logits[real].exp().sum(-1).log() ** 2).sum(), nll * real


def relative(ours, right):
    return ((ours.double() - right.double()).norm() / right.double().norm()).item()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("rows", [1, 8, N, 1000])
def test_losses_and_gradients_are_those_of_plain_pytorch(dtype, tolerance, z_loss, rows):
    parameters, target = inputs(dtype)
    ours = linear_cross_entropy(*parameters, target, ignore=0, z_loss=z_loss, rows=rows)
    total, nll = plain(*parameters, target, z_loss)
    assert ours.total.dtype == ours.nll_N.dtype == torch.promote_types(dtype, torch.float32)
    assert relative(ours.total, total) < min(tolerance, 1e-5) and relative(ours.nll_N, nll) < min(tolerance, 1e-5)
    gradients = torch.autograd.grad(0.3 * ours.total, parameters)
    for found, right in zip(gradients, torch.autograd.grad(0.3 * total, parameters), strict=True):
        assert found.dtype == dtype and relative(found, right) < tolerance


def test_the_same_without_a_gradient_and_with_some_of_them():
    (x, w, b), target = inputs(torch.float64)
    expected = linear_cross_entropy(x, w, b, target, ignore=0, rows=8)
    with torch.no_grad():
        found = linear_cross_entropy(x, w, b, target, ignore=0, rows=8)
    assert torch.equal(found.total, expected.total.detach()) and torch.equal(found.nll_N, expected.nll_N)
    assert not found.total.requires_grad and not expected.nll_N.requires_grad
    total = linear_cross_entropy(x, w.detach(), b.detach(), target, ignore=0, rows=8).total
    (x_grad,) = torch.autograd.grad(total, [x])
    assert relative(x_grad, torch.autograd.grad(expected.total, [x])[0]) < 1e-15


def test_only_padding_is_zero_and_has_no_gradient():
    parameters, target = inputs(torch.float32)
    total, nll_N = linear_cross_entropy(*parameters, torch.zeros_like(target), ignore=0, z_loss=0.1, rows=8)
    assert total.item() == 0 and (nll_N == 0).all()
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(total, parameters))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_shows(bad):
    parameters, target = inputs(torch.float32, padded=False)
    parameters[0].data[20, 3] = bad
    total, nll_N = linear_cross_entropy(*parameters, target, ignore=0, rows=8)
    assert not total.isfinite() and nll_N.isfinite().sum() == N - 1
    gradients = torch.autograd.grad(total * torch.nan, parameters)  # as step.py does
    assert not any(gradient.isfinite().any() for gradient in gradients)


def test_a_second_backward_pass_is_refused():
    parameters, target = inputs(torch.float32)
    total = linear_cross_entropy(*parameters, target, ignore=0).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up by the first backward pass"):
        total.backward()


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch 2.13 has it")
def test_torchs_own_agrees_in_fp64_and_rounds_in_bf16():
    """Why an own loop: the module's docstring."""
    (x, w, b), target = inputs(torch.float64)

    def theirs(x, w, b):
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=8)
        return F.linear_cross_entropy(x, w, target, linear_bias=b, reduction="sum", ignore_index=0, options=options)

    ours = linear_cross_entropy(x, w, b, target, ignore=0, rows=8).total
    right = theirs(x, w, b)
    assert relative(ours, right) < 1e-14
    for one, other in zip(*(torch.autograd.grad(total, (x, w, b)) for total in (ours, right)), strict=True):
        assert relative(one, other) < 1e-14
    x, w, b = (each.detach().bfloat16() for each in (x, w, b))
    assert theirs(x, w, b).dtype == torch.bfloat16
    assert linear_cross_entropy(x, w, b, target, ignore=0, rows=8).total.dtype == torch.float32


class Largest(TorchDispatchMode):
    """The most elements that a tensor made inside has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *made])
        return result


@pytest.fixture(scope="module")
def config():
    return ModelConfig(num_layers=1, num_heads=2, head_dim=8, vocab_size=997, context_length=64, d_ff=16, A_dff=8,
                       num_reslayerA=1, num_denseA=1, dag_coefficients=(0.1, 0.0, 0.1))  # fmt: skip


def test_no_tensor_of_all_logits_exists(config, monkeypatch):
    monkeypatch.setitem(module.CHUNK_ROWS, "cpu", 20)
    model, ids = PLDRModel(config), torch.randint(4, 997, (4, 65))
    with Largest() as seen:
        tokens, outputs = model(ids[:, :-1], targets=ids[:, 1:], return_outputs=True)
        total_loss(tokens, config, outputs=outputs).total.backward()
        with torch.no_grad():
            model(ids[:, :-1], targets=ids[:, 1:])
    assert seen.elements == 20 * config.vocab_size < 4 * 64 * config.vocab_size
    with Largest() as seen:
        losses_of_logits(model(ids[:, :-1]), ids[:, 1:]).loss.backward()
    assert seen.elements == 4 * 64 * config.vocab_size


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_the_models_losses_are_those_of_its_logits(config, monkeypatch, z_loss):
    monkeypatch.setitem(module.CHUNK_ROWS, "cpu", 20)
    torch.manual_seed(0)
    model, ids = PLDRModel(config).double(), torch.randint(4, 997, (3, 65))
    ids[1, 40:] = 0
    logits, deduced = model(ids[:, :-1], return_outputs=True)
    right = losses_of_logits(logits, ids[:, 1:], z_loss=z_loss)
    found, outputs = model(ids[:, :-1], targets=ids[:, 1:], z_loss=z_loss, return_outputs=True)
    assert (found.nll_BS - right.nll_BS).abs().max() < 1e-12 and found.nll_BS.shape == (3, 64)
    by_hand = right.nll_BS.sum() / (ids[:, 1:] != 0).sum()
    assert abs(found.cross_entropy - by_hand) < 1e-12 and abs(found.loss - right.loss) < 1e-12
    assert (found.loss > found.cross_entropy) == (z_loss > 0)
    gradients = []
    for tokens, kept in ((found, outputs), (right, deduced)):
        weight = torch.tensor(0.7, dtype=torch.float64)
        total_loss(tokens, config, outputs=kept, weight=weight).total.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        model.zero_grad()
    assert relative(*gradients) < 1e-12


def test_a_model_that_is_compiled_as_a_whole_has_the_same_losses(config):
    """In one graph, of whole logits. aot_eager traces as the compiler does, without its code."""
    torch.manual_seed(0)
    model, ids = PLDRModel(config).double(), torch.randint(4, 997, (2, 33))
    right = model(ids[:, :-1], targets=ids[:, 1:], padded=False)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = compiled(ids[:, :-1], targets=ids[:, 1:], padded=False)
    assert abs(found.loss - right.loss) < 1e-12 and (found.nll_BS - right.nll_BS).abs().max() < 1e-12
    gradients = [torch.autograd.grad(tokens.loss, model.output.weight)[0] for tokens in (right, found)]
    assert relative(*gradients) < 1e-12
