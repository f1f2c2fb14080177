"""A run that is started, killed, resumed and finished while the MLflow server is unreachable."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.cli import main
from pipeline.checkpoint import format
from pipeline.config.load import load_config
from pipeline.config.paths import RunPaths
from pipeline.tracking import publish
from pipeline.tracking.client import client
from pipeline.tracking.run import run_named

PLDR = [sys.executable, "-m", "launch.cli"]


def rank_of(run_dir, rank):
    """The process of a rank of this run."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
                variables = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                if "pipeline.worker" in command and str(run_dir) in command and f"RANK={rank}" in variables:
                    return int(entry.name)
    raise AssertionError(f"rank {rank} does not run")


@pytest.mark.slow
def test_a_run_that_mlflow_hears_of_afterwards(tmp_path, make_run, server, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "run"
    path = make_run(tmp_path, steps=200, checkpoint_every=50, validate_every=50, keep_every=100,
                    publish_to=str(tmp_path / "published"))  # fmt: skip
    words = [str(path), f"tracking.uri={server.uri}"]
    config = load_config(path, words[1:])

    def pldr(*arguments):
        code = main([*arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    for stage in ("shard", "tokenizer", "tokenize"):
        assert pldr(stage, *words)[0] == 0
    job = subprocess.Popen([*PLDR, "train", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end = time.monotonic() + 240
    while not (run_dir / "checkpoints" / "step-000100" / "COMMITTED").exists():
        assert job.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    os.kill(rank_of(run_dir, 1), signal.SIGKILL)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 1 and "training continues as local-" in output, output[-2000:]
    server.start()
    code, out, errors = pldr("track", "replay", *words, "--json")
    assert code == 0, errors
    run_id = json.loads(out.splitlines()[-1])["run_id"]
    mlflow = client(server.uri)
    assert mlflow.get_run(run_id).info.status == "FAILED"
    assert [item.path for item in mlflow.list_artifacts(run_id, "failure")]
    server.kill()

    code, out, errors = pldr("train", *words, "--json")
    assert code == 0, errors
    result = json.loads(out.splitlines()[-1])["result"]
    assert result["run_id"] == run_id and result["resumed_from"] >= "step-000100"
    server.start()
    code, _, errors = pldr("track", "replay", *words)
    assert code == 0, errors
    code, out, errors = pldr("runs", *words, "--json")
    (row,) = json.loads(out.splitlines()[-1])["runs"]
    assert (row["id"], row["status"], row["step"]) == (run_id, "FINISHED", 200)
    steps = [p.step for p in mlflow.get_metric_history(run_id, "train/loss")]
    assert sorted(steps) == list(range(10, 201, 10))
    kept = [c.name for c in format.committed(run_dir / "checkpoints")]
    assert {"step-000100", "step-000150", "step-000200"} <= set(kept) and row["checkpoints"] == kept
    state = format.verify(run_dir / "checkpoints" / "step-000200")
    assert state["val_step"] == 200 and state["val_loss_cached"] == row["val_loss_cached"]
    store, names = publish.available(run_named(config, RunPaths(config.run_dir), run_id))
    assert names == kept[::-1] and str(store).startswith(str(tmp_path / "published"))
    assert format.verify(publish.fetch(store, names[0], tmp_path / "elsewhere"))["step"] == 200
