"""Low-rank keys in the cache: the model with G_LM of these ranks, exactly (fp64), however its tokens are read."""

from __future__ import annotations

import pytest
import torch

from pldr_model.config import ModelConfig
from pldr_model.decode.decoder import Decoder
from pldr_model.decode.low_rank import truncate_g
from pldr_model.generation import generate
from pldr_model.model import PLDRModel

RANKS = torch.tensor([[2, 8, 3, 2], [8, 8, 8, 8], [1, 1, 5, 4]])  # with full heads, and a layer that is full


def a_model(rope_style: str) -> tuple[PLDRModel, PLDRModel]:
    """A model in fp64 with a random G, and the same with G of the ranks."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=50, num_layers=3, num_heads=4, head_dim=8, context_length=48, g_source="file", rope_style=rope_style
    )
    g_LHKK = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    full = PLDRModel(config, g_lm_LHKK=g_LHKK).double().eval()
    low = PLDRModel(config, g_lm_LHKK=g_LHKK).double().eval()
    low.load_state_dict({**full.state_dict(), "g_lm": truncate_g(full.constant_g(), RANKS)})
    return full, low


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(1, 50, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rope_style", ["interleaved", "half"])
@torch.inference_mode()
def test_read_in_pieces_and_steps_it_is_the_model_with_g_of_these_ranks(rope_style: str) -> None:
    full, low = a_model(rope_style)
    decoder, ids_BS = Decoder.of(full, key_ranks=RANKS), ids(3, 48)
    expected = low(ids_BS, padded=False)
    assert (expected - full(ids_BS, padded=False)).abs().max() > 1e-3  # what is dropped matters
    cache = decoder.new_cache(batch_size=3, capacity=48)
    pieces = [decoder.logits(decoder.read(ids_BS[:, start:end], cache)) for start, end in ((0, 20), (20, 40), (40, 43))]
    pieces += [decoder.step(ids_BS[:, index], cache).unsqueeze(1) for index in range(43, 48)]
    assert (torch.cat(pieces, dim=1) - expected).abs().max() < 1e-11


@torch.inference_mode()
def test_rows_of_different_lengths_are_what_they_are_alone() -> None:
    full, low = a_model("interleaved")
    decoder, ids_BS = Decoder.of(full, key_ranks=RANKS), ids(3, 40)
    cache = decoder.new_cache(batch_size=3, capacity=48)
    lengths = (5, 31, 17)
    for row, length in enumerate(lengths):
        cache.write_row(row, decoder.prefill(ids_BS[row, :length].tolist(), capacity=48)[0])
    forked = cache.fork([2, 0], room=3)
    for step in range(3):
        logits_BV = decoder.step(torch.stack([ids_BS[row, n + step] for row, n in enumerate(lengths)]), cache)
        for row, length in enumerate(lengths):
            alone = low(ids_BS[row : row + 1, : length + step + 1], padded=False)[0, -1]
            assert (logits_BV[row] - alone).abs().max() < 1e-11
    logits_BV = decoder.step(torch.stack([ids_BS[2, 17], ids_BS[0, 5]]), forked)
    assert (logits_BV[0] - low(ids_BS[2:, :18], padded=False)[0, -1]).abs().max() < 1e-11


def test_the_cache_holds_so_many_numbers_of_a_key() -> None:
    full, _ = a_model("interleaved")
    low, whole = Decoder.of(full, key_ranks=RANKS), Decoder.of(full)
    sizes = [decoder.new_cache(batch_size=2, capacity=10).nbytes for decoder in (low, whole)]
    assert sizes == [8 * 2 * 10 * (int(RANKS.sum()) + 3 * 4 * 8), 8 * 2 * 10 * 2 * 3 * 4 * 8]


@torch.inference_mode()
def test_full_ranks_change_nothing() -> None:
    full, _ = a_model("interleaved")
    decoder, ids_BS = Decoder.of(full, key_ranks=torch.full((3, 4), 8)), ids(2, 12)
    cache, other = (one.new_cache(batch_size=2, capacity=12) for one in (decoder, Decoder.of(full)))
    assert decoder.read(ids_BS, cache).equal(Decoder.of(full).read(ids_BS, other))


def test_a_cache_with_another_g_is_refused() -> None:
    full, _ = a_model("interleaved")
    with pytest.raises(ValueError, match="by the ranks of its own G"):
        Decoder.of(full, key_ranks=RANKS).new_cache(batch_size=1, capacity=4, g_lm=full.constant_g())


def test_generated_tokens_are_those_of_the_model_with_g_of_these_ranks() -> None:
    full, low = a_model("interleaved")
    prompts = [ids(1, length)[0].tolist() for length in (3, 17, 9, 5)]
    alone = [generate(low, [prompt], max_new_tokens=20, use_cache=False)[0] for prompt in prompts]
    assert generate(Decoder.of(full, key_ranks=RANKS), prompts, max_new_tokens=20) == alone


@pytest.mark.slow
@torch.inference_mode()
def test_a_step_compiles_as_one_graph() -> None:
    full, _ = a_model("interleaved")
    decoder, ids_BS = Decoder.of(full, key_ranks=RANKS), ids(2, 9)
    cache, other = (decoder.new_cache(batch_size=2, capacity=48) for _ in range(2))
    for one in (cache, other):
        decoder.read(ids_BS, one)
    torch.compiler.reset()  # other tests compile steps, and so many variants of one are allowed
    compiled = torch.compile(decoder.step, fullgraph=True)
    assert (decoder.step(ids_BS[:, 0], cache) - compiled(ids_BS[:, 0], other)).abs().max() < 1e-11
