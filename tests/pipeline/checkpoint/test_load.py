"""The commit protocol: a checkpoint without COMMITTED is ignored, and damaged or foreign files are refused (one real rank)."""

import json
import os
import pickle
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import deepspeed_files, format
from pipeline.errors import UserError
from pipeline.io import storage
from pipeline.train.state import TrainState

SAVE = """
import sys, torch
from pathlib import Path
from unittest.mock import patch
from pipeline.checkpoint.retention import Policy, retain
from pipeline.checkpoint import load as checkpoint
from pipeline.checkpoint.save import Saver
from pipeline.train.engine import init_distributed, build_engine
from pipeline.config.train import TrainConfig
torch.set_num_threads(1)
init_distributed(60)
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
train = TrainConfig(steps=5, warmup_steps=0, global_batch=2, micro_batch=2, precision="fp32", zero_stage=1)
engine = build_engine(model, train, 1)
checkpoint.make_safe(engine)
folder = Path(sys.argv[1])
for step in range(1, 5):
    engine.backward(engine(torch.ones(2, 4)).square().mean()); engine.step()
    Saver(engine, folder).save({"step": step, "world_size": 1, "config": {}})
    retain(folder, Policy(3))
# A disk that is full: the ranks agree that nothing was saved, and report it.
with patch.object(checkpoint._HashingFile, "write", side_effect=OSError(28, "No space left on device")):
    try:
        Saver(engine, folder).save({"step": 9, "world_size": 1, "config": {}})
    except Exception as error:
        print("REFUSED", type(error).__name__, error)
print("LEFT", sorted(p.name for p in folder.iterdir()))
torch.distributed.destroy_process_group()  # else gloo may abort when Python ends
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "LOCAL_RANK": "0",
                   "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SAVE, str(folder)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.rglob("*"):
        if path.is_file():
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(source)).write_bytes(path.read_bytes())
    return target


def test_saved_retained_and_intact(saved):
    folder, _ = saved
    names = [path.name for path in format.committed(folder)]
    assert names == ["step-000002", "step-000003", "step-000004"]
    state = format.verify(folder / "step-000004")
    assert state["step"] == 4 and len(state["rng"]) == 1
    assert not (folder / "step-000004" / "latest").exists()


def test_a_full_disk_leaves_no_trace_and_one_line(saved):
    _, output = saved
    refused = next(line for line in output.splitlines() if line.startswith("REFUSED"))
    assert (
        "UserError" in refused and "step-000009: the checkpoint was not saved" in refused and "No space left" in refused
    )
    left = next(line for line in output.splitlines() if line.startswith("LEFT"))
    assert left == "LEFT ['step-000002', 'step-000003', 'step-000004']"


def test_every_damaged_file_is_noticed(saved, tmp_path):
    source = saved[0] / "step-000004"
    files = sorted(p.relative_to(source) for p in source.rglob("*") if p.is_file())
    assert len(files) >= 5
    for number, name in enumerate(files):
        intact = copy(source, tmp_path / f"{number}")
        broken = intact / name
        data = bytearray(broken.read_bytes())
        data[len(data) // 2] ^= 0x40
        broken.write_bytes(bytes(data))
        with pytest.raises(UserError):
            format.verify(intact)


def test_without_committed_it_is_ignored(saved, tmp_path):
    intact = copy(saved[0] / "step-000004", tmp_path / "step-000004")
    assert format.committed(tmp_path) == [intact]
    (intact / "COMMITTED").unlink()
    (tmp_path / ".step-000005.staging").mkdir()
    (tmp_path / "step-junk").mkdir()
    assert format.committed(tmp_path) == []
    with pytest.raises(UserError, match="never finished"):
        format.verify(intact)
    format.clean(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-junk"]  # not ours: left alone


def test_no_code_runs_from_a_checkpoint_file(tmp_path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {marker}",))

    for name, write in (("zip.pt", torch.save), ("raw.pt", lambda value, path: path.write_bytes(pickle.dumps(value)))):
        write({"module": Evil()}, tmp_path / name)
        with pytest.raises(UserError, match="not a checkpoint file: damaged"):
            deepspeed_files.safe_load(tmp_path / name)
    assert not marker.exists()
    (tmp_path / "cut.pt").write_bytes((tmp_path / "zip.pt").read_bytes()[:100])
    with pytest.raises(UserError, match="not a checkpoint file"):
        deepspeed_files.safe_load(tmp_path / "cut.pt")


def sealed(folder: Path, state: dict) -> Path:
    """A committed checkpoint with this state.json and no weights."""
    folder.mkdir()
    storage.publish_json(folder / format.STATE, state)
    manifest = {"schema_version": format.MANIFEST_SCHEMA_VERSION, "files": storage.manifest_of(folder)}
    storage.publish_json(folder / storage.MANIFEST, manifest)
    (folder / format.COMMITTED).write_text(storage.sha256_file(folder / storage.MANIFEST))
    return folder


def test_a_state_of_schema_1_is_read_with_todays_keys(tmp_path):
    """As commit 160ea30 wrote it (only generators and losses are shortened)."""
    state = json.loads(Path(__file__).with_name("state_160ea30.json").read_text())
    assert state["schema_version"] == 1 and state["calm_evaluations"] == 0
    read = format.verify(sealed(tmp_path / "step-000200", {**state, "calm_evaluations": 2}))
    assert read["evaluations_below"] == 2 and "calm_evaluations" not in read
    assert {field.name for field in fields(TrainState)} - {"shared"} < read.keys()  # added since, with a default
    assert {key: value for key, value in read.items() if key in state} == {
        key: value for key, value in state.items() if key != "calm_evaluations"
    } | {"schema_version": 2}
    with pytest.raises(UserError, match="schema_version 3, this program reads 1 and 2"):
        format.verify(sealed(tmp_path / "step-000201", {**state, "schema_version": 3}))


def test_manifest_lists_everything_but_itself(saved):
    manifest = json.loads((saved[0] / "step-000004" / storage.MANIFEST).read_text())
    assert manifest["schema_version"] == 1
    assert {"state.json"} < set(manifest["files"]) and "COMMITTED" not in manifest["files"]
