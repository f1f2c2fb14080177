"""The rank at fault, from the files that real processes write."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from pipeline.train.heartbeat import Heartbeat, blame

CHILD = """
import sys, time
from pathlib import Path
from pipeline.train.heartbeat import Heartbeat
heart = Heartbeat()
heart.at(int(sys.argv[3]), sys.argv[4])
heart.start(Path(sys.argv[1]), "job", int(sys.argv[2]), timeout_s=600, fail=print)
time.sleep(600)
"""


@pytest.fixture
def rank(tmp_path):
    """`rank(number, step, phase)`: a process with a heartbeat."""
    children = []

    def start(number, step, phase):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path), str(number), str(step), phase])
        children.append(child)
        end = time.monotonic() + 60
        while not (tmp_path / f"rank-{number}.json").exists():
            assert time.monotonic() < end and child.poll() is None
            time.sleep(0.02)
        return child

    yield start
    for child in children:
        child.kill()
        child.wait()


def test_gone_stopped_behind_or_nobody(tmp_path, rank):
    mine, other = rank(0, 7, "compute"), rank(1, 7, "data")
    assert blame(tmp_path, "job", me=0, world=2) == "rank 1 hangs at step 7 (data)"
    assert blame(tmp_path, "job", me=1, world=2) == "rank 1 hangs at step 7 (data)"
    assert blame(tmp_path, "job", me=0, world=2, closed=True) == "rank 1 ended at step 7 (data)"
    assert blame(tmp_path, "job", me=0, world=3) == "rank 2 has not started"
    assert blame(tmp_path, "an earlier job", me=0, world=2) == "rank 1 has not started"
    os.kill(other.pid, signal.SIGSTOP)
    time.sleep(0.2)
    assert blame(tmp_path, "job", me=0, world=2) == f"rank 1 (process {other.pid}) is stopped"
    other.kill()
    other.wait()
    assert blame(tmp_path, "job", me=0, world=2) == f"rank 1 (process {other.pid}) is gone"
    assert mine.poll() is None


def test_equal_progress_is_a_cut_network_and_old_files_of_another_host_are_silence(tmp_path, rank):
    rank(0, 3, "compute"), rank(1, 3, "compute")
    line = blame(tmp_path, "job", me=0, world=2)
    assert "every rank is alive and at step 3" in line and "between rank 0 on" in line and line.endswith("is cut")
    far = {"job": "job", "rank": 2, "host": "elsewhere", "pid": 1, "step": 2, "phase": "data"}
    (tmp_path / "rank-2.json").write_text(json.dumps(far))
    assert "rank 2 on elsewhere" not in blame(tmp_path, "job", me=0, world=3)
    then = (tmp_path / "rank-0.json").stat().st_mtime - 400
    os.utime(tmp_path / "rank-2.json", (then, then))
    assert "rank 2 on elsewhere has given no sign of life for 40" in blame(tmp_path, "job", me=0, world=3)
    (tmp_path / "rank-2.json").write_text("{")
    assert "rank 2 has not started" in blame(tmp_path, "job", me=0, world=3)


def test_data_that_do_not_arrive_are_reported_by_the_rank_itself(tmp_path):
    failed, heart = threading.Event(), Heartbeat()
    messages = []

    def fail(message):
        messages.append(message)
        failed.set()

    heart.at(5, "compute")
    heart.start(tmp_path, "job", 0, timeout_s=0.5, fail=fail)
    assert not failed.wait(2.5)  # computing may take long
    heart.at(6, "data")
    assert failed.wait(10)
    heart.close()
    assert "no batch for step 6 within train.timeout_s=0.5 s" in messages[0]
