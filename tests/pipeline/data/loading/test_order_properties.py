"""Properties of the order and the loader over random corpora, settings, ranks and stops. Every example writes real tars."""

from __future__ import annotations

import itertools
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.loading import loader as loader_module
from pipeline.data.loading.loader import TrainLoader
from pipeline.data.loading.order import WINDOW_BLOCKS, Order
from pipeline.data.loading.reader import TokenReader
from pipeline.data.tokens.index import TokenIndex

WriteTokens = Callable[..., None]
BATCH = 12
relaxed = settings(deadline=None, max_examples=40)
corpora = st.tuples(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 9))
machines = st.fixed_dictionaries(
    {
        "PREFETCH": st.integers(1, 5),
        "AHEAD": st.integers(1, 3),
        "FETCHERS": st.integers(1, 8),
        "CHUNK": st.integers(1, 64),
        "ROWS": st.integers(1, 64),
    }
)
ranks = st.sampled_from([(w, m) for w in (1, 2, 3, 4) for m in (1, 2, 3, 6) if BATCH % (w * m) == 0])
stints = st.lists(st.tuples(ranks, machines, st.integers(0, 5)), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def make_reader(write_tokens: WriteTokens) -> Iterator[Callable[[tuple[list[int], int]], TokenReader]]:
    """(sizes of the shards, block_sequences) to a reader of such tokens."""
    with tempfile.TemporaryDirectory() as root:
        count = itertools.count()

        def make(corpus: tuple[list[int], int]) -> TokenReader:
            folder = Path(root) / str(next(count))
            write_tokens(folder, train=corpus[0], block_sequences=corpus[1])
            return TokenReader(TokenIndex.load(folder), "train")

        yield make


def consume(
    reader: TokenReader, seed: int, position: int, shape: tuple[int, int], machine: dict[str, int], batches: int
) -> list[list[int]]:
    """The global batches of a stint: what all its ranks get, in rank order."""
    world_size, micro = shape
    got: list[list[int]] = [[] for _ in range(batches)]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in machine.items():
            patch.setattr(loader_module, name, value)
        for rank in range(world_size):
            one = TrainLoader(
                reader, seed=seed, global_batch=BATCH, micro_batch=micro, rank=rank, world_size=world_size
            )
            for number, (parts, behind) in enumerate(one.micro_batches(position, limit=batches)):
                assert all(rows.shape == (micro, 16) for rows in parts)
                got[number] += (np.concatenate(parts)[:, 0]).tolist()
                assert behind == position + BATCH * (number + 1)
    return got


@relaxed
@given(corpora, st.integers(0, 2**63), st.integers(0, 500), stints)
def test_batches_follow_the_order_for_any_number_of_readers(
    make_reader: Callable[[tuple[list[int], int]], TokenReader],
    corpus: tuple[list[int], int],
    seed: int,
    start: int,
    stints: list[tuple[tuple[int, int], dict[str, int], int]],
) -> None:
    """Any number of ranks, micro batch, prefetch depth, threads and stops: the same sequences in the same order as
    computed from (index, seed, position) alone. So the union over ranks is one thing, and resume equals no interruption."""
    reader = make_reader(corpus)
    order = Order(
        num_sequences=sum(corpus[0]), block_sequences=corpus[1], fingerprint=reader.index.fingerprint, seed=seed
    )
    position = start
    for shape, machine, batches in stints:
        got = consume(reader, seed, position, shape, machine, batches)
        expected = order.global_batch(position, BATCH * batches).reshape(batches, BATCH)
        assert got == expected.tolist()
        position += BATCH * batches


@relaxed
@given(corpora, st.integers(0, 2**63), ranks)
def test_an_epoch_has_every_sequence_once_for_any_number_of_readers(
    make_reader: Callable[[tuple[list[int], int]], TokenReader],
    corpus: tuple[list[int], int],
    seed: int,
    shape: tuple[int, int],
) -> None:
    """Counted in the batches, over as many epochs as end with a batch."""
    reader = make_reader(corpus)
    size = reader.num_sequences
    epochs = BATCH // np.gcd(size, BATCH)
    got = consume(reader, seed, 0, shape, {}, int(size * epochs // BATCH))
    stream = list(itertools.chain(*got))
    assert len(stream) == size * epochs
    for epoch in range(epochs):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))


@relaxed
@given(st.integers(50, 5000), st.integers(1, 64), st.integers(0, 2**63), st.integers(0, 10**6))
def test_epochs_and_seeds_differ(size: int, block: int, seed: int, epoch: int) -> None:
    order = Order(num_sequences=size, block_sequences=block, fingerprint="x", seed=seed)
    other = Order(num_sequences=size, block_sequences=block, fingerprint="x", seed=seed + 1)
    everything = np.arange(size)
    first, next_epoch = order.sequences(epoch, everything), order.sequences(epoch + 1, everything)
    assert (first != next_epoch).mean() > 0.5
    assert (first != other.sequences(epoch, everything)).mean() > 0.5


@pytest.mark.parametrize("layout", ["one after another", "in turn"])
@pytest.mark.parametrize("seed", range(5))
def test_sources_keep_their_weights_within_an_epoch(layout: str, seed: int) -> None:
    """The stage `shard` writes a source of weight 3 three times, so weights hold over an epoch because every sequence comes
    once; within it they hold because windows take blocks from everywhere. Worst case: each source in a piece of its own.

    In any run of W positions the share of a source is off by about sqrt(share (1 - share) x block / W): windows are made of
    blocks of one source each. Six of these standard deviations are allowed.
    """
    block, weights = 32, np.array([5, 3, 1, 1])
    size = block * 40 * WINDOW_BLOCKS
    of_block = np.repeat(np.arange(4), weights * (size // block // weights.sum()))
    if layout == "in turn":
        of_block = of_block.reshape(-1, len(of_block) // 16).T.ravel()
    source = np.repeat(of_block, block)
    order = Order(num_sequences=len(source), block_sequences=block, fingerprint="x", seed=seed)
    got = source[order.global_batch(0, len(source))]
    assert np.array_equal(np.bincount(got), np.bincount(source))
    shares = weights / weights.sum()
    for window in (2 * WINDOW_BLOCKS * block, 8 * WINDOW_BLOCKS * block):
        for start in range(0, len(got) - window + 1, window // 2):
            found = np.bincount(got[start : start + window], minlength=4) / window
            assert (np.abs(found - shares) < 6 * np.sqrt(shares * (1 - shares) * block / window)).all()


def test_a_global_batch_mixes_sources(seed: int = 3) -> None:
    """Batches of 512 are not runs of one block: each source's share in them is near its weight on average and in spread."""
    order = Order(num_sequences=1_000_000, block_sequences=256, fingerprint="x", seed=seed)
    shares = [(order.global_batch(512 * n, 512) < 300_000).mean() for n in range(0, 1900, 19)]
    assert abs(np.mean(shares) - 0.3) < 0.03 and np.std(shares) < 0.1


def test_memory_of_the_order_is_constant_in_the_number_of_sequences() -> None:
    """At 1e12 sequences: peak memory of computing a chunk as at 1e3, and no list of anything."""
    peaks = []
    for size in (10**3, 10**6, 10**12 + 3):
        order = Order(num_sequences=size, block_sequences=256, fingerprint="x", seed=1)
        order.global_batch(size - 5, 64)
        tracemalloc.start()
        ids = order.global_batch(size // 3, 600)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(set(ids.tolist())) == 600 and ids.max() < size
    assert max(peaks) < 200_000 and max(peaks) < 3 * min(peaks)
