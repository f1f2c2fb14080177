"""Tokens at a URL: the same rows as from a disk, by ranged reads, once per node, over a network that fails."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from pipeline.data.loading.cache import NodeCache
from pipeline.data.loading.loader import TrainLoader, evenly_spread
from pipeline.data.loading.reader import BadExtent, TokenReader
from pipeline.data.tokens.index import TokenIndex
from pipeline.errors import UserError

WriteTokens = Callable[..., None]
SIZES = [37, 20, 8, 1, 30]  # 5 + 3 + 1 + 1 + 4 blocks of 8


@pytest.fixture
def bucket(faulty_s3: Any, tmp_path: Path, write_tokens: WriteTokens) -> Any:
    """An S3 bucket with tokens below `tokens/`, and the same ones in a local folder."""
    write_tokens(tmp_path / "local", train=SIZES, val=[9, 9], boundaries=True)
    for path in (tmp_path / "local").iterdir():
        faulty_s3.put(f"tokens/{path.name}", path.read_bytes())
    return faulty_s3


def open_reader(bucket: Any, tmp_path: Path, *, split: str = "train", limit: int = 10**8) -> TokenReader:
    return TokenReader(TokenIndex.load(bucket.url("tokens")), split, cache=NodeCache(limit, tmp_path / "cache"))


def local_reader(tmp_path: Path) -> TokenReader:
    return TokenReader(TokenIndex.load(tmp_path / "local"), "train")


def loader(reader: TokenReader, **more: Any) -> TrainLoader:
    return TrainLoader(reader, seed=5, global_batch=12, micro_batch=12, rank=0, world_size=1, **more)


def stream(of: TrainLoader, position: int = 0, limit: int = 20) -> list[tuple[list[int], int]]:
    return [(parts[0][:, 0].tolist(), behind) for parts, behind in of.micro_batches(position, limit=limit)]


def flip(bucket: Any, key: str, at: int) -> None:
    data = bytearray(bucket.read(key))
    data[at] ^= 1
    bucket.put(key, bytes(data))


def ranges(bucket: Any) -> list[tuple[str, str | None]]:
    """(object, range) of the shard reads so far."""
    return [
        (path, byte_range) for method, path, byte_range in bucket.requests if method == "GET" and path.endswith(".tar")
    ]


def test_rows_and_batches_equal_those_of_a_local_copy(bucket: Any, tmp_path: Path) -> None:
    remote, local = open_reader(bucket, tmp_path), local_reader(tmp_path)
    everything = np.random.default_rng(0).permutation(sum(SIZES))
    assert np.array_equal(remote.read(everything), local.read(everything))
    assert np.array_equal(remote.segments(everything), local.segments(everything))
    assert stream(loader(remote)) == stream(loader(local))


def test_a_block_whose_document_numbers_are_damaged_is_left_out_too(bucket: Any) -> None:
    index = TokenIndex.load(bucket.url("tokens"))
    flip(bucket, f"tokens/{index.of_split('train')[0].name}", index.of_split("train")[0].segment_offsets[1] + 5)
    marked = TokenReader(index, "train", segments=True)  # without the cache, in which equal blocks are one
    with pytest.raises(UserError, match="train-000000.tar: its sha256 is not the one in its index: damaged, block 1"):
        list(loader(marked, documents=True).micro_batches(0, limit=8))
    skipping = loader(TokenReader(index, "train", segments=True), documents=True, on_bad_shard="skip")
    seen = {int(row[0]) for parts, _ in skipping.micro_batches(0, limit=7) for row in parts[0][0]}
    assert seen and not seen & set(range(8, 16))
    without = loader(TokenReader(index, "train"), on_bad_shard="skip")
    assert set(range(8, 16)) & {number for ids, _ in stream(without, limit=8) for number in ids}


def test_each_block_is_read_once_on_a_node_and_nothing_else(bucket: Any, tmp_path: Path) -> None:
    bucket.requests.clear()
    for _ in range(2):  # two ranks, several epochs
        stream(loader(open_reader(bucket, tmp_path)))
    assert len(ranges(bucket)) == 14 == len(set(ranges(bucket)))
    assert all(byte_range for _, byte_range in ranges(bucket))


def test_a_rank_reads_only_what_its_rows_need(bucket: Any, tmp_path: Path) -> None:
    bucket.requests.clear()
    reader = open_reader(bucket, tmp_path)
    one = TrainLoader(reader, seed=5, global_batch=4, micro_batch=2, rank=1, world_size=2)
    next(one.micro_batches(0, limit=1))
    blocks = {unit for unit in reader.extents_of(one.indices(0)[2:])}
    assert len(ranges(bucket)) == len(blocks) <= 2


def test_errors_and_truncated_responses_change_nothing(bucket: Any, tmp_path: Path) -> None:
    expected = stream(loader(local_reader(tmp_path)))
    reader = open_reader(bucket, tmp_path)
    bucket.fail_next(4, 500)
    bucket.truncate_next(4)
    assert stream(loader(reader)) == expected
    assert bucket.truncations == 0 and not bucket.failures["GET"]


def test_a_cache_smaller_than_what_is_used(bucket: Any, tmp_path: Path) -> None:
    reader = open_reader(bucket, tmp_path, limit=600)  # two blocks of 256 bytes
    assert stream(loader(reader)) == stream(loader(local_reader(tmp_path)))
    held = sum(path.stat().st_size for path in (tmp_path / "cache" / "blocks").glob("[0-9a-f][0-9a-f]/*"))
    assert 0 < held <= 600
    without = TokenReader(TokenIndex.load(bucket.url("tokens")), "train")
    assert stream(loader(without)) == stream(loader(local_reader(tmp_path)))


@pytest.mark.parametrize("how", ["gone", "cut", "flip"])
def test_a_bad_shard_stops_the_run_with_its_name(how: str, bucket: Any, tmp_path: Path) -> None:
    """The first block of the second shard is bad; if only that is damaged, only that is left out."""
    key = "tokens/train-000001.tar"
    if how == "gone":
        fsspec.filesystem("s3").rm_file(bucket.url(key))
    elif how == "cut":
        bucket.put(key, bucket.read(key)[:-700])
    else:
        flip(bucket, key, 512 + 128 + 3)
    with pytest.raises(BadExtent, match=r"train-000001\.tar"):
        stream(loader(open_reader(bucket, tmp_path)))

    bad = range(37, 45) if how == "flip" else range(37, 57)
    one = loader(open_reader(bucket, tmp_path), on_bad_shard="skip")
    got = stream(one)
    order = itertools.chain(*(one.indices(p).tolist() for p in range(0, 400, 12)))
    assert list(itertools.chain(*(ids for ids, _ in got))) == [n for n in order if n not in bad][: 20 * 12]
    assert one.left_out == {"shards": ["train-000001.tar"], "sequences": got[-1][1] - 240}
    resumed = loader(open_reader(bucket, tmp_path), on_bad_shard="skip")  # a new process, which knows nothing yet
    assert stream(resumed, got[6][1], 13) == got[7:]


def test_a_store_that_refuses_is_not_a_bad_shard(bucket: Any, tmp_path: Path) -> None:
    """Credentials that ran out, or an outage, must not decide what is trained on."""
    reader = open_reader(bucket, tmp_path)
    bucket.fail_next(200, 403)
    one = loader(reader, on_bad_shard="skip")
    with pytest.raises(UserError, match="cannot be read") as caught:
        stream(one)
    assert not isinstance(caught.value, BadExtent) and one.left_out == {"shards": [], "sequences": 0}


def test_bytes_damaged_in_transit_are_requested_again(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.data.loading import reader as module

    real, damaged = module.read_range, []

    def read_range(url: str, start: int, end: int) -> bytes:
        data = real(url, start, end)
        if (url, start) in damaged:
            return data
        damaged.append((url, start))
        return bytes([data[0] ^ 1]) + data[1:]

    monkeypatch.setattr(module, "read_range", read_range)
    assert stream(loader(open_reader(bucket, tmp_path))) == stream(loader(local_reader(tmp_path)))
    own = {
        (url, start) for url, start in damaged if url.startswith(bucket.url(""))
    }  # other tests' readers may still run
    assert len(own) == 14


def test_held_out_sequences_of_a_bucket(bucket: Any, tmp_path: Path) -> None:
    fsspec.filesystem("s3").rm_file(bucket.url("tokens/val-000000.tar"))
    reader = open_reader(bucket, tmp_path, split="val")
    assert evenly_spread(reader, np.arange(18), 3, skip=True).tolist() == [9, 13, 17]


def test_a_forked_child_and_its_parent_both_read(bucket: Any, tmp_path: Path) -> None:
    """The child inherits a filesystem whose event loop runs in a thread it does not have: it must create its own."""
    expected = local_reader(tmp_path).read(range(sum(SIZES)))
    reader = TokenReader(TokenIndex.load(bucket.url("tokens")), "train")  # no cache: everyone has to ask the store
    assert np.array_equal(reader.read(range(20)), expected[:20])
    batches = loader(reader).micro_batches(0)
    next(batches)  # threads are at work while we fork
    child = os.fork()
    if child == 0:
        right = False
        try:
            right = np.array_equal(reader.read(range(sum(SIZES))), expected)
        finally:
            os._exit(0 if right else 1)
    assert np.array_equal(reader.read(range(sum(SIZES))), expected)
    deadline = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, 9)
        time.sleep(0.02)
    assert ended[1] == 0
    next(batches)
    batches.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("at", [100, 700, -1], ids=["header", "block", "end"])
def test_verify_reads_everything(at: int, bucket: Any, tmp_path: Path) -> None:
    index = TokenIndex.load(bucket.url("tokens"))
    index.verify()
    flip(bucket, "tokens/train-000004.tar", at)
    with pytest.raises(
        UserError,
        match=r"train-000004\.tar: its sha256 is not the one in its index" + (".*block 0" if at == 700 else ""),
    ):
        index.verify()


def test_other_file_systems(tmp_path: Path, write_tokens: WriteTokens) -> None:
    write_tokens("memory://loader/tokens", train=[9, 20])
    reader = TokenReader(TokenIndex.load("memory://loader/tokens"), "train", cache=NodeCache(10**6, tmp_path))
    assert reader.read(range(29))[:, 0].tolist() == list(range(29))
    fsspec.filesystem("memory").rm("/loader/tokens/train-000001.tar")
    with pytest.raises(BadExtent, match=r"memory://loader/tokens/train-000001.tar: missing"):
        TokenReader(reader.index, "train").read([9])
    fsspec.filesystem("memory").rm("/loader", recursive=True)
