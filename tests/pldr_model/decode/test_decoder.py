"""Cached decoding is the full pass: in fp64 exactly, for rows alone, together, in pieces, forked and replaced."""

from __future__ import annotations

import threading
from array import array
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode

from pldr_model.config import ModelConfig
from pldr_model.decode.capture import CapturedStep
from pldr_model.decode.decoder import Decoder
from pldr_model.decode.rows import Draws, Row
from pldr_model.generation import generate
from pldr_model.model import PLDRModel
from pldr_model.next_token import RowSettings
from pldr_model.sampling import Sampling

CONFIG = ModelConfig(
    vocab_size=24, num_layers=2, num_heads=2, head_dim=4, context_length=24, A_dff=4, g_source="random"
)
EXACT = 1e-12


@pytest.fixture(scope="module")
def model() -> PLDRModel:
    torch.manual_seed(0)
    return PLDRModel(CONFIG).double().eval()


@pytest.mark.parametrize("rope_style", ["interleaved", "half"])
@pytest.mark.parametrize("g_source", ["identity", "random", "constant", "learned"])
@torch.inference_mode()
def test_a_batch_is_the_full_pass(rope_style: str, g_source: str) -> None:
    """Rows of different lengths; prompts read in chunks; a row's place is taken by another prompt, which is then forked."""
    model = PLDRModel(replace(CONFIG, rope_style=rope_style, g_source=g_source)).double()
    for weight in model.parameters():
        weight.add_(0.1 * torch.randn_like(weight))
    decoder = Decoder.of(model)
    cache = decoder.new_cache(batch_size=3, capacity=20)
    held = [torch.randint(0, 24, (length,)).tolist() for length in (3, 11, 8)]

    def fill(row: int, prompt: list[int]) -> None:
        """Prefill, and compare; G is the prompt's own from now on."""
        own, logits_1V = decoder.prefill(prompt, chunk=4)
        g_lm[row] = model.compute_g(torch.tensor([prompt]), padded=False)
        assert (logits_1V - model(torch.tensor([prompt]), padded=False)[:, -1]).abs().max() < EXACT
        cache.write_row(row, own)

    def decode(steps: int) -> None:
        for _ in range(steps):
            token_B = torch.randint(0, 24, (len(held),))
            logits_BV = decoder.step(token_B, cache)
            for row, token in enumerate(token_B.tolist()):
                held[row].append(token)
                full_V = model(torch.tensor([held[row]]), g_lm=g_lm[row], padded=False)[0, -1]
                assert (logits_BV[row] - full_V).abs().max() < EXACT

    g_lm: dict[int, torch.Tensor] = {}
    for row, prompt in enumerate(held):
        fill(row, prompt)
    decode(4)
    held[1] = [5, 6]
    fill(1, held[1])
    decode(4)
    rows = [1, 1, 0]
    cache = cache.fork(rows, room=9)
    held, g_lm = [list(held[row]) for row in rows], {new: g_lm[row] for new, row in enumerate(rows)}
    decode(3)
    cache.rollback([6, 9, 1])
    held = [ids[:length] for ids, length in zip(held, (6, 9, 1), strict=True)]
    cache.reset(0)
    held[0] = []
    decode(2)


@st.composite
def rows_of_pieces(draw: st.DrawFn) -> list[list[list[int]]]:
    """Of each row its pieces; the same number of pieces in all."""
    num_rows, num_pieces = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    piece = st.lists(st.integers(0, CONFIG.vocab_size - 1), min_size=1, max_size=5)
    return [[draw(piece) for _ in range(num_pieces)] for _ in range(num_rows)]


def padded(pieces: list[list[int]]) -> torch.Tensor:
    longest = max(map(len, pieces))
    return torch.tensor([piece + [1] * (longest - len(piece)) for piece in pieces])


@settings(max_examples=40, deadline=None)
@given(rows_of_pieces(), st.data())
@torch.inference_mode()
def test_pieces_are_the_full_pass(model: PLDRModel, read: list[list[list[int]]], data: st.DataObject) -> None:
    """In between rows are forked: each may be continued by several, in any order."""
    decoder = Decoder.of(model)
    cache = decoder.new_cache(batch_size=len(read), capacity=max(len(row[0]) for row in read))
    pieces = [row[0] for row in read]
    hidden = decoder.read(padded(pieces), cache, lengths=[len(piece) for piece in pieces])
    held = pieces
    for step in range(1, len(read[0])):
        sources = data.draw(st.lists(st.integers(0, len(held) - 1), min_size=1, max_size=4))
        pieces = [read[source % len(read)][step][: 1 + index] for index, source in enumerate(sources)]
        cache = cache.fork(sources, room=max(map(len, pieces)))
        hidden = decoder.read(padded(pieces), cache, lengths=[len(piece) for piece in pieces])
        held = [held[source] + piece for source, piece in zip(sources, pieces, strict=True)]
        assert cache.lengths == [len(ids) for ids in held] == cache.length_B.tolist()
    for row, ids in enumerate(held):
        last = len(pieces[row])
        whole = model.hidden(torch.tensor([ids]), padded=False)[0]
        assert (hidden[row, :last] - whole[-last:]).abs().max() < EXACT
        assert (decoder.hidden(torch.tensor([ids]))[0] - whole).abs().max() < EXACT


def test_padding_may_stand_beyond_the_context(model: PLDRModel) -> None:
    decoder = Decoder.of(model)
    long, short = list(range(22)), [3, 4]
    cache = decoder.new_cache(batch_size=2, capacity=32)
    decoder.read(padded([long, short]), cache, lengths=[22, 2])
    hidden = decoder.read(padded([[1], list(range(10))]), cache, lengths=[1, 10])
    assert (hidden[0, 0] - model.hidden(torch.tensor([[*long, 1]]), padded=False)[0, -1]).abs().max() < EXACT


def test_a_fork_leaves_its_source_as_it_is(model: PLDRModel) -> None:
    decoder = Decoder.of(model)
    cache, _ = decoder.prefill([5, 6, 7])
    before = cache.layers[0].values.clone()
    decoder.read(torch.tensor([[8, 9]] * 2), cache.fork([0, 0], room=2))
    assert torch.equal(cache.layers[0].values, before) and cache.lengths == [3]


def test_more_than_the_capacity_is_an_error(model: PLDRModel) -> None:
    decoder = Decoder.of(model)
    with pytest.raises(AssertionError, match="more tokens"):
        decoder.prefill([5, 6, 7], capacity=2)
    cache, _ = decoder.prefill([5, 6, 7])
    with pytest.raises(AssertionError, match="more tokens"):
        decoder.step(torch.tensor([1]), cache)


def test_a_given_g_replaces_the_decoders_own(model: PLDRModel) -> None:
    g_lm = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    ids = torch.tensor([[5, 6, 7, 8]])
    hidden = Decoder.of(model).hidden(ids, g_lm=g_lm)
    assert (hidden - model.hidden(ids, g_lm=g_lm, padded=False)).abs().max() < EXACT
    with pytest.raises(ValueError, match=r"g_lm: shape \(1, 2, 4, 4\) is neither"):
        Decoder.of(model).hidden(ids, g_lm=g_lm[:1])


def test_a_decoder_copies_no_weight(model: PLDRModel) -> None:
    decoder = Decoder.of(model)
    own = {weight.data_ptr() for weight in model.state_dict().values()}
    products = [p for layer in decoder._layers for p in (layer.qkv, layer.output, layer.gate_value, layer.down)]
    products += [decoder._embedding, decoder._output]
    assert all(vars(product)["weight_RC"].data_ptr() in own for product in products)
    with pytest.raises(AttributeError):
        decoder._layers[0].g = None


def test_half_precision_decodes_near_fp32() -> None:
    torch.manual_seed(0)
    model = PLDRModel(CONFIG).eval()
    wide, narrow = (Decoder.of(m) for m in (model, PLDRModel(CONFIG).bfloat16()))
    narrow = Decoder(CONFIG, {k: v.bfloat16() for k, v in model.state_dict().items()}, model.g_lm)
    ids = list(range(9))
    (a, x), (b, y) = wide.prefill(ids, capacity=10), narrow.prefill(ids, capacity=10)
    assert y.dtype == torch.bfloat16 and (x - y).abs().max() < 0.05 * x.std()
    token = torch.tensor([3])
    x, y = wide.step(token, a), narrow.step(token, b)
    assert (x - y).abs().max() < 0.05 * x.std()


class Watched(TorchDispatchMode):
    """Notes the operations whose result the host needs, or whose shape depends on numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.num_seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_seen += 1
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            self.asked.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@torch.inference_mode()
def test_no_token_of_a_block_waits_for_the_host(model: PLDRModel, temperature: float) -> None:
    decoder = Decoder.of(model)
    sampling = Sampling(9, temperature=temperature, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.2, seed=3)
    rows = [Row(index, array("i", prompt), 9) for index, prompt in enumerate(([5, 6], [7]))]
    draws = Draws(rows, RowSettings.of([sampling], vocab_size=24), decoder.device)
    cache = decoder.new_cache(batch_size=2, capacity=9)
    decoder.read(padded([[5, 6], [7]]), cache, lengths=[2, 1])
    with Watched() as watched:
        for _ in range(4):
            draws.next(decoder.step(draws.token_B, cache))
    assert watched.num_seen > 100 and watched.asked == []
    with Watched() as watched:
        int(draws.token_B[0])
    assert len(watched.asked) == 1, "the watch sees it"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("backend", "capacity"), [("aot_eager", 140), ("inductor", 6)])
def test_a_step_compiles_as_one_graph(backend: str, capacity: int) -> None:
    """Over several bounds, with the tokens of the eager one: no graph break, and no new graph for each token."""
    decoder = Decoder.of(PLDRModel(replace(CONFIG, context_length=150)).double())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(decoder.step, fullgraph=True, backend=backend)
    cache, other = (decoder.prefill([5, 6, 7], capacity=capacity)[0] for _ in range(2))
    token_1 = torch.tensor([3])
    for _ in range(3, capacity):
        logits_1V, same_1V = decoder.step(token_1, cache), compiled(token_1, other)
        assert (logits_1V - same_1V).abs().max() < EXACT
        token_1 = torch.tensor(logits_1V.argmax(dim=-1).tolist())
    assert cache.lengths == other.lengths == other.length_B.tolist() == [capacity]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_captured_step_is_the_eager_one() -> None:
    decoder = Decoder.of(PLDRModel(replace(CONFIG, context_length=150)).double().cuda())
    captured = CapturedStep(decoder.step_kernels)
    cache, other = (decoder.prefill([5, 6, 7], capacity=140)[0] for _ in range(2))
    token_1 = torch.tensor([3], device="cuda")
    for _ in range(3, 140):
        logits_1V = decoder.step(token_1, cache)
        assert (logits_1V - captured(token_1, other)).abs().max() < EXACT
        token_1 = logits_1V.argmax(dim=-1)
    assert cache.lengths == other.lengths == other.length_B.tolist() == [140]


def test_two_threads_generate_from_one_model_at_once(model: PLDRModel) -> None:
    """Each gets the tokens that it gets alone."""
    learned = PLDRModel(replace(CONFIG, g_source="learned")).double()
    decoder = Decoder.of(model)
    asked = [[[index % 24, 3], [7, index % 24, 9, 2]] for index in range(8)]
    setting = {"max_new_tokens": 15, "temperature": 1.0, "seed": 5}

    def answers(prompts: list[list[int]]) -> list[list[list[int]]]:
        return [generate(source, prompts, **setting) for source in (model, decoder, learned)]

    alone = [answers(prompts) for prompts in asked]
    found: dict[int, list[list[list[int]]]] = {}

    def work(first: int) -> None:
        for index in range(first, len(asked), 2):
            found[index] = answers(asked[index])

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(len(asked))] == alone
