"""launch/backends/job.py: how a job's ranks are read, signaled and ended, with processes that stand in for ranks: what
counts here is what they print, how they end and which signals reach them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.backends.job import is_rank, run_job
from pipeline.errors import UserError
from pipeline.stages import still

LAUNCH = "tests.launch.backends.launch_worker"
ROOT = Path(__file__).resolve().parents[3]
TWO_LINES = "pldr-listening| \npldr-listening| \n"
MERGED = "pldr-listening| pldr-listening| \n\n"


@pytest.mark.parametrize(
    ("listening", "answer", "code", "ended"),
    [
        pytest.param(
            TWO_LINES, "pldr-stopped| SIGTERM at step 7 of 9: saved\n", 0, ["Stopped", "step 7", False], id="saved"
        ),
        pytest.param(
            MERGED, "pldr-stopped| SIGTERM at step 7 of 9: saved\n", 0, ["Stopped", "step 7", False], id="merged"
        ),
        pytest.param(
            TWO_LINES, "pldr-failure| 1 no space left\n", 1, ["UserError", "no space left", False], id="failed"
        ),
    ],
)
def test_a_signal_reaches_ranks_that_listen_and_the_job_is_not_restarted(
    make_run, tmp_path, listening, answer, code, ended
):
    config = make_run(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", LAUNCH, str(config), str(tmp_path), listening, answer, str(code)],
        capture_output=True, text=True, timeout=60, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kind, message, again = json.loads(done.stdout.strip().splitlines()[-1])
    assert (kind, again) == (ended[0], ended[2]) and ended[1] in message, done.stderr
    assert Path(tmp_path / "run" / "logs" / "train.log").exists()


def test_a_launcher_is_not_taken_for_a_rank():
    assert is_rank(["python", "-u", "-m", "pipeline.worker", "--local_rank=0", "job.json"])
    assert not is_rank(["python", "-u", "-m", "deepspeed.launcher.launch", "--module", "pipeline.worker", "job.json"])
    assert not is_rank(["python", "-m", "torch.distributed.run", "-m", "pipeline.worker", "job.json"])
    assert not is_rank(["python", "-m"]) and not is_rank([])


@pytest.mark.parametrize(
    ("output", "code", "reason"),
    [
        ("Traceback (most recent call last):\n  x\nModuleNotFoundError: No module named 'deepspeed'\n[INFO] bye\n", 1,
         "code 1, ModuleNotFoundError: No module named 'deepspeed'"),
        ("[rank0]: torch.distributed.DistNetworkError: port: 29500, name: EADDRINUSE\n"
         "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n=====\n", 1, "name: EADDRINUSE"),
        ("host-1: RuntimeError: Unable to proceed, no GPU resources available\n", 1, "no GPU resources available"),
        ("runner.py: error: argument --num_gpus: invalid int value: 'x'\n", 2, "argument --num_gpus"),
        ("/venv/bin/python: No module named deepspeed\n", 1, "No module named deepspeed"),
        ("E1128 x failed (exitcode: -9) local_rank: 1 (pid: 7)\n", 1, "SIGKILL (out of memory?)"),
        ("", 245, "a rank was killed with SIGSEGV"),
        ("", 255, "the launcher ended with code 255"),
        ("nothing that names it\n", 1, "the launcher ended with code 1 (log"),
    ],
)  # fmt: skip
def test_the_reason_of_a_launchers_own_failure_is_shown(tmp_path, output, code, reason):
    command = [sys.executable, "-c", f"import os; os.write(1, {output.encode()!r}); os._exit({code})"]
    with pytest.raises(UserError) as caught:
        run_job(command, environment=dict(os.environ), ranks=1, log_file=tmp_path / "train.log", report=print)
    assert reason in str(caught.value) and "train.log" in str(caught.value)


def test_a_launcher_is_started_without_a_path(tmp_path):
    command = [sys.executable, "-c", "import sys; print('pldr-failure| 1 it ran')"]
    with pytest.raises(UserError, match="it ran"):
        run_job(command, environment={"PATH": ""}, ranks=1, log_file=tmp_path / "train.log", report=print)


def test_a_reader_that_stands_still_does_not_hold_up_the_ranks(tmp_path):
    """What they print is read and logged, whether or not anybody reads what `pldr` prints."""
    read, write = os.pipe()
    ranks = "for n in range(5000): print(f'pldr-status| step {n:060d}', flush=True)"
    code = (
        "import os, sys; from pathlib import Path; from launch.backends.job import run_job\n"
        "from launch.commands import terminal\n"
        "terminal.PATIENCE_S = 0.3\n"
        "with terminal.Display(lambda: False):\n"
        "    run_job([sys.executable, '-c', sys.argv[1]], environment=dict(os.environ), ranks=1,\n"
        "            log_file=Path(sys.argv[2]), report=terminal.status_lines(json=False))\n"
    )
    command = [sys.executable, "-c", code, ranks, str(tmp_path / "train.log")]
    done = subprocess.run(command, stdout=write, timeout=100, env={**os.environ, "PYTHONPATH": str(ROOT)})
    os.close(write)
    assert done.returncode == 0 and len((tmp_path / "train.log").read_text().splitlines()) == 5000
    os.close(read)


def test_until_the_first_step_it_is_told_what_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(still, "TELL_S", 0.1)
    ranks = (
        "import time; time.sleep(0.5); print('pldr-phase| opening the data', flush=True); time.sleep(0.5)\n"
        "print('pldr-status| resumed at step 3 of 9', flush=True); time.sleep(0.5)\n"
        "print('pldr-status| step 4/9', flush=True); time.sleep(0.5)"
    )
    said = []
    run_job(
        [sys.executable, "-c", ranks],
        environment=dict(os.environ),
        ranks=2,
        log_file=tmp_path / "train.log",
        report=said.append,
    )
    assert said[0] == "starting 2 ranks" and said[1].startswith("starting 2 ranks: ") and said[-1] == "step 4/9"
    told = said[next(i for i, line in enumerate(said) if line.startswith("opening the data: ")) :]
    assert told.index("resumed at step 3 of 9") < len(told) - 2  # and it went on behind that
