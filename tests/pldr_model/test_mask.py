"""Document masks: a packed sequence read with them is each of its documents read alone, where G_LM does not sum over all."""

import dataclasses

import pytest
import torch

from pldr_model.config import ModelConfig
from pldr_model.mask import attention_mask, document_starts
from pldr_model.model import PLDRModel, set_activation_checkpointing

CONFIG = ModelConfig(vocab_size=48, num_layers=2, num_heads=2, head_dim=8, context_length=24, A_dff=8, num_reslayerA=2)
LENGTHS = ((7, 1, 9, 7), (24,), (5, 3, 6))  # of the documents of each row; the last is padded
EXACT = 1e-12


@pytest.fixture(autouse=True)
def fp64():
    torch.manual_seed(3)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def model_of(**changes):
    model = PLDRModel(dataclasses.replace(CONFIG, **changes))
    if model.config.g_source == "constant":  # it starts at the identity
        with torch.no_grad():
            for layer in model.layers:
                layer.attention.plga.G_LM.normal_()
    return model


def packed():
    """ids and documents [3, 24], numbered from 1 in each row, 0 for padding."""
    ids, documents = torch.zeros(2, len(LENGTHS), 24, dtype=torch.long)
    for row, lengths in enumerate(LENGTHS):
        numbers = torch.repeat_interleave(torch.arange(1, len(lengths) + 1), torch.tensor(lengths))
        documents[row, : len(numbers)] = numbers
        ids[row, : len(numbers)] = torch.randint(4, 48, (len(numbers),))
    return ids, documents


def alone(read, ids):
    """What `read` makes of each document by itself, packed again."""
    rows = []
    for row, lengths in enumerate(LENGTHS):
        pieces = ids[row, : sum(lengths)].split(lengths)
        rows.append(torch.cat([read(piece.unsqueeze(0))[0] for piece in pieces]))
    return rows


def off(rows, packed_BSV):
    return max(float((row - packed_BSV[i, : len(row)]).detach().abs().max()) for i, row in enumerate(rows))


def weight_gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("style", ["interleaved", "half"])
@pytest.mark.parametrize("source", ["identity", "random", "constant", "given"])
def test_a_packed_sequence_is_its_documents_alone(source, style):
    """Logits of every token, and gradients."""
    model = model_of(g_source="learned" if source == "given" else source, rope_style=style)
    g = {"g_lm": torch.randn(2, 2, 8, 8)} if source == "given" else {}
    ids, documents = packed()
    logits = model(ids, documents=documents, **g)
    rows = alone(lambda piece: model(piece, padded=False, **g), ids)
    assert off(rows, logits) < EXACT
    probe = torch.randn(3, 24, 48)
    sum((row * probe[i, : len(row)]).sum() for i, row in enumerate(rows)).backward()
    right = weight_gradients(model)
    model.zero_grad()
    (logits * probe * (documents > 0).unsqueeze(-1)).sum().backward()
    assert (weight_gradients(model) - right).norm() / right.norm() < EXACT


def test_positions_restart_because_with_a_g_between_them_scores_depend_on_more_than_differences():
    """A document 7 tokens further on reads the same with G = identity, and not with another G."""
    for source, moves in (("identity", False), ("random", True)):
        model = model_of(g_source=source)
        rope, ids = model._enter(torch.zeros(1, 24, dtype=torch.long), False)[1], torch.randint(4, 48, (1, 9))
        x = model._embed(ids)
        here, there = (type(rope)(rope.cos[at : at + 9], rope.sin[at : at + 9]) for at in (0, 7))
        g = None if source == "identity" else model.g_lm[0]
        change = (model.layers[0](x, here, g=g)[0] - model.layers[0](x, there, g=g)[0]).abs().max()
        assert (change > 1e-3) if moves else (change < EXACT)


def test_a_learned_g_still_sees_all_documents_of_the_sequence():
    """Attention is masked, so only G carries anything over: with it held as it was, nothing does."""
    model = model_of()
    ids, documents = packed()
    logits, outputs = model(ids, documents=documents, return_outputs=True)
    changed = ids.clone()
    changed[0, 17:] = torch.randint(4, 48, (7,))  # the last document of row 0
    assert (model(changed, documents=documents)[0, :17] - logits[0, :17]).abs().max() > 1e-6
    held = torch.stack([layer.G_LM for layer in outputs])
    assert (model(changed, documents=documents, g_lm=held)[0, :17] - logits[0, :17]).abs().max() < EXACT


@pytest.mark.parametrize("padded", [None, True, False])
def test_padding_reaches_no_text(padded):
    model = model_of(g_source="random")
    ids, documents = packed()
    assert (
        off(alone(lambda piece: model(piece, padded=False), ids), model(ids, documents=documents, padded=padded))
        < EXACT
    )


def test_one_document_a_sequence_is_causal_attention():
    model = model_of()
    ids = torch.randint(4, 48, (2, 24))
    assert (model(ids, documents=torch.ones_like(ids)) - model(ids)).abs().max() < EXACT


def test_the_mask_written_out():
    documents = torch.tensor([[5, 5, 2, 2, 2, 5]])  # a number that comes again is another document
    assert document_starts(documents).tolist() == [[0, 0, 2, 2, 2, 5]]
    mask = attention_mask(torch.tensor([[False, False, False, True, False, True]]), document_starts(documents))
    rows = ["100000", "110000", "001000", "001000", "001010", "000001"]
    assert mask[0, 0].int().tolist() == [[int(bit) for bit in row] for row in rows]


def test_layers_that_are_computed_again_have_the_same_gradient():
    model = model_of()
    ids, documents = packed()
    found = []
    for what in ("none", "layer", "metric_learner"):
        set_activation_checkpointing(model, what)
        model.zero_grad()
        model(ids, documents=documents).square().mean().backward()
        found.append(weight_gradients(model))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_documents_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"documents: shape \(2, 5\) is not that of the ids, \(2, 4\)"):
        model_of()(torch.ones(2, 4, dtype=torch.long), documents=torch.ones(2, 5, dtype=torch.long))
