"""`pldr launch …` on the hosts of tests/helpers/hosts.py, and what can be seen of it."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil

from pipeline.checkpoint.format import committed, verify

PLDR = [sys.executable, "-m", "launch.cli"]


class Launch:
    """`pldr launch …` on a host, ended with its context."""

    def __init__(self, network, host: int, folder: Path, *words: str) -> None:
        self.folder, self.out = folder, folder / f"out{host}"
        command = [*network.enter(host), *PLDR, *words, "--json", f"run_dir={folder / 'run'}"]
        environment = {**os.environ, **network.environment, "OMP_NUM_THREADS": "1"}
        with open(self.out, "wb") as out:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        wait_for(lambda: not ranks(self.folder), 60)

    def wait(self, seconds=400) -> int:
        return self.process.wait(seconds)

    @property
    def output(self) -> str:
        log = self.folder / "run" / "logs" / "train.log"
        return self.out.read_text() + (log.read_text(errors="replace")[-3000:] if log.exists() else "")

    @property
    def result(self) -> dict:
        lines = [line for line in self.out.read_text().splitlines() if line.startswith("{")]
        return json.loads(lines[-1])


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timeout"
        time.sleep(0.05)


def wait_for_commit(launch: Launch, count: int = 1) -> None:
    folder = launch.folder / "run" / "checkpoints"
    wait_for(lambda: len(committed(folder)) >= count or launch.process.poll() is not None)
    assert launch.process.poll() is None, launch.output


def ranks(folder: Path) -> dict[int, int]:
    """rank -> process id, of the ranks of the run in this folder that live (on either host)."""
    found = {}
    for process in psutil.process_iter(["cmdline", "pid"]):
        words = process.info["cmdline"] or []
        if str(folder / "run" / "logs" / "job.json") in words and words[1:4] == ["-u", "-m", "pipeline.worker"]:
            with contextlib.suppress(psutil.Error):
                found[int(process.environ()["RANK"])] = process.pid
    return found


def rank_hosts(folder: Path) -> list[str]:
    """Which host each rank was on."""
    records = sorted((folder / "run" / "logs" / "ranks").glob("rank-*.json"))
    return [json.loads(record.read_text())["host"] for record in records]


def last_step(folder: Path) -> int:
    return int(verify(committed(folder / "run" / "checkpoints")[-1])["step"])


def losses(folder: Path) -> list[float]:
    """The training losses in the output."""
    text = (folder / "run" / "logs" / "train.log").read_text()
    return [float(value) for value in re.findall(r"pldr-status\| step .* loss ([\d.]+)", text)]
