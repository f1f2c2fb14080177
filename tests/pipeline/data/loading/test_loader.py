"""The loader: only the order decides the content of a global batch; bad data stops it or is left out, alike
on every rank and after every restart."""

from __future__ import annotations

import itertools
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.loading.cache import Stamps
from pipeline.data.loading.loader import TrainLoader, evenly_spread
from pipeline.data.loading.order import Indices
from pipeline.data.loading.reader import BadExtent, TokenReader
from pipeline.data.tar import read_members
from pipeline.data.tokens.index import TokenIndex
from pipeline.errors import UserError

WriteTokens = Callable[..., None]
relaxed = settings(deadline=None, max_examples=25)
SIZES = [37, 20, 8, 1, 30]  # sequences of the shards: complete blocks, short ones, a single sequence


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_tokens: WriteTokens) -> Path:
    """Tokens that are never changed."""
    root = tmp_path_factory.mktemp("tokens")
    write_tokens(root, train=SIZES, val=[9, 9], boundaries=True)
    return root


@pytest.fixture(scope="module")
def reader(folder: Path) -> TokenReader:
    return TokenReader(TokenIndex.load(folder), "train")


@pytest.fixture
def damaged_folder(tmp_path: Path, write_tokens: WriteTokens) -> Path:
    """The same tokens, to be damaged."""
    write_tokens(tmp_path / "tokens", train=SIZES, val=[9, 9], boundaries=True)
    return tmp_path / "tokens"


def damage(path: Path, how: str = "flip") -> None:
    data = path.read_bytes()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "gone":
        path.write_bytes(data[:-600] if how == "cut" else data[:700] + bytes([data[700] ^ 4]) + data[701:])


def loader(
    reader: TokenReader, *, world_size: int = 1, rank: int = 0, micro: int = 1, batch: int = 12, **more: object
) -> TrainLoader:
    return TrainLoader(reader, seed=5, global_batch=batch, micro_batch=micro, rank=rank, world_size=world_size, **more)  # type: ignore[arg-type]


def numbers(rows: Indices) -> list[int]:
    """The sequence numbers that write_tokens wrote into the sequences."""
    return (rows[:, 0] + 65536 * rows[:, 1]).tolist()


def stream(of: TrainLoader, position: int = 0, limit: int | None = None) -> Iterator[tuple[list[int], int]]:
    """(sequence numbers, position after) of each batch of one rank."""
    for micro_batches, behind in of.micro_batches(position, limit=limit):
        yield numbers(np.concatenate(micro_batches)), behind


def joined(
    reader: TokenReader, world_size: int, position: int, batches: int, **more: object
) -> list[tuple[list[int], int]]:
    """The batches of all ranks together, in rank order."""
    ranks = [loader(reader, world_size=world_size, rank=rank, **more) for rank in range(world_size)]
    streams = [list(stream(one, position, batches)) for one in ranks]
    assert len({tuple(behind for _, behind in batches) for batches in streams}) == 1  # ranks agree on the position
    return [(list(itertools.chain(*(ids for ids, _ in parts))), parts[0][1]) for parts in zip(*streams, strict=True)]


def test_rows_come_from_their_shard_and_block(folder: Path, reader: TokenReader) -> None:
    """Against the tars themselves, read without the index's offsets."""
    rows: dict[str, list[Indices]] = {"tokens": [], "segments": []}
    for shard in reader.shards:
        for name, payload in read_members(folder / shard.name):
            numbers = np.frombuffer(payload, dtype="<u2", offset=10 + payload[8] + 256 * payload[9])
            rows[name.split(".")[1]].append(numbers.reshape(-1, 16).astype(np.int64))
    expected = np.concatenate(rows["tokens"])
    assert len(expected) == reader.num_sequences == sum(SIZES)
    order = np.random.default_rng(0).permutation(reader.num_sequences)
    order = np.concatenate([order, order[:7]])  # the same one twice, too
    got = reader.read(order)
    assert got.dtype == np.int64 and np.array_equal(got, expected[order])
    assert np.array_equal(reader.read(order.tolist()[:3]), expected[order[:3]])
    assert reader.read([]).shape == (0, 16)
    segments = reader.segments(order)
    assert segments.dtype == np.uint16 and np.array_equal(segments, np.concatenate(rows["segments"])[order])


@pytest.mark.parametrize("world_size", [1, 2])
def test_with_documents_micro_batches_hold_the_same_tokens_and_whose_they_are(
    folder: Path, reader: TokenReader, world_size: int
) -> None:
    """Document numbers are n % 7 + 1 of sequence n."""
    marked = TokenReader(TokenIndex.load(folder), "train", segments=True)
    for rank in range(world_size):
        plain = loader(reader, world_size=world_size, rank=rank, micro=3).micro_batches(5, limit=20)
        with_them = loader(marked, world_size=world_size, rank=rank, micro=3, documents=True)
        for (rows, position), (both, end) in zip(plain, with_them.micro_batches(5, limit=20), strict=True):
            assert position == end and len(rows) == len(both) == 4 // world_size
            for one, two in zip(rows, both, strict=True):
                assert two.shape == (2, 3, 16) and two.dtype == np.int64 and np.array_equal(two[0], one)
                assert two[1].tolist() == [[number % 7 + 1] * 16 for number in numbers(one)]


def test_tokens_without_boundaries_have_no_segments(tmp_path: Path, write_tokens: WriteTokens) -> None:
    write_tokens(tmp_path / "plain", train=[3])
    with pytest.raises(UserError, match="no document boundaries; run `pldr tokenize` with tokens.boundaries=true"):
        TokenReader(TokenIndex.load(tmp_path / "plain"), "train").segments([0])


def test_numbers_outside_the_split(reader: TokenReader) -> None:
    for number in (-1, reader.num_sequences):
        with pytest.raises(IndexError, match=f"sequence {number} of"):
            reader.read([0, number])


def test_many_shards_need_few_open_files(tmp_path: Path, write_tokens: WriteTokens, monkeypatch: object) -> None:
    """A mapped file is a file handle, and a process often has 1,024 of them: not every shard can stay open."""
    write_tokens(tmp_path / "many", train=[1] * 400)
    reader = TokenReader(TokenIndex.load(tmp_path / "many"), "train")
    before = len(os.listdir("/proc/self/fd"))
    assert numbers(reader.read(range(400))) == list(range(400))
    assert len(os.listdir("/proc/self/fd")) <= before + 257
    assert numbers(reader.read(range(399, -1, -1))) == list(range(399, -1, -1))


shapes = st.sampled_from(
    [(world, micro) for world in (1, 2, 3, 4, 6) for micro in (1, 2, 3) if 12 % (world * micro) == 0]
)


@relaxed
@given(shapes, st.integers(0, 5000), st.integers(1, 4))
def test_a_global_batch_is_the_same_for_every_world(
    reader: TokenReader, shape: tuple[int, int], position: int, batches: int
) -> None:
    """Union over ranks of global batch n == the batch on one rank, in its order, whatever the start."""
    world_size, micro = shape
    got = joined(reader, world_size, position, batches, micro=micro)
    for number, (ids, behind) in enumerate(got):
        assert ids == loader(reader).indices(position + 12 * number).tolist()
        assert behind == position + 12 * (number + 1)


def test_micro_batches_are_slices_of_the_ranks_share(reader: TokenReader) -> None:
    part, _ = next(loader(reader, world_size=2, rank=1, micro=3).micro_batches(0))
    assert [rows.shape for rows in part] == [(3, 16), (3, 16)]
    assert numbers(np.concatenate(part)) == loader(reader).indices(0)[6:].tolist()


@relaxed
@given(
    st.lists(st.tuples(st.sampled_from([1, 2, 3, 4]), st.integers(0, 4)), min_size=1, max_size=4), st.integers(0, 99)
)
def test_stops_and_other_world_sizes_change_nothing(
    reader: TokenReader, stints: list[tuple[int, int]], start: int
) -> None:
    """A run that stops anywhere and continues with another number of ranks sees the same as an uninterrupted one."""
    whole = [batch for batch, _ in stream(loader(reader), start, sum(count for _, count in stints))]
    pieces: list[list[int]] = []
    position = start
    for world_size, count in stints:
        pieces += [batch for batch, _ in joined(reader, world_size, position, count)]
        position += 12 * count
    assert pieces == whole


def test_nothing_is_repeated_or_missed_in_an_epoch_and_epochs_differ(reader: TokenReader) -> None:
    epochs = [
        list(itertools.chain(*(ids for ids, _ in stream(loader(reader, batch=sum(SIZES)), sum(SIZES) * epoch, 1))))
        for epoch in range(3)
    ]
    assert all(sorted(epoch) == list(range(sum(SIZES))) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_a_batch_larger_than_the_split_runs_over_epochs(reader: TokenReader) -> None:
    ids, behind = next(stream(loader(reader, batch=reader.num_sequences * 2)))
    assert behind == len(ids) == 2 * reader.num_sequences and (np.bincount(ids) == 2).all()


def test_the_threads_end_with_their_iterator(reader: TokenReader) -> None:
    def running() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("token-")]

    batches = loader(reader).micro_batches(0)
    next(batches)
    assert "token-prefetch" in running()
    batches.close()  # type: ignore[attr-defined]
    for thread in threading.enumerate():
        if thread.name == "token-fetch":
            thread.join(5)
    assert not running()
    assert list(loader(reader).micro_batches(0, limit=0)) == []


def test_batches_that_ranks_cannot_share(reader: TokenReader) -> None:
    with pytest.raises(UserError, match=r"train.global_batch 12 is not a multiple of train.micro_batch 5 x 2 ranks"):
        loader(reader, micro=5, world_size=2)


def test_a_split_without_sequences(folder: Path) -> None:
    with pytest.raises(UserError, match="the extra split has no sequences"):
        TokenReader(TokenIndex.load(folder), "extra")


@pytest.mark.parametrize("how", ["flip", "cut", "gone", "folder"])
def test_a_bad_shard_stops_the_run_with_its_name(how: str, damaged_folder: Path) -> None:
    damage(damaged_folder / "train-000001.tar", how)
    reader = TokenReader(TokenIndex.load(damaged_folder), "train")
    reader.read([0])  # another shard is intact
    with pytest.raises(UserError, match=r"train-000001\.tar"):
        reader.read([40])
    with pytest.raises(UserError, match=r"train-000001\.tar"):  # out of the threads, too
        list(itertools.islice(stream(loader(reader)), 100))
    reader.read([0])


@pytest.mark.parametrize("how", ["flip", "cut", "gone", "folder"])
def test_a_bad_shard_is_left_out_and_counted(how: str, damaged_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = TokenIndex.load(damaged_folder)
    order = loader(TokenReader(index, "train")).indices
    damage(damaged_folder / "train-000001.tar", how)  # sequences 37 to 56
    one = loader(TokenReader(index, "train"), on_bad_shard="skip")
    got = list(stream(one, 0, 14))
    good = [n for n in itertools.chain(*(order(p).tolist() for p in range(0, 240, 12))) if not 37 <= n < 57]
    assert list(itertools.chain(*(ids for ids, _ in got))) == good[: 14 * 12]
    assert one.left_out == {"shards": ["train-000001.tar"], "sequences": got[-1][1] - 14 * 12}
    assert 20 <= one.left_out["sequences"] <= 60  # type: ignore[operator]
    assert sum("train-000001.tar" in record.message for record in caplog.records) == 1


@relaxed
@given(
    st.sets(st.integers(0, 4), max_size=4),
    st.lists(st.tuples(st.sampled_from([1, 2, 3, 4]), st.integers(0, 5)), min_size=1, max_size=4),
)
def test_with_bad_shards_resume_still_equals_no_interruption(
    tmp_path_factory: pytest.TempPathFactory,
    write_tokens: WriteTokens,
    bad: set[int],
    stints: list[tuple[int, int]],
) -> None:
    """Each stint starts with new readers, which do not know any bad shard yet."""
    damaged_folder = tmp_path_factory.mktemp("damaged_folder")
    write_tokens(damaged_folder, train=SIZES)
    for shard in bad:
        (damaged_folder / f"train-{shard:06d}.tar").unlink()
    index = TokenIndex.load(damaged_folder)
    skip = {"on_bad_shard": "skip", "agree": lambda verdicts: verdicts}
    total = sum(count for _, count in stints)
    whole = list(stream(loader(TokenReader(index, "train"), **skip), 0, total))
    pieces: list[tuple[list[int], int]] = []
    position = 0
    for world_size, count in stints:
        pieces += joined(TokenReader(index, "train"), world_size, position, count, **skip)
        position = pieces[-1][1] if pieces else 0
    assert pieces == whole


def test_no_good_shard_is_left(damaged_folder: Path) -> None:
    for path in damaged_folder.glob("train-*.tar"):
        path.unlink()
    with pytest.raises(UserError, match="every shard of the train split is missing or damaged"):
        next(stream(loader(TokenReader(TokenIndex.load(damaged_folder), "train"), on_bad_shard="skip")))


def test_what_another_rank_cannot_read_is_left_out_here_too(reader: TokenReader) -> None:
    """This rank's own files are intact."""
    one = loader(reader, world_size=2, on_bad_shard="skip", agree=lambda verdicts: [True, *verdicts[1:]])
    ids = list(itertools.chain(*(ids for ids, _ in stream(one, 0, 30))))
    assert ids and min(ids) >= 37 and one.left_out["shards"] == ["train-000000.tar"]


def test_held_out_sequences_come_from_good_shards(damaged_folder: Path) -> None:
    index = TokenIndex.load(damaged_folder)
    everything = np.arange(18)
    assert evenly_spread(TokenReader(index, "val"), everything, 3).tolist() == [0, 8, 17]
    damage(damaged_folder / "val-000001.tar")
    reader = TokenReader(index, "val")
    with pytest.raises(BadExtent, match=r"val-000001\.tar"):
        reader.read(evenly_spread(reader, everything, 3))
    assert evenly_spread(reader, everything, 3, skip=True).tolist() == [0, 4, 8]
    assert evenly_spread(reader, everything, 99, skip=True).tolist() == list(range(9))
    damage(damaged_folder / "val-000000.tar")
    with pytest.raises(UserError, match="no sequence of the val split can be read"):
        evenly_spread(TokenReader(index, "val"), everything, 3, skip=True)


def test_held_out_sequences_are_agreed_upon(folder: Path) -> None:
    """Another rank cannot read the first shard."""
    verdicts = [[True, False], [False]]
    chosen = evenly_spread(
        TokenReader(TokenIndex.load(folder), "val"), np.arange(18), 3, skip=True, agree=lambda own: verdicts.pop(0)
    )
    assert chosen.tolist() == [9, 13, 17] and not verdicts


def test_ranks_of_a_job_check_a_shard_once_a_node(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in the bytes that are hashed; a new start, or another file of that name, is checked again."""
    index = TokenIndex.load(folder)
    hashed: list[str] = []
    real = TokenReader._check.__globals__["hashlib"].file_digest
    monkeypatch.setattr(
        TokenReader._check.__globals__["hashlib"],
        "file_digest",
        lambda stream, name: hashed.append(stream.name) or real(stream, name),
    )
    for job, checks in (("a", 1), ("a", 0), ("b", 1)):
        hashed.clear()
        TokenReader(index, "train", stamps=Stamps(job, tmp_path)).read([0])
        assert len(hashed) == checks
    hashed.clear()
    os.utime(folder / "train-000000.tar")
    TokenReader(index, "train", stamps=Stamps("a", tmp_path)).read([0])
    assert len(hashed) == 1


def test_a_stamp_is_not_valid_for_a_changed_file(damaged_folder: Path, tmp_path: Path) -> None:
    index = TokenIndex.load(damaged_folder)
    TokenReader(index, "train", stamps=Stamps("job", tmp_path)).read([0])
    path = damaged_folder / "train-000000.tar"
    times = path.stat().st_mtime_ns
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times, times))  # the change time is different
    with pytest.raises(BadExtent, match=r"train-000000\.tar: its sha256"):
        TokenReader(index, "train", stamps=Stamps("job", tmp_path)).read([0])


def test_readers_in_many_threads(folder: Path) -> None:
    reader = TokenReader(TokenIndex.load(folder), "train")
    rng, failures = random.Random(0), []

    def work(wanted: list[int]) -> None:
        if numbers(reader.read(wanted)) != wanted:
            failures.append(wanted)

    threads = [threading.Thread(target=work, args=([rng.randrange(sum(SIZES)) for _ in range(50)],)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
