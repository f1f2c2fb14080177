"""The loader: what a global batch holds is nobody's business but the order's; damage stops it with the shard's name."""

from __future__ import annotations

import itertools
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import RunConfig, RunPaths
from pipeline.data.index import TokenIndex
from pipeline.data.loader import TokenReader, TrainLoader
from pipeline.errors import UserError


@pytest.fixture(scope="module")
def reader(finished: tuple[RunConfig, RunPaths]) -> TokenReader:
    return TokenReader(TokenIndex.load(finished[1].tokens), "train")


def loader(reader: TokenReader, *, world_size: int = 1, rank: int = 0, micro: int = 1, batch: int = 12) -> TrainLoader:
    return TrainLoader(reader, seed=5, global_batch=batch, micro_batch=micro, rank=rank, world_size=world_size)


def test_rows_come_from_their_shard_and_block(finished: tuple[RunConfig, RunPaths], reader: TokenReader) -> None:
    """Against the tars themselves, read without the index's offsets."""
    from pipeline.data.tar import read_members

    rows = []
    for shard in reader.shards:
        for _, payload in read_members(finished[1].tokens / shard.name):
            rows.append(np.frombuffer(payload, dtype="<u2", offset=10 + payload[8] + 256 * payload[9]).reshape(-1, 17))
    expected = np.concatenate(rows).astype(np.int64)
    assert len(reader.shards) == 2 and len(expected) == reader.num_sequences
    order = np.random.default_rng(0).permutation(reader.num_sequences)
    got = reader.read(order)
    assert got.dtype == np.int64 and np.array_equal(got, expected[order])
    assert reader.read([]).shape == (0, 17)


def test_numbers_outside_the_split(reader: TokenReader) -> None:
    for number in (-1, reader.num_sequences):
        with pytest.raises(IndexError, match=f"sequence {number} of"):
            reader.read([number])


@settings(deadline=None, max_examples=15)
@given(
    st.sampled_from([(world, micro) for world in (1, 2, 3, 4, 6) for micro in (1, 2, 3) if 12 % (world * micro) == 0]),
    st.integers(0, 5000),
    st.integers(1, 4),
)
def test_a_global_batch_is_the_same_for_every_world(
    reader: TokenReader, shape: tuple[int, int], consumed: int, batches: int
) -> None:
    """Union over ranks of global batch n == the whole batch on one rank, whatever the start: resume == no interruption."""
    world_size, micro = shape
    streams = [
        loader(reader, world_size=world_size, rank=r, micro=micro).micro_batches(consumed) for r in range(world_size)
    ]
    for number in range(batches):
        parts = [next(stream) for stream in streams]
        assert all(len(part) == 12 // world_size // micro and part[0].shape == (micro, 17) for part in parts)
        joined = np.concatenate([rows for part in parts for rows in part])
        ids = loader(reader).indices(consumed + 12 * number)
        assert np.array_equal(joined, reader.read(ids))
    for stream in streams:
        stream.close()  # type: ignore[attr-defined]


def test_resume_equals_no_interruption_over_two_epochs(reader: TokenReader) -> None:
    one = loader(reader)
    steps = 2 * reader.num_sequences // 12 + 1
    ids = np.concatenate([one.indices(12 * step) for step in range(steps)])
    assert (np.bincount(ids[: 2 * reader.num_sequences]) == 2).all()
    whole = [rows[0] for rows in itertools.islice(loader(reader, micro=12).micro_batches(0), 7)]
    resumed = [rows[0] for rows in itertools.islice(loader(reader, micro=12).micro_batches(36), 4)]
    assert all(np.array_equal(a, b) for a, b in zip(whole[3:], resumed, strict=True))


def test_a_batch_larger_than_the_split_runs_over_epochs(reader: TokenReader) -> None:
    size = reader.num_sequences * 2
    ids = loader(reader, batch=size).indices(0)
    assert len(ids) == size and (np.bincount(ids) == 2).all()


def test_the_prefetch_thread_ends_with_its_iterator(reader: TokenReader) -> None:
    stream = loader(reader).micro_batches(0)
    next(stream)
    assert any(thread.name == "token-prefetch" for thread in threading.enumerate())
    stream.close()  # type: ignore[attr-defined]
    assert not any(thread.name == "token-prefetch" for thread in threading.enumerate())


def test_batches_that_ranks_cannot_share(reader: TokenReader) -> None:
    with pytest.raises(UserError, match=r"train.global_batch 12 is no multiple of train.micro_batch 5 x 2 ranks"):
        loader(reader, micro=5, world_size=2)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_shard_stops_the_run_with_its_name(
    damage: str, finished: tuple[RunConfig, RunPaths], tmp_path: Path
) -> None:
    shutil.copytree(finished[1].tokens, tmp_path / "tokens")
    path = tmp_path / "tokens" / "train-000001.tar"
    data = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(data[:-600] if damage == "cut" else data[:700] + bytes([data[700] ^ 4]) + data[701:])
    reader = TokenReader(TokenIndex.load(tmp_path / "tokens"), "train")
    reader.read([0])  # the other shard is whole
    with pytest.raises(UserError, match=r"train-000001\.tar"):
        reader.read([reader.num_sequences - 1])
    with pytest.raises(UserError, match=r"train-000001\.tar"):  # out of the thread, too
        list(itertools.islice(loader(reader).micro_batches(0), 100))


def test_splits_and_folders_that_cannot_be_read(finished: tuple[RunConfig, RunPaths]) -> None:
    index = TokenIndex.load(finished[1].tokens)
    with pytest.raises(UserError, match="the extra split has no sequences"):
        TokenReader(index, "extra")
