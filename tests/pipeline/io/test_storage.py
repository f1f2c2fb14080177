"""Publishing is atomic; damage is reported."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import fsspec
import pytest

from pipeline.errors import UserError
from pipeline.io import storage


def test_publish_leaves_the_old_file_when_writing_fails(tmp_path):
    target = tmp_path / "a.json"
    storage.publish_json(target, {"x": 1})

    def fail(temporary):
        temporary.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="disk is full"):
        storage.publish(target, fail)
    assert json.loads(target.read_text()) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_publish_to_an_object_store():
    storage.publish_bytes("memory://bucket/x/data.bin", b"content")
    with fsspec.open("memory://bucket/x/data.bin", "rb") as stream:
        assert stream.read() == b"content"
    assert fsspec.filesystem("memory").find("/bucket/x") == ["/bucket/x/data.bin"]
    assert storage.exists("memory://bucket/x/data.bin") and not storage.exists("memory://bucket/x/other")


def test_publish_to_s3_leaves_one_complete_object(faulty_s3):
    data = bytes(range(256)) * 2000
    faulty_s3.fail_next(2, method="PUT")
    faulty_s3.truncate_next(1)  # when it is read back
    storage.publish_bytes(faulty_s3.url("deep/x.bin"), data)
    assert faulty_s3.keys() == ["deep/x.bin"] and faulty_s3.read("deep/x.bin") == data
    assert storage.sha256_file(faulty_s3.url("deep/x.bin")) == hashlib.sha256(data).hexdigest()
    storage.publish_json(faulty_s3.url("x.json"), {"schema_version": 1})
    faulty_s3.fail_next(1)
    assert storage.read_json(faulty_s3.url("x.json"), schema_version=1) == {"schema_version": 1}
    with pytest.raises(UserError, match="absent.json: no such file"):
        storage.read_json(faulty_s3.url("absent.json"))
    assert storage.exists(faulty_s3.url("x.json")) and not storage.exists(faulty_s3.url("y.json"))
    assert storage.exists(faulty_s3.url("deep"))


def test_publish_to_a_store_that_stays_broken_leaves_what_was_there(faulty_s3, monkeypatch):
    faulty_s3.put("x.bin", b"old")
    monkeypatch.setenv("PLDR_RETRIES", "1")
    faulty_s3.fail_next(2, method="PUT")  # both attempts of the upload
    with pytest.raises(UserError, match="x.bin: cannot be written, 2 attempts failed"):
        storage.publish_bytes(faulty_s3.url("x.bin"), b"new")
    assert faulty_s3.keys() == ["x.bin"] and faulty_s3.read("x.bin") == b"old"


def test_publish_notices_a_store_that_gives_back_something_else(monkeypatch, s3):
    filesystem = fsspec.get_filesystem_class("s3")
    put = filesystem.put_file

    def damage(self, local, remote, **options):
        Path(local).write_bytes(b"nEw")
        put(self, local, remote, **options)

    monkeypatch.setattr(filesystem, "put_file", damage)
    with pytest.raises(UserError, match="the store returned other bytes than were sent"):
        storage.publish_bytes(s3.url("x.bin"), b"new")
    assert s3.keys() == []


def test_publish_over_http_is_refused():
    with pytest.raises(UserError, match="http://127.0.0.1:1/x: web servers are for reading"):
        storage.publish_bytes("http://127.0.0.1:1/x?sig=1", b"new")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "", "a/../../b", "a\\..\\b", "a\0b"])
def test_member_names_stay_inside(name):
    with pytest.raises(UserError, match="must stay inside"):
        storage.safe_member(name)


def test_a_manifest_notices_every_kind_of_damage(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"xyz")
    files = storage.manifest_of(tmp_path)
    assert list(files) == ["b", "sub/a"]
    storage.verify_manifest(tmp_path, files)
    (tmp_path / "b").write_bytes(b"xyw")
    with pytest.raises(UserError, match="b: sha256 differs"):
        storage.verify_manifest(tmp_path, files)
    (tmp_path / "b").write_bytes(b"xy")
    with pytest.raises(UserError, match="2 bytes"):
        storage.verify_manifest(tmp_path, files)
    (tmp_path / "b").unlink()
    with pytest.raises(UserError, match="missing"):
        storage.verify_manifest(tmp_path, files)


def test_json_of_another_schema_or_damaged(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"schema_version": 7}')
    with pytest.raises(UserError, match="schema_version 7, this program reads 1"):
        storage.read_json(path, schema_version=1)
    path.write_text('{"schema_version": 1')
    with pytest.raises(UserError, match="not valid JSON"):
        storage.read_json(path)
    with pytest.raises(UserError, match="no such file"):
        storage.read_json(tmp_path / "absent.json")


def test_too_little_disk_is_reported_before_the_work(tmp_path):
    with pytest.raises(UserError, match="are free; free some space"):
        storage.require_free_space(tmp_path / "not" / "yet", 10**18, "training")
    storage.require_free_space(tmp_path, 1, "training")


def test_space_is_asked_of_each_disk_for_all_that_is_written_to_it(tmp_path, monkeypatch):
    disks = {tmp_path / "a": 100, tmp_path / "b": 1000}
    for folder in disks:
        folder.mkdir()
    devices, stat = {str(folder): number for number, folder in enumerate(disks)}, Path.stat

    def device(path, **options):
        facts = stat(path, **options)
        return os.stat_result((*facts[:2], devices[str(path)], *facts[3:])) if str(path) in devices else facts

    monkeypatch.setattr(Path, "stat", device)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=disks[path] * 10**6))

    def needs(*many):
        return [storage.Need(tmp_path / folder / "x", size * 10**6, what, f"set {what}") for folder, size, what in many]

    storage.require_space(needs(("a", 60, "one"), ("b", 900, "two"), ("a", 40, "three")))
    with pytest.raises(
        UserError, match=r"a/x: about 101 MB are needed for one, three, 100 MB are free; free some space or set one"
    ):
        storage.require_space(needs(("a", 60, "one"), ("b", 900, "two"), ("a", 41, "three")))
    with pytest.raises(UserError, match=r"b/x: about 1,001 MB are needed for two"):
        storage.require_space(needs(("a", 60, "one"), ("b", 1001, "two")))


def test_replace_dir_swaps_complete_folders(tmp_path):
    for name, text in (("new", "2"), ("target", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text(text)
    storage.replace_dir(tmp_path / "new", tmp_path / "target")
    assert [p.name for p in tmp_path.iterdir()] == ["target"] and (tmp_path / "target" / "f").read_text() == "2"


def test_an_unreachable_server_is_not_a_missing_file(monkeypatch):
    monkeypatch.setenv("PLDR_RETRIES", "0")
    with pytest.raises(UserError, match="http://127.0.0.1:1/x: cannot be read"):
        storage.exists("http://127.0.0.1:1/x?sig=HUSH")


def test_without_a_folder_for_temporary_files_the_variable_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "missing")])
    monkeypatch.setattr(tempfile, "tempdir", None)
    with pytest.raises(FileNotFoundError) as caught:
        tempfile.gettempdir()
    assert str(storage.explain_os_error(caught.value, "shard")).startswith("TMPDIR: No usable temporary directory")
