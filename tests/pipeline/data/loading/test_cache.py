"""What ranks of a node share: each block fetched once, never more than the limit, and nothing on the disk is trusted."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.data.loading import cache as cache_module
from pipeline.data.loading.cache import NodeCache, Stamps, node_folder
from pipeline.errors import UserError

fork = multiprocessing.get_context("fork")


def block(number: int, size: int = 1000) -> tuple[str, str, bytes]:
    """(name, beginning of the sha256, bytes)"""
    data = hashlib.shake_128(str(number).encode()).digest(size)
    sha256 = hashlib.sha256(data).hexdigest()[:32]
    return f"{sha256}-test", sha256, data


def get(cache: NodeCache, number: int, size: int = 1000) -> tuple[bytes, bool]:
    """(what the cache gives, whether it had to be fetched)"""
    name, sha256, data = block(number, size)
    fetched: list[bool] = []

    def fetch() -> bytes:
        fetched.append(True)
        return data

    return bytes(cache.get(name, sha256, fetch)), bool(fetched)


def stored(cache: NodeCache) -> list[Path]:
    return [path for path in cache.folder.glob("[0-9a-f][0-9a-f]/*") if path.is_file()]


def bytes_on_disk(cache: NodeCache) -> int:
    return sum(path.stat().st_size for path in stored(cache))


def run_all(work: Callable[..., None], *arguments: tuple[object, ...]) -> None:
    """Each set of arguments in a process of its own, at the same time; all end well."""
    ranks = [fork.Process(target=work, args=each) for each in arguments]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
    assert [rank.exitcode for rank in ranks] == [0] * len(ranks)


def test_a_block_is_fetched_once_and_read_from_the_disk_after(tmp_path: Path) -> None:
    cache = NodeCache(10**6, tmp_path)
    assert get(cache, 1) == (block(1)[2], True)
    assert get(cache, 1) == (block(1)[2], False)
    assert get(NodeCache(10**6, tmp_path), 1) == (block(1)[2], False)  # another rank
    assert [path.name for path in stored(cache)] == [block(1)[0]]


def test_ranks_that_want_the_same_blocks_fetch_each_once(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def rank(_: int) -> None:
        cache = NodeCache(10**6, tmp_path)
        for number in range(8):
            name, sha256, data = block(number)

            def fetch(name: str = name, data: bytes = data) -> bytes:
                with log.open("a") as stream:
                    stream.write(f"{name}\n")
                time.sleep(0.02)
                return data

            assert bytes(cache.get(name, sha256, fetch)) == data

    run_all(rank, *((n,) for n in range(4)))
    lines = log.read_text().split()
    assert sorted(lines) == sorted({block(n)[0] for n in range(8)})


def test_the_limit_holds_and_the_least_recently_used_is_evicted(tmp_path: Path) -> None:
    cache = NodeCache(10_000, tmp_path)
    for number in range(40):
        get(cache, number)
        assert get(cache, 0) == (block(0)[2], False)  # used all the time, so it stays
        assert bytes_on_disk(cache) <= 10_000
        time.sleep(0.002)
    assert get(cache, 39)[1] is False and get(cache, 5)[1] is True
    assert get(cache, 99, size=20_000) == (block(99, 20_000)[2], True)  # larger than the cache: never stored
    assert len(stored(cache)) >= 8


def test_the_limit_holds_with_many_ranks(tmp_path: Path) -> None:
    def rank(first: int) -> None:
        cache = NodeCache(20_000, tmp_path)
        for number in range(first, first + 60):
            assert get(cache, number)[0] == block(number)[2]

    run_all(rank, *((n * 30,) for n in range(4)))
    assert 10_000 < bytes_on_disk(NodeCache(20_000, tmp_path)) <= 20_000


def test_a_block_that_is_being_read_survives_its_removal(tmp_path: Path) -> None:
    cache = NodeCache(3000, tmp_path)
    name, sha256, data = block(0)
    held = cache.get(name, sha256, lambda: data)
    for number in range(1, 9):
        get(cache, number)
    assert not (cache.folder / name[:2] / name).exists()
    assert bytes(held) == data


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:-1], lambda data: data[:-1] + b"?", lambda data: data + b"?"]
)
def test_a_damaged_file_is_fetched_again(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    cache = NodeCache(10**6, tmp_path)
    get(cache, 1)
    path = stored(cache)[0]
    path.write_bytes(damage(path.read_bytes()))
    assert get(cache, 1) == (block(1)[2], True)
    assert get(cache, 1) == (block(1)[2], False)


def test_a_disk_that_refuses_costs_speed_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No file of this process may grow beyond 4,096 bytes: a real failing write, half-way through."""

    def rank() -> None:
        cache = NodeCache(10**6, tmp_path)
        get(cache, 0)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        for number in range(1, 6):
            assert get(cache, number, size=9000) == (block(number, 9000)[2], True)
        assert [path.name for path in stored(cache)] == [block(0)[0]]  # nothing half-written stays
        assert cache.limit <= 1000

    run_all(rank, ())


def test_a_full_disk_makes_a_smaller_cache(tmp_path: Path) -> None:
    """A disk of one megabyte, with a limit far beyond it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        cache = NodeCache(10**9, disk)
        for number in range(60):
            assert get(cache, number, size=50_000)[0] == block(number, 50_000)[2]
        assert get(cache, 59, size=50_000)[1] is False
        assert 500_000 < bytes_on_disk(cache) < 1_000_000
        (disk / "other").write_bytes(bytes(os.statvfs(disk).f_bavail * 4096 - 8192))  # now others take the rest
        for number in range(60, 90):
            assert get(cache, number, size=50_000)[0] == block(number, 50_000)[2]
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_an_unusable_folder_does_not_stop_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "blocks").write_text("a file")
    cache = NodeCache(10**6, tmp_path)
    assert get(cache, 1) == (block(1)[2], True) == get(cache, 1)
    assert len(caplog.records) == 1 or all("blocks" in record.message for record in caplog.records)


def test_a_rank_that_is_killed_does_not_block_others(tmp_path: Path) -> None:
    name, sha256, data = block(1)
    (tmp_path / "blocks" / name[:2]).mkdir(parents=True)
    half = tmp_path / "blocks" / name[:2] / f"{name}.0123abcd.tmp"

    def die() -> bytes:
        half.write_bytes(data[:10])
        os.kill(os.getpid(), signal.SIGKILL)
        return b""

    rank = fork.Process(target=lambda: NodeCache(10**6, tmp_path).get(name, sha256, die))
    rank.start()
    rank.join(10)
    assert rank.exitcode == -signal.SIGKILL
    assert get(NodeCache(10**6, tmp_path), 1) == (data, True)
    os.utime(half, (1, 1))  # a day later
    (tmp_path / "blocks" / "locks" / "held").write_text("nonsense")
    assert get(NodeCache(10**6, tmp_path), 2)[1] is True  # counts again, and cleans
    assert not half.exists()


def test_an_error_of_the_fetch_is_passed_on_and_nothing_stays_locked(tmp_path: Path) -> None:
    cache = NodeCache(10**6, tmp_path)
    name, sha256, data = block(1)

    def fail() -> bytes:
        raise UserError("no network")

    with pytest.raises(UserError, match="no network"):
        cache.get(name, sha256, fail)
    assert bytes(cache.get(name, sha256, lambda: data)) == data


def test_the_folder_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = node_folder()
    assert folder == tmp_path / "pldr" and folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert node_folder().stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(UserError, match="not a folder of this user; set XDG_CACHE_HOME"):
        node_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # not allowed by its specification
    monkeypatch.setattr(cache_module.tempfile, "gettempdir", lambda: str(tmp_path))
    assert node_folder() == tmp_path / f"pldr-{os.getuid()}"
    if os.getuid() == 0:
        os.chown(node_folder(), 12345, 12345)
        with pytest.raises(UserError, match="not a folder of this user"):
            node_folder()


def test_one_rank_checks_and_the_others_wait(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def rank(job: str) -> None:
        def check() -> None:
            time.sleep(0.2)
            with log.open("a") as stream:
                stream.write(f"{job}\n")

        Stamps(job, tmp_path).once("shard", check)
        assert log.read_text().count(job)  # returns only after the check

    run_all(rank, ("a",), ("a",), ("a",), ("b",))
    assert sorted(log.read_text().split()) == ["a", "b"]


def test_a_check_that_failed_is_made_again(tmp_path: Path) -> None:
    stamps, calls = Stamps("job", tmp_path), []

    def check() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise UserError("damaged")

    with pytest.raises(UserError):
        stamps.once("shard", check)
    for _ in range(2):
        stamps.once("shard", check)
    assert len(calls) == 2
    stamps.once("another shard", check)
    assert len(calls) == 3


def test_without_a_folder_for_stamps_every_rank_checks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "stamps").write_text("a file")
    calls: list[int] = []
    for _ in range(2):
        Stamps("job", tmp_path).once("shard", lambda: calls.append(1))
    assert len(calls) == 2 and "each rank checks for itself" in caplog.text


def test_without_any_folder_of_the_user_every_rank_checks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    calls: list[int] = []
    Stamps("job").once("shard", lambda: calls.append(1))
    assert calls == [1] and "/proc/nowhere/pldr: cannot be used as the cache" in caplog.text


def test_stamps_of_old_jobs_are_removed(tmp_path: Path) -> None:
    Stamps("old", tmp_path).once("shard", lambda: None)
    old = next((tmp_path / "stamps").iterdir())
    os.utime(old, (1, 1))
    Stamps("new", tmp_path)
    assert not old.exists()


def test_the_cache_starts_fast(tmp_path: Path) -> None:
    """No heavy imports: helper processes and workers import it."""
    code = "import sys, pipeline.data.loading.cache; assert not {'torch', 'numpy', 'fsspec'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
