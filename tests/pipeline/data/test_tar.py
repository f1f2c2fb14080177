"""The tar container: fixed bytes, true offsets, publish whole or not at all."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path

import pytest

from pipeline.data.tar import TarWriter, read_members, remove_leftovers
from pipeline.errors import UserError

MEMBERS = [("a.txt", b"hello"), ("a.json", b"{}"), ("b.txt", b""), ("c.txt", b"x" * 512), ("d.txt", b"y" * 20_000)]


def write(path: Path) -> list[int]:
    with TarWriter(path) as tar:
        offsets = [tar.add(name, payload) for name, payload in MEMBERS]
        tar.publish()
    return offsets


def test_members_come_back_at_their_offsets(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    offsets = write(path)
    data = path.read_bytes()
    assert [data[o : o + len(p)] for o, (_, p) in zip(offsets, MEMBERS, strict=True)] == [p for _, p in MEMBERS]
    assert list(read_members(path)) == MEMBERS


def test_other_tools_read_it(tmp_path: Path) -> None:
    write(tmp_path / "x.tar")
    with tarfile.open(tmp_path / "x.tar") as archive:
        assert [(i.name, i.mtime, i.uid, i.gid, i.uname) for i in archive] == [(n, 0, 0, 0, "") for n, _ in MEMBERS]
    listed = subprocess.run(["tar", "tf", tmp_path / "x.tar"], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == [name for name, _ in MEMBERS] and not listed.stderr


def test_bytes_are_the_same_every_time(tmp_path: Path) -> None:
    write(tmp_path / "x.tar")
    write(tmp_path / "other" / "y.tar")
    assert (tmp_path / "x.tar").read_bytes() == (tmp_path / "other" / "y.tar").read_bytes()


def test_what_is_not_published_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(KeyError), TarWriter(tmp_path / "x.tar") as tar:
        tar.add("a.txt", b"1")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_run_go_away_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "x.tar")
    TarWriter(tmp_path / "y.tar")._stream.close()  # killed: neither published nor cleaned up
    assert len(list(tmp_path.iterdir())) == 2
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with (
        open("/dev/full", "wb", buffering=0) as full,  # every write is ENOSPC
        pytest.raises(UserError, match=r"x\.tar: the disk is full"),
        TarWriter(tmp_path / "x.tar") as tar,
    ):
        tar._stream.close()
        tar._stream = full
        tar.add("a.txt", b"1")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    write(tmp_path / "x.tar")
    data = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(b"\xff" * 512 + data[512:])
    with pytest.raises(UserError, match=r"x\.tar: damaged"):
        list(read_members(tmp_path / "x.tar"))
    with pytest.raises(UserError, match=r"gone\.tar: no such file"):
        list(read_members(tmp_path / "gone.tar"))
