"""How a job's ranks are listened to and ended (launch/backends/job.py), with processes that stand in for ranks: what counts
here is what they print, how they end and which signals reach them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = """
import json, os, signal, sys, threading
from pathlib import Path
from launch.backends import deepspeed
from pipeline.config.load import load_config
from pipeline.errors import UserError

config = load_config(sys.argv[1])
(Path(config.run_dir) / "logs").mkdir(parents=True)
deepspeed.command = lambda job, ranks: [sys.executable, "-c", sys.argv[2]]
shown = []
def show(text):
    shown.append(text)
    if text == "go":
        threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
try:
    deepspeed.launch(config, Path("job.json"), 2, show=show)
    told = ["done", "", True]
except UserError as error:
    told = [type(error).__name__, str(error), error.again]
print(json.dumps(told))
"""
RANKS = """
import subprocess, sys
rank = r'''
import os, signal, sys, time
def on(number, frame):
    os.write(1, {answer!r})
    os._exit({code})
signal.signal(signal.SIGTERM, on)
open(sys.argv[3], "w").close()
time.sleep(30)
'''
import os, time
ready = ["{folder}/ready" + str(n) for n in (0, 1)]
ranks = [subprocess.Popen([sys.executable, "-c", rank, "-m", "pipeline.worker", ready[n]]) for n in (0, 1)]
while not all(os.path.exists(name) for name in ready):
    time.sleep(0.02)
os.write(1, b"{listening}")
os.write(1, b"pldr-status| go\\n")
sys.exit(max(rank.wait() for rank in ranks))
"""
TWO_LINES = "pldr-listening| \\npldr-listening| \\n"
MERGED = "pldr-listening| pldr-listening| \\n\\n"


@pytest.mark.parametrize(
    ("listening", "answer", "code", "told"),
    [
        pytest.param(
            TWO_LINES, b"pldr-stopped| SIGTERM at step 7 of 9: saved\n", 0, ["Stopped", "step 7", False], id="saved"
        ),
        pytest.param(
            MERGED, b"pldr-stopped| SIGTERM at step 7 of 9: saved\n", 0, ["Stopped", "step 7", False], id="merged"
        ),
        pytest.param(
            TWO_LINES, b"pldr-failure| 1 no space left\n", 1, ["UserError", "no space left", False], id="failed"
        ),
    ],
)
def test_a_signal_reaches_ranks_that_listen_and_nothing_is_started_again(
    make_run, tmp_path, listening, answer, code, told
):
    config = make_run(tmp_path)
    ranks = RANKS.replace("{folder}", str(tmp_path)).replace("{listening}", listening)
    ranks = ranks.replace("{answer!r}", repr(answer)).replace("{code}", str(code))
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, str(config), ranks],
        capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    kind, message, again = json.loads(done.stdout.strip().splitlines()[-1])
    assert (kind, again) == (told[0], told[2]) and told[1] in message, done.stderr
    assert Path(tmp_path / "run" / "logs" / "train.log").exists()
