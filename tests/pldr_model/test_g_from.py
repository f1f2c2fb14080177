"""Whose G a sequence of a batch uses: the numbers and gradients of the definition, what each sequence sees, what is deduced."""

import copy
from dataclasses import replace

import pytest
import torch

from pldr_model.loss import cross_entropy, losses_of_logits, total_loss
from pldr_model.model import PLDRModel, set_activation_checkpointing
from tests.helpers.definition import logits_by_definition

B, S = 3, 17


@pytest.fixture
def model(tiny):
    return PLDRModel(tiny).double()


@pytest.fixture
def ids():
    return torch.randint(4, 61, (B, S))


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def padded(ids):
    """Padding at the ends, most in the first sequence, which lends its G."""
    return ids * (torch.arange(ids.shape[1]) < torch.tensor([[9], [17], [14]]))


@pytest.mark.parametrize("g_from", ["own", "batch", "neighbor"])
@pytest.mark.parametrize("change", [lambda ids: ids, padded], ids=["full", "padded"])
@pytest.mark.parametrize("recompute", ["none", "layer", "metric_learner"])
def test_logits_and_gradients_are_those_of_the_definition(model, ids, g_from, change, recompute):
    ids = change(ids)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    plain = copy.deepcopy(model)
    set_activation_checkpointing(model, recompute)
    ours, theirs = model(inputs, g_from=g_from), logits_by_definition(plain, inputs, g_from)[0]
    assert (ours - theirs).abs().max() < 1e-11
    one, other = (gradient(m, cross_entropy(x, targets, pad_id=0)) for m, x in ((model, ours), (plain, theirs)))
    assert (one - other).norm() < 1e-9 * other.norm()
    if g_from != "own":
        assert (one - gradient(model, cross_entropy(model(inputs), targets, pad_id=0))).norm() > 1e-2 * one.norm()


def test_with_batch_only_the_first_sequence_deduces(model, ids):
    rows = []
    for layer in model.layers:
        layer.attention.plga.metric_learner.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    _, outputs = model(ids, g_from="batch", return_outputs=True)
    assert rows == [1, 1]
    _, alone = model(ids[:1], return_outputs=True)
    for ours, right in zip(outputs, alone, strict=True):
        for field in ("A", "A_LM", "A_P", "G_LM"):
            assert getattr(ours, field).shape == (1, 2, 8, 8)
            assert torch.allclose(getattr(ours, field), getattr(right, field), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("g_from", ["batch", "neighbor"])
def test_the_dag_regularizer_is_of_what_was_deduced(tiny, ids, g_from):
    config = replace(tiny, dag_coefficients=(0.01, 0.0, 0.02))
    model = PLDRModel(config).double()
    tokens, outputs = model(ids[:, :-1], targets=ids[:, 1:], g_from=g_from, return_outputs=True)
    ours = total_loss(tokens, config, outputs=outputs)
    theirs, deduced = logits_by_definition(model, ids[:, :-1], g_from)
    used = [alone[0] for alone in deduced] if g_from == "batch" else [one for alone in deduced for one in alone]
    right = total_loss(losses_of_logits(theirs, ids[:, 1:]), config, outputs=used)
    assert torch.allclose(ours.total, right.total, rtol=1e-10)
    one, other = gradient(model, ours.total), gradient(model, right.total)
    assert (one - other).norm() < 1e-9 * other.norm()


def sees_its_future(model, ids, row, g_from):
    """Whether logits before a sequence's last token depend on that token."""
    changed = ids.clone()
    changed[row, -1] = (ids[row, -1] + 1) % 57 + 4
    with torch.no_grad():
        return bool(((model(ids, g_from=g_from) - model(changed, g_from=g_from))[row, :-1] != 0).any())


def test_which_sequences_see_their_own_future(model, ids):
    assert [sees_its_future(model, ids, row, "own") for row in range(B)] == [True] * 3
    assert [sees_its_future(model, ids, row, "batch") for row in range(B)] == [True, False, False]
    # Around the circle of neighbors what a sequence lends comes back to it after as many layers as there are sequences.
    assert [sees_its_future(model, ids, row, "neighbor") for row in range(B)] == [False] * 3
    assert [sees_its_future(model, ids[:2], row, "neighbor") for row in range(2)] == [True] * 2


def test_where_there_is_no_other_g_it_is_refused(model, ids, tiny):
    with pytest.raises(ValueError, match="g_from 'neighbor': a batch of one sequence"):
        model(ids[:1], g_from="neighbor")
    with pytest.raises(ValueError, match="g_from 'batch': no metric learner runs"):
        model(ids, g_from="batch", g_lm=torch.zeros(2, 2, 8, 8))
    with pytest.raises(ValueError, match="g_from 'neighbor': no metric learner runs"):
        PLDRModel(tiny.sdpa_twin())(ids, g_from="neighbor")


def test_flops_count_what_is_deduced(tiny):
    own, twin = tiny.flops_per_token(training=False), tiny.sdpa_twin().flops_per_token(training=False)
    product = 2 * 2 * 8 * 16  # layers x q G
    shared = tiny.flops_per_token(training=False, sequences_per_g=4)
    assert shared - twin - product == pytest.approx((own - twin - product) / 4)
    assert tiny.flops_per_token(training=True, sequences_per_g=4) == pytest.approx(3 * shared)
