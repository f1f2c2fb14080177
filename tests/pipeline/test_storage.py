"""Publishing is all or nothing; damage is named."""

import errno
import json

import fsspec
import pytest

from pipeline import storage
from pipeline.errors import UserError


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
    assert storage.exists("memory://bucket/x/data.bin") and not storage.exists("memory://bucket/x/other")


@pytest.mark.parametrize("url", ["pipe:cat /etc/passwd", "simplecache::pipe:ls"])
def test_pipe_urls_are_refused(url):
    with pytest.raises(UserError, match="run a shell and are refused"):
        storage.check_url(url)


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


def test_too_little_disk_is_said_before_the_work(tmp_path):
    with pytest.raises(UserError, match="are free; free some space"):
        storage.require_free_space(tmp_path / "not" / "yet", 10**18, "training")
    storage.require_free_space(tmp_path, 1, "training")


def test_replace_dir_swaps_whole_folders(tmp_path):
    for name, text in (("new", "2"), ("target", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text(text)
    storage.replace_dir(tmp_path / "new", tmp_path / "target")
    assert [p.name for p in tmp_path.iterdir()] == ["target"] and (tmp_path / "target" / "f").read_text() == "2"
