"""Start a training job's ranks on this node with the `deepspeed` launcher, and wait for them.

Oddities explained once (measured): the launcher that gets SIGTERM can leave its workers behind, and can return 0 when a
worker died; so the job has its own process group, which goes as a whole, and whether it succeeded is judged by the
committed checkpoint (pipeline.pretrain), not by the exit code alone. The workers' stdin is a pipe that this process holds:
when it closes, because this process was killed, they end themselves.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from pipeline.config import RunConfig, RunPaths
from pipeline.device import has_gpu
from pipeline.errors import UserError
from pipeline.train.progress import FAILURE, STATUS
from pipeline.worker import PARENT_PIPE

GRACE_S = 20.0  # between asking a job to end and killing it


def command(job_file: Path, ranks: int) -> list[str]:
    """The launcher's command line for one node, run with this Python.

    With `--num_gpus` DeepSpeed forgets CUDA_VISIBLE_DEVICES and takes the first GPUs, so a choice of GPUs is handed over.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if has_gpu() and chosen.replace(",", "").isdigit():
        where = ["--include", f"localhost:{','.join(chosen.split(',')[:ranks])}"]
    else:
        where = ["--num_gpus", str(ranks)]
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        *where,
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        str(_free_port()),
        "--module",
        "pipeline.worker",
        str(job_file),
    ]


def launch(config: RunConfig, job_file: Path, ranks: int, *, show: Callable[[str], None]) -> None:
    """Run the job to its end. `show` gets each status line. All output is kept in `logs/train.log`.

    Raises UserError with the first failure that a rank named, and the log's name.
    """
    log_file = RunPaths(config.run_dir).logs / "train.log"
    environment = {**os.environ, PARENT_PIPE: "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not has_gpu():
        environment.setdefault("DS_ACCELERATOR", "cpu")
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    failures: list[str] = []
    with open(log_file, "ab") as log:
        job = subprocess.Popen(
            command(job_file, ranks),
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            assert job.stdout is not None
            for raw in job.stdout:
                line = raw.decode("utf-8", "replace").rstrip("\n")
                log.write(raw)
                log.flush()
                if STATUS in line:
                    show(line.partition(STATUS)[2])
                elif FAILURE in line:
                    failures.append(line.partition(FAILURE)[2])
            code = job.wait()
        finally:
            _end_group(job)
    if failures or code:
        reason = failures[0] if failures else f"the launcher ended with code {code}"
        raise UserError(f"training failed: {reason} (log: {log_file})")


def _end_group(job: subprocess.Popen[bytes]) -> None:
    """Nothing of the job's process group stays."""
    try:
        os.killpg(job.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(GRACE_S)
        os.killpg(job.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    job.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
