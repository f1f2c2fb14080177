"""The host's clock is set back by an hour in the middle of a training."""

import json
import os
import subprocess
import sys
import time

import pytest

from pipeline.tracking.client import client

CUSTOMIZE = """
import os, time
_time, _time_ns = time.time, time.time_ns
def _off():
    return 3600 if os.path.exists(os.environ["CLOCK_FILE"]) else 0
time.time = lambda: _time() - _off()
time.time_ns = lambda: _time_ns() - _off() * 10**9
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_training_whose_clock_is_set_back_ends_with_sane_numbers(tmp_path, make_run, repository):
    config = make_run(tmp_path, steps=150, checkpoint_every=20, validate_every=50, log_every=1, timeout_s=60)
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "sitecustomize.py").write_text(CUSTOMIZE)
    python = f"{tmp_path / 'python'}:{repository}"
    environment = {**os.environ, "PYTHONPATH": python, "CLOCK_FILE": str(tmp_path / "set-back")}
    pldr = [sys.executable, "-m", "launch.cli"]
    for stage in ("shard", "tokenizer", "tokenize"):
        subprocess.run([*pldr, stage, str(config)], cwd=tmp_path, env=environment, check=True, capture_output=True)
    command = [*pldr, "train", str(config), "--json"]
    with open(tmp_path / "err", "wb") as err:
        training = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=err)
        while training.poll() is None and not (tmp_path / "run/checkpoints/step-000040/COMMITTED").exists():
            time.sleep(0.05)
        assert training.poll() is None, "it ended before its clock was set back"
        (tmp_path / "set-back").touch()
        out = training.communicate()[0]
    assert training.returncode == 0, (tmp_path / "err").read_text()
    result = json.loads(out.splitlines()[-1])["result"]
    mlflow = client(f"sqlite:///{tmp_path}/mlflow.db")
    info = mlflow.get_run(result["run_id"]).info
    assert info.status == "FINISHED" and 0 < info.end_time - info.start_time < 3600_000
    points = {key: mlflow.get_metric_history(info.run_id, key) for key in ("train/loss", "train/tokens_per_second")}
    for history in points.values():
        assert [point.step for point in history] == sorted({point.step for point in history})  # by their times
        assert history[-1].step == 150 and len(history) >= 149
    rates = [point.value for point in points["train/tokens_per_second"]]
    assert min(rates) > 0 and max(rates) < 1e7
    assert (tmp_path / "run/checkpoints/step-000150/COMMITTED").exists()
