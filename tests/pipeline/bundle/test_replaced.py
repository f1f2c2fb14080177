"""A bundle that is replaced, and a checkpoint that is removed, while somebody reads it."""

import json
import shutil

import pytest

from pipeline.bundle import read
from pipeline.checkpoint import format as checkpoints
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


def committed(folder):
    folder.mkdir(parents=True)
    state = {"schema_version": 2, "step": 10, "config": {}, "mlflow_run_id": "other"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "weights").write_bytes(b"weights")
    storage.publish_json(folder / storage.MANIFEST, {"schema_version": 1, "files": storage.manifest_of(folder)})
    storage.publish_bytes(folder / "COMMITTED", storage.sha256_file(folder / storage.MANIFEST).encode())
    return folder


@pytest.mark.parametrize("left", [[], ["MANIFEST.json", "state.json"]])
def test_a_checkpoint_that_its_run_removes_is_told_so(tmp_path, monkeypatch, left):
    source = committed(tmp_path / "theirs" / "step-000010")
    assert checkpoints.verify(source)["step"] == 10
    read_manifest, copytree = storage.verify_manifest, shutil.copytree

    def remove():
        for file in source.iterdir():
            if file.name not in left:
                file.unlink()

    def verify(folder, files):
        remove()
        read_manifest(folder, files)

    monkeypatch.setattr(storage, "verify_manifest", verify)
    with pytest.raises(UserError, match="was removed while it was read"):
        checkpoints.verify(source)
    shutil.rmtree(source)
    committed(source)
    monkeypatch.setattr(shutil, "copytree", lambda *given, **how: (remove(), copytree(*given, **how)))
    with pytest.raises(UserError, match="was removed while it was read"):
        checkpoints.adopt(source, tmp_path / "ours", mlflow_run_id="mine")
    assert not list((tmp_path / "ours").glob("*"))
