"""Each signal that asks `pldr` to stop, at different moments, and with readers of its output that stand still or are gone."""

import contextlib
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from pipeline.checkpoint.format import committed, verify
from tests.launch.end_to_end.training import PLDR, Training, mlflow_run, steps_saved

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ALL = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
LIMIT_S = 75  # the limit is 25 s; a busy machine takes longer
LONG = ("train.steps=100000", "train.checkpoint_every=100000", "train.validate_every=100000")


def said(training: Training, text: str) -> bool:
    """Whether ranks have printed this; a training that has ended is none to be stopped."""
    assert training.process.poll() is None, training.log()[-2000:]
    return text in training.log()


def ended(training: Training, since: float) -> int:
    code = training.wait()
    assert time.monotonic() - since < LIMIT_S
    return code


@pytest.mark.parametrize("number", ALL, ids=lambda number: number.name)
def test_each_signal_to_the_whole_group_saves_and_stops(work, number):
    """As a terminal sends it, and twice: a wrapper may pass on what `pldr` has got already."""
    with Training(work, *LONG, group=True) as training:
        training.wait_for(lambda: "step 10/" in training.output)
        since = time.monotonic()
        for _ in range(2):
            os.killpg(training.process.pid, number)
            time.sleep(0.1)
        assert ended(training, since) == 0, training.log()[-2000:]
        (last,) = steps_saved(work)
        assert training.result["stopped"] == f"{number.name} at step {last} of 100000: saved"
        assert f"training was stopped by {number.name} at step {last}" in training.output
        assert "Traceback" not in training.output + (work / "err").read_text()
    run = mlflow_run(work)[1]
    assert run.info.status == "KILLED" and run.data.tags["pldr.stopped"] == training.result["stopped"]


@pytest.mark.parametrize("number", ALL, ids=lambda number: number.name)
def test_each_signal_ends_ranks_that_have_not_met(work, number):
    """Rank 1 never comes: it is suspended as soon as it is there."""
    with Training(work, *LONG) as training:
        training.wait_for(lambda: "1" in training.job())
        os.kill(training.job()["1"], signal.SIGSTOP)
        training.wait_for(lambda: said(training, "pldr-listening"))
        since = time.monotonic()
        training.process.send_signal(number)
        assert ended(training, since) == 0, training.log()[-2000:]
        assert training.result["stopped"] == f"{number.name} before a step was done"
    assert mlflow_run(work)[1].info.status == "KILLED" and not steps_saved(work)


def test_a_rank_that_hangs_does_not_keep_the_others_from_stopping(work):
    with Training(work, *LONG, "train.timeout_s=600") as training:
        training.wait_for(lambda: "step 10/" in training.output)
        os.kill(training.job()["1"], signal.SIGSTOP)
        since = time.monotonic()
        training.process.send_signal(signal.SIGINT)
        assert ended(training, since) == 0, training.log()[-2000:]
        assert "SIGINT, but the ranks did not save and stop within" in training.result["stopped"]


def test_ctrl_c_with_tee_saves_and_stops(work):
    command = shlex.join([*PLDR, "train", "tiny.yaml", f"run_dir={work / 'run'}", *LONG])
    line = f"trap : INT; {command} 2>err | tee out > /dev/null; echo ${{PIPESTATUS[0]}} > code"
    shell = subprocess.Popen(["bash", "-c", line], cwd=work, start_new_session=True)
    try:
        end = time.monotonic() + 400
        while "step 10/" not in ((work / "out").read_text() if (work / "out").exists() else ""):
            assert time.monotonic() < end and shell.poll() is None
            time.sleep(0.1)
        os.killpg(shell.pid, signal.SIGINT)
        shell.wait(LIMIT_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
    assert (work / "code").read_text() == "0\n" and len(steps_saved(work)) == 1


def test_a_reader_that_stands_still_stops_neither_training_nor_its_stop(work):
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    often = ("train.log_every=1", "train.checkpoint_every=400", "train.ranks=1", "model.g_source=identity")
    with Training(work, *LONG, *often, stdout=write) as training:
        os.close(write)
        saved = work / "run" / "checkpoints"
        training.wait_for(lambda: any(one.name >= "step-001600" for one in committed(saved)))  # more lines than fit
        since = time.monotonic()
        training.process.send_signal(signal.SIGHUP)
        assert ended(training, since) == 0, training.log()[-2000:]
    assert steps_saved(work)[-1] > 1600
    os.close(read)


def test_a_stop_ends_a_long_validation_and_the_next_start_does_it_first(work):
    often = ("train.steps=30", "train.warmup_steps=2", "train.validate_every=10", "train.checkpoint_every=1000",
             "train.val_sequences=400", "train.micro_batch=1")  # fmt: skip
    beat = work / "run" / "logs" / "ranks" / "rank-0.json"
    with Training(work, *often) as training:
        training.wait_for(lambda: beat.exists() and '"validate"' in beat.read_text())
        training.process.send_signal(signal.SIGTERM)
        assert training.wait() == 0, training.log()[-2000:]
        assert training.result["stopped"] == "SIGTERM at step 10 of 30: saved"
    (checkpoint,) = committed(work / "run" / "checkpoints")
    assert verify(checkpoint)["val_step"] is None
    with Training(work, *often) as training:
        assert training.wait() == 0, training.log()[-2000:]
    client, run = mlflow_run(work)
    assert {p.step for p in client.get_metric_history(run.info.run_id, "val/loss_block")} == {10, 20, 30}


@pytest.mark.parametrize("number", ALL, ids=lambda number: number.name)
def test_a_data_stage_ends_with_one_line_and_goes_on_next_time(work, number):
    command = [*PLDR, "tokenize", "tiny.yaml", f"run_dir={work / 'run'}", "--force"]
    process = subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("tokenize")
    process.send_signal(number)
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1 and errors == f"pldr: error: stopped by {number.name}; start again to continue\n"
    assert subprocess.run(command, cwd=work, capture_output=True).returncode == 0


def test_a_signal_in_the_first_moments_is_no_traceback(work):
    """Also before Python has read the command line, as far as a program can help it."""
    told = 0
    for after_s in (0.2, 0.5, 1.0, 2.0):
        process = subprocess.Popen(
            [sys.executable, "-c", "import sys; from launch.entry import main; sys.exit(main())", "train", "tiny.yaml"],
            cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        time.sleep(after_s)
        process.send_signal(signal.SIGUSR1)
        _, errors = process.communicate(timeout=LIMIT_S)
        if process.returncode != -signal.SIGUSR1:  # Python itself had not started yet
            assert process.returncode == 1 and errors == "pldr: error: stopped by SIGUSR1; start again to continue\n"
            told += 1
    assert told  # after 2 s Python has started
