"""Read in pieces, with padding at the end of rows, a sequence gives what one full pass gives."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from pldr_model.config import ModelConfig
from pldr_model.model import PLDRModel

CONFIG = ModelConfig(
    vocab_size=24, num_layers=2, num_heads=2, head_dim=4, context_length=24, A_dff=4, g_source="random"
)


@pytest.fixture(scope="module")
def model() -> PLDRModel:
    torch.manual_seed(0)
    return PLDRModel(CONFIG).double().eval()


@st.composite
def rows(draw: st.DrawFn) -> list[list[list[int]]]:
    """Of each row its pieces; the same number of pieces in all."""
    num_rows, num_pieces = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    piece = st.lists(st.integers(0, CONFIG.vocab_size - 1), min_size=1, max_size=5)
    return [[draw(piece) for _ in range(num_pieces)] for _ in range(num_rows)]


def padded(pieces: list[list[int]]) -> torch.Tensor:
    longest = max(map(len, pieces))
    return torch.tensor([piece + [1] * (longest - len(piece)) for piece in pieces])


@settings(max_examples=60, deadline=None)
@given(rows(), st.data())
@torch.inference_mode()
def test_pieces_are_the_full_pass(model: PLDRModel, read: list[list[list[int]]], data: st.DataObject) -> None:
    """In between rows are forked: each may be continued by several, in any order."""
    cache = model.new_cache(batch_size=len(read), capacity=max(len(row[0]) for row in read))
    hidden = model.read(padded([row[0] for row in read]), cache, lengths=[len(row[0]) for row in read])
    held = [row[0] for row in read]
    for step in range(1, len(read[0])):
        sources = data.draw(st.lists(st.integers(0, len(held) - 1), min_size=1, max_size=4))
        pieces = [read[source % len(read)][step][: 1 + index] for index, source in enumerate(sources)]
        cache = cache.fork(sources, room=max(map(len, pieces)))
        hidden = model.read(padded(pieces), cache, lengths=[len(piece) for piece in pieces])
        held = [held[source] + piece for source, piece in zip(sources, pieces, strict=True)]
        assert cache.lengths == [len(ids) for ids in held]
    for row, ids in enumerate(held):
        last = len(pieces[row]) if len(read[0]) > 1 else len(ids)
        whole = model.hidden(torch.tensor([ids]), padded=False)[0]
        assert torch.allclose(hidden[row, :last], whole[-last:], atol=1e-10, rtol=0)


@torch.inference_mode()
def test_a_fork_leaves_its_source_as_it_is(model: PLDRModel) -> None:
    cache = model.new_cache(batch_size=1, capacity=3)
    model.read(torch.tensor([[5, 6, 7]]), cache)
    before = cache.k_LBHTK.clone()
    model.read(torch.tensor([[8, 9]] * 2), cache.fork([0, 0], room=2))
    assert torch.equal(cache.k_LBHTK, before) and cache.lengths == [3]


def test_more_than_the_capacity_is_an_error(model: PLDRModel) -> None:
    cache = model.new_cache(batch_size=1, capacity=2)
    with pytest.raises(AssertionError, match="more tokens"):
        model.read(torch.tensor([[5, 6, 7]]), cache)


def test_hidden_is_what_logits_are_made_of(model: PLDRModel) -> None:
    ids_BS = torch.tensor([[5, 6, 7], [8, 9, 10]])
    assert torch.equal(model.output(model.hidden(ids_BS)), model(ids_BS))
