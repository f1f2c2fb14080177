"""Faults that a training job meets, done to real jobs: signals, a stopped rank, a killed one, a full disk, restarts.

`tokens` makes the data once; each test trains in a copy of that run directory.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launch.cli import main
from pipeline.checkpoints import committed, verify

pytestmark = pytest.mark.timeout(900)  # each start loads torch and deepspeed in four processes
PLDR = [sys.executable, "-m", "launch.cli"]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, make_run):
    """A run directory with everything that training needs, and its YAML beside it."""
    folder = tmp_path_factory.mktemp("faults")
    config = make_run(folder, steps=60, checkpoint_every=10, validate_every=60, log_every=5)
    with contextlib.chdir(folder):
        for stage in ("shard", "tokenizer", "tokenize"):
            assert main([stage, str(config)]) == 0
    return folder


@pytest.fixture
def work(tokens, tmp_path):
    """A copy of it to train in."""
    shutil.copytree(tokens, tmp_path / "work")
    return tmp_path / "work"


class Training:
    """`pldr train` in a process of its own."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.folder = folder
        with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
            command = [*PLDR, "train", "tiny.yaml", "--json", f"run_dir={folder / 'run'}", *overrides]
            self.process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=err)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.wait_for(lambda: not self.job())

    def job(self) -> dict[str, int]:
        """The processes of the job by what they are: runner, launch, 0, 1."""
        found = {}
        for process in psutil.process_iter(["pid", "cmdline", "status"]):
            words = process.info["cmdline"] or []
            if any(str(self.folder / "run") in word for word in words) and process.pid != self.process.pid:
                rank = next((w.removeprefix("--local_rank=") for w in words if w.startswith("--local_rank=")), None)
                name = rank or ("runner" if "deepspeed.launcher.runner" in words else "launch")
                found[name] = process.pid
        return found

    def wait_for(self, condition, seconds=400):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "waited in vain: " + self.log()[-2000:]
            time.sleep(0.02)

    def wait_for_checkpoint(self, count=1):
        folder = self.folder / "run" / "checkpoints"
        self.wait_for(lambda: len(committed(folder)) >= count or self.process.poll() is not None)
        assert self.process.poll() is None, self.log()[-2000:]

    def wait(self, seconds=400) -> int:
        code = self.process.wait(seconds)
        self.wait_for(lambda: not self.job(), seconds=15)  # no orphans
        return code

    def log(self) -> str:
        log = self.folder / "run" / "logs" / "train.log"
        return (log.read_text(errors="replace") if log.exists() else "") + (self.folder / "err").read_text()

    @property
    def output(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def result(self) -> dict:
        return json.loads(self.output.strip().splitlines()[-1])


def steps_saved(folder: Path) -> list[int]:
    return [verify(checkpoint)["step"] for checkpoint in committed(folder / "run" / "checkpoints")]


def last_bytes(folder: Path) -> dict[str, bytes]:
    """The tensors of the last checkpoint, file by file."""
    last = committed(folder / "run" / "checkpoints")[-1]
    return {p.name: p.read_bytes() for p in sorted((last / last.name).iterdir())}


@pytest.fixture(scope="module")
def straight(tokens, tmp_path_factory):
    """The last checkpoint of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("straight") / "work"
    shutil.copytree(tokens, folder)
    with Training(folder) as training:
        assert training.wait() == 0, training.log()[-2000:]
    return last_bytes(folder)


@pytest.mark.slow
def test_sigterm_to_the_command_saves_and_ends_with_0(work):
    with Training(work) as training:
        training.wait_for_checkpoint()
        training.process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert training.wait() == 0, training.log()[-2000:]
        assert time.monotonic() - started < 25
        last = steps_saved(work)[-1]
        assert last > 10 and training.result["checkpoint"] == f"step-{last:06d}"
        assert f"training was stopped by SIGTERM at step {last}" in training.output and "start again" in training.output


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_signals_stopped_again_and_again_is_bit_equal(work, straight):
    """SIGUSR1 to one rank alone stops both at the same step; so does SIGTERM to DeepSpeed's launcher."""
    for number, (victim, signum) in enumerate({"1": signal.SIGUSR1, "launch": signal.SIGTERM}.items(), 1):
        with Training(work) as training:
            training.wait_for_checkpoint(number)
            os.kill(training.job()[victim], signum)
            assert training.wait() == 0, training.log()[-2000:]
            assert signum.name in training.result["stopped"]
    with Training(work) as training:
        assert training.wait() == 0, training.log()[-2000:]
    assert last_bytes(work) == straight


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_within_the_timeout(work):
    with Training(work, "train.timeout_s=10") as training:
        training.wait_for_checkpoint()
        victim = training.job()["1"]
        os.kill(victim, signal.SIGSTOP)
        started = time.monotonic()
        assert training.wait() == 1
        assert time.monotonic() - started < 10 + 15  # the others' timeout; then what is left is killed
        assert f"rank 1 (process {victim}) is stopped" in training.result["error"]
        assert "Traceback" in (work / "run" / "logs" / "train.log").read_text()


@pytest.mark.slow
def test_a_killed_rank_is_named_and_the_job_restarted_from_the_last_commit(work, straight):
    with Training(work, "train.max_restarts=1") as training:
        training.wait_for_checkpoint()
        victim = training.job()["0"]
        os.kill(victim, signal.SIGKILL)
        assert training.wait() == 0, training.log()[-2000:]
        assert f"rank 0 (process {victim}) is gone" in training.output
        assert "restarted from step-0000" in training.output and "0 of 1 restarts are left" in training.output
    assert last_bytes(work) == straight


@pytest.mark.slow
def test_a_users_mistake_is_not_restarted(work):
    with Training(work, "train.max_restarts=3", "train.max_lr=1e30", "train.max_skipped_steps=3") as training:
        assert training.wait() == 2
        assert "the last batch is sequences" in training.result["error"] and "restart" not in training.output


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_warns_and_training_goes_on(work, straight):
    """Room for two checkpoints and a half, on a file system of their own: the third save fails."""
    with Training(work, "train.steps=60") as training:
        training.wait_for_checkpoint()
        training.process.send_signal(signal.SIGTERM)
        assert training.wait() == 0
    size = sum(f.stat().st_size for f in committed(work / "run" / "checkpoints")[-1].rglob("*") if f.is_file())
    shutil.rmtree(work / "run" / "checkpoints")
    (work / "run" / "run.json").unlink()
    small = work / "run" / "checkpoints"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(size * 2.5)}", "tmpfs", str(small)])
    if mounted.returncode:
        pytest.skip("this container may not mount a tmpfs")
    try:
        with Training(work) as training:
            assert training.wait() == 1
            assert "warning: " in training.output and "training goes on" in training.output
            assert "step-000060: the checkpoint was not saved" in training.result["error"]
        assert steps_saved(work) == [10, 20]
        subprocess.run(["mount", "-o", f"remount,size={size * 4}", str(small)], check=True)
        with Training(work) as training:
            assert training.wait() == 0, training.log()[-2000:]
        assert last_bytes(work) == straight
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_kill_minus_9_of_anything_at_any_time_loses_nothing(work, straight):
    """30 kills at random moments, of ranks, runner, launcher and command; a third of them while a save is going on. Each start
    goes on from the last committed checkpoint and none is lost; what comes out is the run that nothing happened to."""
    rng = random.Random(11)
    checkpoints = work / "run" / "checkpoints"
    before: list[int] = []
    for number in range(30):
        shutil.rmtree(checkpoints, ignore_errors=True) if before and before[-1] == 60 else None
        (work / "run" / "run.json").unlink(missing_ok=True) if not checkpoints.exists() else None
        before = steps_saved(work)
        with Training(work) as training:
            training.wait_for(lambda: {"0", "1", "runner", "launch"} <= training.job().keys())
            jobs = training.job() | {"pldr": training.process.pid}
            victim = jobs[rng.choice(sorted(jobs))]
            if number % 3 == 0:
                training.wait_for(lambda: any(checkpoints.glob(".*.staging")) or training.process.poll() is not None)
                time.sleep(rng.uniform(0, 0.1))
            else:
                time.sleep(rng.uniform(0, 20))
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
            training.wait()
        after = steps_saved(work)
        assert not before or (after and after[-1] >= before[-1]), (number, before, after)
        before = after
    with Training(work) as training:
        assert training.wait() == 0, training.log()[-2000:]
    assert last_bytes(work) == straight
