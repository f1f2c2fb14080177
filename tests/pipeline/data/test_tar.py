"""The tar container: fixed bytes, true offsets, atomic publishing."""

from __future__ import annotations

import hashlib
import subprocess
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.tar import TarWriter, read_members, remove_leftovers, remove_strays
from pipeline.errors import UserError

MEMBERS = [("a.txt", b"hello"), ("a.json", b"{}"), ("b.txt", b""), ("c.txt", b"x" * 512), ("d.txt", b"y" * 20_000)]


def write(path: Path | str, **more: Any) -> list[int]:
    with TarWriter(path, **more) as tar:
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


def test_an_unpublished_archive_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(KeyError), TarWriter(tmp_path / "x.tar") as tar:
        tar.add("a.txt", b"1")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_only_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
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


@given(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=24), st.binary(max_size=2000)
)
def test_headers_are_those_of_the_standard_library(name: str, payload: bytes) -> None:
    expected = BytesIO()
    with tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(payload), 0o444
        archive.addfile(info, BytesIO(payload))
    with tempfile.TemporaryDirectory() as folder:
        with TarWriter(f"{folder}/x.tar") as tar:
            tar.add(name, payload[:7], payload[7:])
            facts = tar.publish()
        data = Path(folder, "x.tar").read_bytes()
        assert data == expected.getvalue()
        assert facts == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        assert list(read_members(f"file://{folder}/x.tar")) == [(name, payload)]


@pytest.mark.parametrize("position", [101, 110, 126, 140, 156, 260, 300, 511])
def test_a_damaged_header_is_named(position: int, tmp_path: Path) -> None:
    write(tmp_path / "x.tar")
    data = bytearray((tmp_path / "x.tar").read_bytes())
    data[position] ^= 4
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"x\.tar: damaged"):
        list(read_members(tmp_path / "x.tar"))


@pytest.mark.parametrize("size", [0, 100, 512, 515, 600, 1024, 2000, 24_000])
def test_a_truncated_archive_is_named(size: int, tmp_path: Path) -> None:
    """Wherever it ends: in a header, a payload, the padding after it, or between two members."""
    write(tmp_path / "x.tar")
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:size])
    with pytest.raises(UserError, match=r"x\.tar: damaged"):
        list(read_members(tmp_path / "x.tar"))


def test_an_archive_of_another_tool_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(tmp_path / "folder", "../x")
    with pytest.raises(UserError, match=r"x\.tar: damaged archive \(a header was not written by pldr\)"):
        list(read_members(tmp_path / "x.tar"))


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    write(tmp_path / "x.tar")
    data = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(b"\xff" * 512 + data[512:])
    with pytest.raises(UserError, match=r"x\.tar: damaged"):
        list(read_members(tmp_path / "x.tar"))
    with pytest.raises(UserError, match=r"gone\.tar: no such file"):
        list(read_members(tmp_path / "gone.tar"))


def test_an_archive_at_a_url_is_published_complete(faulty_s3: Any, tmp_path: Path) -> None:
    write(tmp_path / "x.tar")
    spool = tmp_path / "spool"
    faulty_s3.fail_next(2, method="PUT")
    write(faulty_s3.url("tokens/x.tar"), spool=spool)
    assert faulty_s3.keys() == ["tokens/x.tar"] and list(spool.iterdir()) == []
    assert faulty_s3.read("tokens/x.tar") == (tmp_path / "x.tar").read_bytes()
    faulty_s3.fail_next(1)
    faulty_s3.truncate_next(1)
    assert list(read_members(faulty_s3.url("tokens/x.tar"))) == MEMBERS
    with pytest.raises(UserError, match=r"y\.tar: no such file"):
        list(read_members(faulty_s3.url("tokens/y.tar")))


def test_a_store_that_refuses_gets_no_archive(faulty_s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLDR_RETRIES", "1")
    faulty_s3.fail_next(20, method="PUT")
    with pytest.raises(UserError, match=r"tokens/x\.tar: cannot be written, 2 attempts failed"):
        write(faulty_s3.url("tokens/x.tar"), spool=tmp_path)
    assert faulty_s3.keys() == [] and list(tmp_path.iterdir()) == []


STRAYS = ["train-000001.tar", ".train-000000.tar.0a1b.tmp", ".index.json.0a1b.tmp"]
OTHERS = ["train-000000.tar", "mine.tar", "train-1.tar", ".mine.txt.0a1b.tmp", "deeper/train-000001.tar"]


def test_only_strays_are_removed(s3: Any, tmp_path: Path) -> None:
    for name in [*STRAYS, *OTHERS]:
        s3.put(f"tokens/{name}", b"x")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    remove_strays(s3.url("tokens"), {"train-000000.tar"})
    assert set(s3.keys()) == {f"tokens/{name}" for name in OTHERS}
    remove_strays(tmp_path, {"train-000000.tar"})
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*OTHERS, *STRAYS[1:]}  # remove_leftovers handles these here
    remove_strays(s3.url("nothing-here"), set())
