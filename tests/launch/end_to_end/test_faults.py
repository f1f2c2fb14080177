"""Faults of real training jobs: signals, a suspended rank, a killed one, a full disk, restarts.

`tokens` makes the data once; each test trains in a copy of that run directory.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pipeline.checkpoint.format import committed
from pipeline.tracking.publish import published_checkpoints
from tests.launch.end_to_end.training import PLDR, Training, mlflow_run, steps_saved

pytestmark = pytest.mark.timeout(900)  # each start loads torch and deepspeed in four processes


def last_bytes(folder: Path) -> dict[str, bytes]:
    """The tensors of the last checkpoint, file by file."""
    last = committed(folder / "run" / "checkpoints")[-1]
    return {p.name: p.read_bytes() for p in sorted((last / last.name).iterdir())}


@pytest.fixture(scope="module")
def straight(tokens, tmp_path_factory):
    """The last checkpoint of an undisturbed run."""
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
def test_a_run_that_signals_stopped_again_and_again_is_bit_equal(work, straight):
    """SIGUSR1 to only one rank stops both at the same step; so does SIGTERM to DeepSpeed's launcher."""
    for victim, signum in {"1": signal.SIGUSR1, "launch": signal.SIGTERM}.items():
        known = set(committed(work / "run" / "checkpoints"))
        with Training(work) as training:  # older checkpoints are removed meanwhile, so that their number says nothing
            training.wait_for(lambda known=known: set(committed(work / "run" / "checkpoints")) - known)
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
            assert "warning: " in training.output and "training continues" in training.output
            assert "step-000060: the checkpoint was not saved" in training.result["error"]
        assert steps_saved(work) == [10, 20]
        subprocess.run(["mount", "-o", f"remount,size={size * 4}", str(small)], check=True)
        with Training(work) as training:
            assert training.wait() == 0, training.log()[-2000:]
        assert last_bytes(work) == straight
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


@pytest.mark.slow
def test_a_rank_out_of_memory_says_so_and_what_was_in_it(work):
    command = ["prlimit", f"--as={4_500_000_000}", *PLDR, "train", "tiny.yaml", "--json", "train.global_batch=32768",
               "train.micro_batch=16384", f"run_dir={work / 'run'}"]  # fmt: skip
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=400)
    error = json.loads(done.stdout.strip().splitlines()[-1])["error"]
    assert done.returncode == 1 and "is out of memory in step" in error and "lower train.micro_batch" in error
    written = [Path(word) for word in error.split() if word.endswith(".txt")]
    assert len(written) == 1 and "GB resident" in written[0].read_text()
    client, run = mlflow_run(work)
    assert run.info.status == "FAILED"
    artifacts = client.list_artifacts(run.info.run_id, "failure")
    assert {f"failure/{written[0].name}"} < {item.path for item in artifacts}


OFTEN = ("train.steps=400", "train.checkpoint_every=4", "train.keep_checkpoints=1000", "train.log_every=4",
         "train.validate_every=400")  # fmt: skip


def outcome(folder: Path) -> tuple[dict[str, dict[str, bytes]], list[tuple[int, float]], set[str]]:
    """Everything that a run leaves: the tensors of every checkpoint, the losses in MLflow, the published checkpoints."""
    kept = {
        c.name: {p.name: p.read_bytes() for p in (c / c.name).iterdir()}
        for c in committed(folder / "run" / "checkpoints")
    }
    client, run = mlflow_run(folder)
    assert run.info.status == "FINISHED"
    losses = sorted((p.step, p.value) for p in client.get_metric_history(run.info.run_id, "train/loss"))
    published = published_checkpoints(f"sqlite:///{folder / 'mlflow.db'}", run.info.run_id)
    return kept, losses, set(published)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_kill_minus_9_of_anything_at_any_time_loses_nothing(tokens, tmp_path):
    """32 kills of ranks, runner, launcher and command, at random moments: of the start, of the steps, and (every other one)
    of a save. No committed step is lost, and what comes out is, checkpoint for checkpoint and loss for loss, the run that
    nothing happened to. `kills.json` in the test's folder lists what was killed."""
    rng, hits = random.Random(11), []
    for name in ("straight", "killed"):
        shutil.copytree(tokens, tmp_path / name)
    with Training(tmp_path / "straight", *OFTEN) as training:
        assert training.wait() == 0, training.log()[-2000:]
    work = tmp_path / "killed"
    checkpoints = work / "run" / "checkpoints"
    for number in range(32):
        known = len(committed(checkpoints))
        with Training(work, *OFTEN) as training:

            def reached(condition, training=training):
                training.wait_for(lambda: condition() or training.process.poll() is not None)

            if number % 4 == 0:  # while it starts
                time.sleep(rng.uniform(0, 15))
            else:
                goal = known + rng.randint(1, 3)
                reached(lambda goal=goal: len(committed(checkpoints)) >= goal)
                if number % 2:
                    reached(lambda: any(checkpoints.glob(".*.staging")))
                    time.sleep(rng.uniform(0, 0.12))
                else:
                    time.sleep(rng.uniform(0, 0.6))
            assert training.process.poll() is None, training.log()[-2000:]
            jobs = training.job() | {"pldr": training.process.pid}
            victim = rng.choice(sorted(jobs))
            saving = [sorted(p.name for p in folder.rglob("*")) for folder in checkpoints.glob(".*.staging")]
            before = steps_saved(work)
            with contextlib.suppress(ProcessLookupError):
                os.kill(jobs[victim], signal.SIGKILL)
            assert training.wait() != 0
        after = steps_saved(work)  # each of them complete
        hits.append({"victim": victim, "committed": before[-1:], "staging": saving})
        (tmp_path / "kills.json").write_text(json.dumps(hits, indent=1))
        assert set(before) <= set(after), (number, victim)
    assert {hit["victim"] for hit in hits} == {"0", "1", "launch", "runner", "pldr"}
    assert sum(bool(hit["staging"]) for hit in hits) >= 8
    with Training(work, *OFTEN) as training:
        assert training.wait() == 0, training.log()[-2000:]
    assert outcome(work) == outcome(tmp_path / "straight")
