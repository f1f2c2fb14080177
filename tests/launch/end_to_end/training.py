"""`pldr train` in a process of its own, and what it has made."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil

from pipeline.checkpoint.format import committed, verify
from pipeline.tracking.client import client

PLDR = [sys.executable, "-m", "launch.cli"]


class Training:
    """`pldr train` in a process of its own, with its output in a file or, say, a pipe; `group`: and a group of its own."""

    def __init__(self, folder: Path, *overrides: str, stdout: int | None = None, group: bool = False) -> None:
        self.folder = folder
        with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
            command = [*PLDR, "train", "tiny.yaml", "--json", f"run_dir={folder / 'run'}", *overrides]
            to = out if stdout is None else stdout
            self.process = subprocess.Popen(command, cwd=folder, stdout=to, stderr=err, start_new_session=group)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.wait_for(lambda: not self.job())

    def job(self) -> dict[str, int]:
        """The processes of the job by role: runner, launch, 0, 1."""
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
            assert time.monotonic() < end, "timeout: " + self.log()[-2000:]
            time.sleep(0.02)

    def wait_for_checkpoint(self, count=1):
        folder = self.folder / "run" / "checkpoints"
        self.wait_for(lambda: len(committed(folder)) >= count or self.process.poll() is not None)
        assert self.process.poll() is None, self.log()[-2000:]

    def wait(self, seconds=400) -> int:
        code = self.process.wait(seconds)
        self.wait_for(lambda: not self.job(), seconds=60)  # no orphans; a busy machine takes a while
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


def mlflow_run(folder: Path):
    """MLflow's client and its only run."""
    server = client(f"sqlite:///{folder / 'mlflow.db'}")
    [run] = server.search_runs([server.get_experiment_by_name("pldr").experiment_id])
    return server, run
