"""Stands in for a launcher and its two ranks. Usage: rank_worker.py FOLDER TEXT ANSWER CODE; see launch_worker.py.

The ranks are this module too, started with `-m pipeline.worker FILE` among their arguments, by which a job finds its ranks.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

RANK = "import sys; from tests.launch.backends.rank_worker import rank; rank(*sys.argv[3:])"


def launcher(folder: str, text: str, answer: str, code: str) -> int:
    ready = [Path(folder) / f"ready{number}" for number in (0, 1)]
    words = ["-m", "pipeline.worker"]
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, *words, str(file), answer, code]) for file in ready]
    while not all(file.exists() for file in ready):
        time.sleep(0.02)
    os.write(1, text.encode() + b"pldr-status| go\n")
    return max(rank.wait() for rank in ranks)


def rank(ready: str, answer: str, code: str) -> None:
    def on_signal(number: int, frame: object) -> None:
        os.write(1, answer.encode())
        os._exit(int(code))

    signal.signal(signal.SIGTERM, on_signal)
    Path(ready).touch()
    time.sleep(30)


if __name__ == "__main__":
    sys.exit(launcher(*sys.argv[1:]))
