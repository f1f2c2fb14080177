"""Locks tell a held lock from a file system without any, and a lock file that was removed from one that is there."""

import errno
import fcntl
import os

import pytest

from pipeline.io import locks, storage
from tests.helpers.at_once import PROCESSES, fork


def test_a_lock_is_held_by_one_process_and_names_it(tmp_path, at_once):
    def take(turn, number):
        with open(tmp_path / f"{turn}.lock", "a+") as stream:
            got = locks.lock(stream)
            holder = locks.lock_holder(stream)
            at_end.wait(60)  # nobody lets go before all have tried
            return got, holder, str(os.getpid())

    at_end = fork.Barrier(PROCESSES)
    taken = at_once(take, rounds=10)
    for turn in range(10):
        those = taken[turn * PROCESSES : (turn + 1) * PROCESSES]
        (winner,) = (pid for got, _, pid in those if got)
        assert {holder for _, holder, _ in those} == {winner}


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with (
        open(tmp_path / "lock", "a+") as stream,
        pytest.raises(locks.NoLocks, match=r"lock: its file system has no locks"),
    ):
        locks.lock(stream)


def test_a_lock_of_a_removed_file_is_known(tmp_path):
    with open(tmp_path / "lock", "a+") as stream:
        assert locks.is_in_place(stream)
        (tmp_path / "lock").unlink()
        assert not locks.is_in_place(stream)
        (tmp_path / "lock").touch()
        assert not locks.is_in_place(stream)


def test_changes_under_a_lock_are_one_after_another(tmp_path, at_once):
    counter = tmp_path / "counter"
    counter.write_text("0")

    def count(turn, number):
        with locks.locked(tmp_path / "counter.lock"):
            counter.write_text(str(int(counter.read_text()) + 1))

    at_once(count, rounds=30)
    assert counter.read_text() == "150"


def test_a_folder_that_several_replace_at_once_is_one_of_theirs(tmp_path, at_once):
    target = tmp_path / "weights"

    def replace(turn, number):
        with storage.publish_dir(target) as folder:
            (folder / "a").write_text(f"{turn}.{number}")
            (folder / "b").write_text(f"{turn}.{number}")

    at_once(replace, rounds=20)
    assert (target / "a").read_text() == (target / "b").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
