"""A checkpoint that its run removes while somebody reads it."""

import json
import shutil

import pytest

from pipeline.checkpoint import format
from pipeline.errors import UserError
from pipeline.io import storage


def write_checkpoint(folder):
    folder.mkdir(parents=True)
    state = {"schema_version": 2, "step": 10, "config": {}, "mlflow_run_id": "other"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "weights").write_bytes(b"weights")
    storage.publish_json(folder / storage.MANIFEST, {"schema_version": 1, "files": storage.manifest_of(folder)})
    storage.publish_bytes(folder / "COMMITTED", storage.sha256_file(folder / storage.MANIFEST).encode())
    return folder


@pytest.mark.parametrize("left", [[], ["MANIFEST.json", "state.json"]])
def test_a_checkpoint_that_its_run_removes_is_told_so(tmp_path, monkeypatch, left):
    source = write_checkpoint(tmp_path / "theirs" / "step-000010")
    assert format.verify(source)["step"] == 10
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
        format.verify(source)
    shutil.rmtree(source)
    write_checkpoint(source)
    monkeypatch.setattr(shutil, "copytree", lambda *given, **how: (remove(), copytree(*given, **how)))
    with pytest.raises(UserError, match="was removed while it was read"):
        format.adopt(source, tmp_path / "ours", mlflow_run_id="mine")
    assert not list((tmp_path / "ours").glob("*"))
