"""The process of a single task."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.pipeline.data.executor import engine_steps


def test_a_task_process_ends_with_whoever_started_it(job: Callable[..., Any], tmp_path: Path, repository: Path) -> None:
    """On Ray's nodes too, no writer may outlive a killed run."""
    import dill

    from pipeline.data.executor.local import LocalExecutor

    work = tmp_path / "work"
    steps = [engine_steps.Read(tmp_path / "none", seconds=60), engine_steps.Publish(tmp_path / "out", work)]
    with open(tmp_path / "executor.pik", "wb") as stream:
        dill.dump(LocalExecutor(steps, tasks=1, workers=1, logging_dir=str(work)), stream)
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.data.executor.run_task", str(tmp_path / "executor.pik"), "0"],
        stdin=subprocess.PIPE,
        cwd=repository,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 30
        while not (work / "progress" / "00000.json").is_file():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(10) == 1
    finally:
        process.send_signal(signal.SIGKILL)
