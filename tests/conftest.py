"""Shared by all tests: no telemetry, quiet MLflow, a server of its that can be killed, the shared material when it is there."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.pop("MLFLOW_TRACKING_URI", None)  # the store of tests is beside their run directories
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # there are as many workers as cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # these tests are for a CPU, also on a machine with GPUs
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
ROOT = Path(__file__).resolve().parents[1]
# Workers are modules of `tests`, and children do not look for modules in the working directory (pipeline/environment.py).
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

# Fixtures that several folders share.
pytest_plugins = [
    "tests.helpers.at_once",
    "tests.helpers.bundles",
    "tests.helpers.corpus",
    "tests.helpers.faulty_s3",
    "tests.helpers.gpu",
    "tests.helpers.hosts",
    "tests.helpers.models",
    "tests.helpers.ranks",
    "tests.helpers.recipe_runs",
    "tests.helpers.runs",
    "tests.helpers.slurm_cluster",
]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout."""
    return ROOT


class Server:
    """`mlflow server` on a port of its own; `kill` and `start` as often as wanted."""

    def __init__(self, folder):
        self.folder, self.process = folder, None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self):
        log = open(self.folder / "server.log", "ab")  # noqa: SIM115
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--workers",
            "1",
        ]
        stores = ["--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}", "--artifacts-destination",
                  str(self.folder / "artifacts")]  # fmt: skip
        self.process = subprocess.Popen(
            [*command, *stores], stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )  # fmt: skip
        for _ in range(900):
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1)
                return
            except OSError:
                assert self.process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
                time.sleep(0.1)
        raise AssertionError("the server did not start")

    def kill(self):
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path):
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server")
    yield server
    server.kill()
