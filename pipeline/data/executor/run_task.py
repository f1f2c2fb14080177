"""Run one task in this process, for an engine that can only start programs:
`python -m pipeline.data.executor.run_task EXECUTOR.pik RANK`.

When standard input closes, the process that started this one is gone, and this one exits. The pickle it reads may run
anything: it is in the run directory, where only the owner may write (see jobs.py).
"""

from __future__ import annotations

import os
import sys
import threading

import dill


def main() -> None:
    """Run the task. On failure the executor writes down the error; the process ends with a traceback and exit code 1."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(sys.argv[1], "rb") as stream:
        executor = dill.load(stream)
    executor.run_rank(int(sys.argv[2]))


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    main()
