"""One task in this process, for an engine that only starts programs: `python -m pipeline.data.executor.run_task
EXECUTOR.pik RANK`.

Standard input is a lifeline: when it closes, whoever started this is gone, and this process ends too. Reads a pickle, which
may run anything: it lies in the run directory, where only its owner may write (engines.py).
"""

from __future__ import annotations

import os
import sys
import threading

import dill


def main() -> None:
    """Run the task; a failure is written down by the executor and leaves a traceback and exit code 1."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(sys.argv[1], "rb") as stream:
        executor = dill.load(stream)
    executor.run_rank(int(sys.argv[2]))


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    main()
