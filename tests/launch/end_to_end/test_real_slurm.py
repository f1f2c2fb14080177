"""With a real Slurm, where there is one: tasks that end badly, what can never start, a second job, a signal by hand."""

import contextlib
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from launch.cli import main
from pipeline import slurm
from pipeline.config.data import Slurm
from pipeline.data.executor.jobs import Engine, run_tasks
from pipeline.errors import UserError
from tests.pipeline.data.executor import engine_steps


def no_slurm() -> str:
    """Why these tests cannot run here; empty when they can."""
    if shutil.which("sbatch") is None:
        return "no sbatch: apt install slurm-wlm munge, and start slurmctld and slurmd"
    idle = subprocess.run(["sinfo", "-h", "-t", "idle,mix", "-o", "%D"], capture_output=True, text=True)
    return "" if idle.stdout.strip() else f"Slurm has no free node ({' '.join(idle.stderr.split())[:100]})"


pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.skipif(bool(no_slurm()), reason=no_slurm())]


@pytest.fixture
def partition():
    """The default one."""
    lines = subprocess.run(["sinfo", "-h", "-o", "%P"], capture_output=True, text=True).stdout.split()
    return next(line for line in lines if line.endswith("*")).rstrip("*")


@pytest.fixture
def folder(tmp_path, monkeypatch, repository):
    """On a file system that the nodes see: name it with --basetemp where /tmp is not one."""
    monkeypatch.setenv("PYTHONPATH", str(repository))
    monkeypatch.chdir(repository)  # where the tasks run
    return tmp_path


def array(folder: Path, partition: str, *, seconds: float = 0, **settings) -> None:
    """Two tasks on Slurm."""
    steps = [engine_steps.Read(folder / "plan.json", seconds), engine_steps.Publish(folder / "out", folder / "work")]
    asked = Slurm(partition=partition, mem_per_cpu_gb=1, **{"time": "10", **settings})
    options = {"tasks": 2, "workers": 2, "workers_key": "data.workers", "label": "real"}
    run_tasks(steps, work=folder / "work", output=folder / "out", engine=Engine("slurm", asked.model_dump()), **options)


def test_a_task_that_died_and_the_next_start(folder, partition, capsys):
    (folder / "plan.json").write_text('{"1": "killed"}')
    with pytest.raises(UserError, match=r"task 1 \(1 of 2 are unfinished\) ended as FAILED in Slurm job \d+_1"):
        array(folder, partition)
    (folder / "plan.json").write_text("{}")
    array(folder, partition)
    assert engine_steps.published(folder) == engine_steps.expected(2)
    assert "submitted: 2 tasks" in capsys.readouterr().err


def test_a_task_over_its_time(folder, partition):
    with pytest.raises(UserError, match=r"ended as TIMEOUT in Slurm job \d+_0.*raise data.slurm.time"):
        array(folder, partition, seconds=400, time="1")


def test_more_than_any_node_has(folder, partition):
    with pytest.raises(
        UserError, match=r"can never start|sbatch refused.*lower data.slurm.(cpus_per_task|mem_per_cpu_gb)"
    ):
        array(folder, partition, cpus_per_task=4000)
    assert not [job for job in slurm.queue() if "real" in job.name and not job.ended]


@pytest.fixture
def submitted(folder, make_run, capsys, repository):
    """A run that a Slurm job trains; its YAML, the options, the job's id. Canceled at the end."""
    config = str(make_run(folder, steps=100_000, checkpoint_every=10, validate_every=100_000, log_every=10))
    with contextlib.chdir(folder):
        for stage in ("shard", "tokenizer", "tokenize"):
            assert main([stage, config]) == 0
        options = [config, "--nodes", "1", "--ranks-per-node", "1", "--gpus-per-node", "0", "--cpus-per-rank", "1"]
        assert main(["launch", "slurm", *options, "--time", "20", "--sbatch", "mem=4G"]) == 0, capsys.readouterr()
        job = (folder / "run" / "logs" / "slurm.json").read_text().split('"job": "')[1].split('"')[0]
        yield options, job
        slurm.cancel([job])


def wait_for(found, seconds=300):
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end
        time.sleep(1)


def test_a_second_job_and_a_requeue_by_hand(submitted, folder, capsys):
    options, job = submitted
    logs = folder / "run" / "logs"
    assert main(["launch", "slurm", *options]) == 1
    assert f"Slurm job {job} of this run " in capsys.readouterr().err
    wait_for(lambda: list((folder / "run" / "checkpoints").glob("step-*/COMMITTED")))
    second = slurm.submit(logs / "train.sbatch", (), {"": "no fix"})
    said = logs / f"slurm-{second}.out"
    wait_for(lambda: said.exists() and f"Slurm job {job} trains this run already" in said.read_text())
    wait_for(lambda: not [one for one in slurm.queue() if one.id == second and not one.ended])
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)
    wait_for(lambda: "stopped by SIGUSR1: saved, requeued" in (logs / f"slurm-{job}.out").read_text())
