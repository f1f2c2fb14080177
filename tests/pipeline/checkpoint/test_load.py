"""Commit protocol: what has no COMMITTED does not exist, and no damaged or foreign file is believed (one real rank)."""

import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import deepspeed_files, format
from pipeline.errors import UserError
from pipeline.io import storage

SAVE = """
import sys, torch, numpy as np
from pathlib import Path
from pipeline.checkpoint.retention import Policy, retain
from pipeline.checkpoint import load as checkpoint
from pipeline.checkpoint.save import Saver
from pipeline.train.engine import init_distributed, build_engine
from pipeline.config.train import TrainConfig
import pipeline.train.optim
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
# A disk that is full: the ranks agree that nothing was saved, and say so.
real = checkpoint._HashingFile.write
def full(self, data):
    raise OSError(28, "No space left on device")
checkpoint._HashingFile.write = full
try:
    Saver(engine, folder).save({"step": 9, "world_size": 1, "config": {}})
except Exception as error:
    print("REFUSED", type(error).__name__, error)
checkpoint._HashingFile.write = real
print("LEFT", sorted(p.name for p in folder.iterdir()))
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


def test_saved_retained_and_whole(saved):
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
        whole = copy(source, tmp_path / f"{number}")
        broken = whole / name
        data = bytearray(broken.read_bytes())
        data[len(data) // 2] ^= 0x40
        broken.write_bytes(bytes(data))
        with pytest.raises(UserError):
            format.verify(whole)


def test_without_committed_it_does_not_exist(saved, tmp_path):
    whole = copy(saved[0] / "step-000004", tmp_path / "step-000004")
    assert format.committed(tmp_path) == [whole]
    (whole / "COMMITTED").unlink()
    (tmp_path / ".step-000005.staging").mkdir()
    (tmp_path / "step-junk").mkdir()
    assert format.committed(tmp_path) == []
    with pytest.raises(UserError, match="never finished"):
        format.verify(whole)
    format.clean(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-junk"]  # not ours: left alone


def test_no_code_runs_from_a_checkpoint_file(tmp_path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {marker}",))

    for name, write in (("zip.pt", torch.save), ("raw.pt", lambda value, path: path.write_bytes(pickle.dumps(value)))):
        write({"module": Evil()}, tmp_path / name)
        with pytest.raises(UserError, match="not a checkpoint file of ours"):
            deepspeed_files.safe_load(tmp_path / name)
    assert not marker.exists()
    (tmp_path / "cut.pt").write_bytes((tmp_path / "zip.pt").read_bytes()[:100])
    with pytest.raises(UserError, match="not a checkpoint file"):
        deepspeed_files.safe_load(tmp_path / "cut.pt")


def test_manifest_lists_everything_but_itself(saved):
    manifest = json.loads((saved[0] / "step-000004" / storage.MANIFEST).read_text())
    assert manifest["schema_version"] == 1
    assert {"state.json"} < set(manifest["files"]) and "COMMITTED" not in manifest["files"]
