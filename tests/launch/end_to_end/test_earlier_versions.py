"""A run directory of commit 160ea30 is read, resumed and packaged by today's code (tests/data/README.md)."""

import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.checkpoint.format import committed, verify
from pipeline.config.load import load_config
from pipeline.config.paths import RunPaths
from pipeline.io.storage import read_json

RUN_ID = "21b615ba57fa4c239f61453ba5df4c3d"
HERE = Path("/tmp/pldr-160ea30")  # where the run was begun: its records name this path


@pytest.fixture
def old_run(repository: Path) -> Iterator[Path]:
    """The unpacked run, where it was made; its YAML."""
    if HERE.exists():
        pytest.skip(f"{HERE} exists already; remove it")
    try:
        with tarfile.open(repository / "tests" / "data" / "run-160ea30.tar.xz") as archive:
            archive.extractall(HERE, filter="data")
        yield HERE / "tiny.yaml"
    finally:
        shutil.rmtree(HERE, ignore_errors=True)


def pldr(config: Path, verb: str, *arguments: str) -> dict:
    command = [sys.executable, "-m", "launch.cli", verb, config.name, *arguments, "--json"]
    ended = subprocess.run(command, cwd=config.parent, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr + ended.stdout[-3000:]
    return json.loads(ended.stdout.strip().splitlines()[-1])


def test_the_checkpoint_and_its_state_are_read(old_run: Path) -> None:
    [checkpoint] = committed(RunPaths(old_run.parent / "run").checkpoints)
    state = verify(checkpoint)
    assert state["step"] == 206 and state["mlflow_run_id"] == RUN_ID
    assert state["config"]["train"]["steps"] == 500


def test_the_configuration_is_todays(old_run: Path) -> None:
    """No key of that time is unknown now."""
    saved = read_json(old_run.parent / "run" / "logs" / "job.json")["config"]
    assert load_config(old_run).as_dict()["model"].items() >= saved["model"].items()


@pytest.mark.slow
def test_it_is_resumed_and_packaged(old_run: Path) -> None:
    result = pldr(old_run, "run")
    trained = result["stages"]["train"]["result"]
    assert trained["resumed_from"] == "step-000206" and trained["run_id"] == RUN_ID and trained["steps"] == 500
    assert result["certified"]
    assert all(result["stages"][name]["skipped"] for name in ("tokenizer", "tokenize"))
