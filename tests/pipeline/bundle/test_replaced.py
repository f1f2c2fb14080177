"""A bundle that is replaced while somebody reads it."""

import shutil

import pytest

from pipeline.bundle import read
from pipeline.errors import UserError
from pipeline.io import storage


def test_a_bundle_that_is_replaced_while_it_is_read_is_read_again(old_files, tmp_path, monkeypatch):
    bundle, tensors, loaded = old_files / "bundle", read.load_tensors, []

    def replacing(path, *arguments, **options):
        if not loaded:  # after the old one was verified
            shutil.copytree(bundle, tmp_path / "new")
            storage.replace_dir(tmp_path / "new", bundle)
            (bundle / "model.safetensors").touch()
        loaded.append(path.name)
        return tensors(path, *arguments, **options)

    monkeypatch.setattr(read, "load_tensors", replacing)
    read.verify_bundle(bundle)
    assert loaded == ["model.safetensors", "g_lm.safetensors"] * 2


def test_a_bundle_between_two_renames_is_waited_for(old_files, monkeypatch):
    bundle = old_files / "bundle"
    gone = bundle.rename(bundle.with_name(".bundle.12345678.old"))
    monkeypatch.setattr(read.time, "sleep", lambda seconds: gone.rename(bundle))
    assert read.verify_bundle(bundle)["files"]
    shutil.rmtree(bundle)
    with pytest.raises(UserError, match="no such bundle folder"):
        read.verify_bundle(bundle)
