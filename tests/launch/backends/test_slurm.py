"""launch/backends/slurm.py: what is checked before Slurm gets a job, and when the batch script requeues itself."""

import contextlib
import os
import signal
import subprocess
import time

import pytest

from launch.backends import slurm
from launch.backends.scheduled import ScheduledJob
from launch.backends.slurm import SlurmOptions
from launch.cli import main
from pipeline.config.load import load_config
from pipeline.config.paths import RunPaths
from pipeline.errors import ConfigError

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
    assert f"--resume {given}: would go back to it at every start" in capsys.readouterr().err


def script_of(config: str, *, time: str | None = None) -> str:
    job = ScheduledJob(
        nodes=2, ranks_per_node=1, gpus_per_node=0, cpus_per_rank=1, resume="auto", force=False, template=None
    )
    settings = load_config(config)
    return slurm.render(settings, RunPaths(settings.run_dir), job, SlurmOptions(time=time), [config])


# Stand-ins for Slurm's commands, which are not here: srun ends with CODE, or commits what SAVES says and ends with 75.
SRUN = """#!/bin/bash
trap '[ -z "$SAVES" ] || { mkdir -p "$SAVES"; touch "$SAVES/COMMITTED"; }; exit 75' USR1
touch listening
for _ in $(seq $TENTHS); do sleep 0.1; done
exit $CODE
"""


SCONTROL = """#!/bin/bash
case $1 in show) echo n1; echo n2;; *) echo "$@" >> scontrol.log; exit $REFUSES;; esac
"""


@pytest.mark.parametrize(
    ("signaled", "code", "saves", "refuses", "ended", "requeued", "message"),
    [
        (True, "0", True, "0", 75, True, "saved, requeued"),
        (True, "0", False, "0", 75, False, "not requeued, because that would repeat forever; raise --time"),
        (True, "0", True, "1", 75, True, "submit it yourself: sbatch "),
        (False, "0", False, "0", 0, False, ""),
        (False, "2", False, "0", 2, False, ""),
        (False, "75", False, "0", 75, False, ""),
    ],
    ids=["time is up", "no progress", "scontrol fails", "done", "failed", "scancel"],
)
def test_the_batch_script_requeues_itself_only_when_its_time_was_up_and_it_saved_something(
    run, tmp_path, signaled, code, saves, refuses, ended, requeued, message
):
    (tmp_path / "run" / "checkpoints" / "step-000100" / "COMMITTED").touch()
    (tmp_path / "bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    script = script_of(run).replace("export PATH=", f"export PATH={tmp_path}/bin:")
    step = str(tmp_path / "run" / "checkpoints" / "step-1000000")
    environment = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "CODE": code, "REFUSES": refuses,
                   "SAVES": step if saves else "", "TENTHS": "100" if signaled else "2"}  # fmt: skip
    job = subprocess.Popen(["bash", "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    if signaled:
        end = time.monotonic() + 10
        while not (tmp_path / "listening").exists():
            assert time.monotonic() < end
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
    out, _ = job.communicate(timeout=20)
    assert job.returncode == ended and message in out, out
    log = tmp_path / "scontrol.log"
    assert (log.read_text() if log.exists() else "") == ("requeue 7\n" if requeued else "")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 300), ("5:30", 330), ("1:00:00", 3600), ("2-0", 172800), ("1-1:30", 91800), ("1-00:00:01", 86401)],
)
def test_slurms_time_limits(text, seconds):
    assert slurm.seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("time", "message"),
    [("5", "give more than 300 s"), ("00:03:00", "leaves no time to train"), ("tomorrow", "write Slurm's form")],
)
def test_a_limit_that_the_signal_comes_before_is_refused(run, time, message):
    with pytest.raises(ConfigError, match=message):
        script_of(run, time=time)
    assert "--time=6" in script_of(run, time="6") and "--time=0" in script_of(run, time="0")
