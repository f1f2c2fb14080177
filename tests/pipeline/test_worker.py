"""pipeline/worker.py: the environment of a rank before it starts its work."""

import json
import os
import subprocess
import sys

import fsspec.config

from pipeline import worker


def test_fsspec_gets_what_came_by_the_file(tmp_path, monkeypatch):
    """fsspec reads its variables once, at import, which is before the file is read."""
    file = tmp_path / "environment.json"
    file.write_text(json.dumps({"FSSPEC_PLDRTEST_KEY": "k"}))
    monkeypatch.setenv(worker.ENVIRONMENT_FILE, str(file))
    monkeypatch.setenv("FSSPEC_PLDRTEST_KEY", "is set anew, and taken away after the test")
    try:
        worker.take_environment()
        assert fsspec.config.conf["pldrtest"] == {"key": "k"}
    finally:
        fsspec.config.conf.pop("pldrtest", None)


DEEPSPEEDS_NODE = """
import os, sys
from launch.backends.environment import rank_environment
from pipeline import distributed, worker
environment = rank_environment(2) | {"CUDA_VISIBLE_DEVICES": "0,1"}  # as DeepSpeed's launch.py overwrites it
os.environ.clear(); os.environ.update(environment)
worker.take_environment()
print(os.environ["CUDA_VISIBLE_DEVICES"], end="")
"""


def test_ranks_keep_the_gpus_that_the_job_was_given():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "6,7", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", DEEPSPEEDS_NODE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "6,7"


def test_torch_counts_gpus_by_what_is_set_before_cuda_is_used():
    """Why `take_environment` comes early enough: importing the worker, which imports torch, does not use CUDA."""
    code = "import torch, pipeline.worker; print(torch.cuda.is_initialized(), torch.cuda._cached_device_count)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "None"]
