"""`pldr launch slurm | kubernetes`: what is checked before a scheduler gets it."""

import contextlib
from pathlib import Path

import pytest

from launch.cli import main

SIZES = ("--nodes", "1", "--ranks-per-node", "1", "--gpus-per-node", "0")


@pytest.fixture
def run(tmp_path, make_run, monkeypatch):
    """A YAML whose run directory holds folders named as checkpoints."""
    config = make_run(tmp_path)
    (tmp_path / "run" / "checkpoints" / "step-000100").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return str(config)


@pytest.mark.parametrize(
    ("cwd", "given"),
    [
        (".", "run/checkpoints/step-000100"),
        ("run/checkpoints", "./step-000100"),
        ("run/checkpoints", "step-000100"),
        ("run", "../run/checkpoints/step-000100/"),
    ],
    ids=["relative", "inside", "bare", "up"],
)
def test_slurm_would_go_back_at_every_start(run, capsys, cwd, given):
    with contextlib.chdir(cwd):
        assert main(["launch", "slurm", run, *SIZES, "--resume", given, "--dry-run"]) == 2
    assert f"--resume {given}: would go back there at every start" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["tiny/checkpoints/step-000100", "/runs/tiny/checkpoints/step-000100"])
def test_kubernetes_would_go_back_at_every_start(run, capsys, given):
    words = ["--image", "i", "--volume", "claim:/runs", "run_dir=/runs/tiny", "--resume", given, "--dry-run"]
    assert main(["launch", "kubernetes", run, *SIZES, *words]) == 2
    assert "would go back there at every start" in capsys.readouterr().err


def test_another_runs_checkpoint_is_no_going_back(run, capsys):
    words = ["--image", "i", "--volume", "claim:/runs", "run_dir=/runs/tiny", "--dry-run"]
    given = "/runs/other/checkpoints/step-000100"
    assert main(["launch", "kubernetes", run, *SIZES, *words, "--resume", given]) == 0
    assert Path(given).name in capsys.readouterr().out
