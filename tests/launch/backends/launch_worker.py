"""Launches stand-ins for ranks through launch/backends/deepspeed.py. Usage: launch_worker.py CONFIG FOLDER TEXT ANSWER CODE.

The stand-ins print TEXT when both are ready. On SIGTERM, which this process gets then, each prints ANSWER and exits with CODE.
The last line of stdout is JSON: how the launch ended, its message, and whether the job may be started again.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path
from unittest import mock

from launch.backends import deepspeed
from pipeline.config.load import load_config
from pipeline.errors import UserError

LAUNCHER = "tests.launch.backends.rank_worker"


def main(config_file: str, *words: str) -> None:
    config = load_config(config_file)
    (Path(config.run_dir) / "logs").mkdir(parents=True)

    def report(text: str) -> None:
        if text == "go":
            threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()

    command = [sys.executable, "-m", LAUNCHER, *words]
    with mock.patch.object(deepspeed, "command", return_value=command):
        try:
            deepspeed.launch(config, Path("job.json"), 2, report=report)
            ended = ["done", "", True]
        except UserError as error:
            ended = [type(error).__name__, str(error), error.again]
    print(json.dumps(ended))


if __name__ == "__main__":
    main(*sys.argv[1:])
