"""Real ranks for the tests of pipeline/train and pipeline/checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.network import free_port

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(worker: str, folder: Path, stages: str, precision: str, world: int = 2) -> dict:
    """Start a worker module on real ranks (gloo); what rank 0 wrote to FOLDER/result.json."""
    port = str(free_port())
    base = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world), "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    logs = [open(folder / f"rank{rank}.log", "wb") for rank in range(world)]  # noqa: SIM115
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", worker, str(folder), stages, precision],
            env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=logs[rank],
            stderr=subprocess.STDOUT,
        )
        for rank in range(world)
    ]
    codes = [rank.wait(timeout=280) for rank in ranks]
    for stream in logs:
        stream.close()
    assert codes == [0] * world, (folder / "rank0.log").read_text()[-3000:]
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="session")
def start_ranks():
    """`start_ranks(worker, folder, stages, precision)`: see run_ranks."""
    return run_ranks
