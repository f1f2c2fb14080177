"""Two ranks on separate machines, as far as one machine can stand in for two: mount and network namespaces. Needs root."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.cli import main
from pipeline.checkpoint.format import committed
from pipeline.network import free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="namespaces need root and unshare"),
]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, make_run):
    """A run directory with everything that training needs, and its YAML beside it."""
    folder = tmp_path_factory.mktemp("apart")
    config = make_run(folder, steps=400, checkpoint_every=10, validate_every=400, timeout_s=20)
    with contextlib.chdir(folder):
        for stage in ("shard", "tokenizer", "tokenize"):
            assert main([stage, str(config)]) == 0
    return folder


def prepared(tokens: Path, folder: Path) -> Path:
    """A copy of it, with a job file for two ranks."""
    shutil.copytree(tokens, folder)
    with contextlib.chdir(folder):
        assert main(["train", "tiny.yaml", f"run_dir={folder / 'run'}", "--prepare", "2"]) == 0
    return folder


def start(folder: Path, prefixes: list[list[str]], address: str = "127.0.0.1", interface: str = "lo"):
    """Both ranks, each inside its prefix command, with its log beside the run directory."""
    base = {**os.environ, "MASTER_ADDR": address, "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2",
            "GLOO_SOCKET_IFNAME": interface, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}  # fmt: skip
    ranks = []
    for rank, prefix in enumerate(prefixes):
        command = [*prefix, sys.executable, "-m", "pipeline.worker", str(folder / "run" / "logs" / "job.json")]
        with open(folder / f"rank{rank}.log", "wb") as log:
            environment = {**base, "RANK": str(rank), "LOCAL_RANK": "0"}
            ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=folder))
    return ranks


def failures(folder: Path) -> list[str]:
    """The line that each rank failed with."""
    logs = [(folder / f"rank{rank}.log").read_text(errors="replace") for rank in (0, 1)]
    return [
        "".join(line for line in log.splitlines() if line.startswith("pldr-failure| ")) or log[-2000:] for log in logs
    ]


@pytest.mark.parametrize(
    ("lacks", "mount", "message"),
    [
        ("data", "mount -t tmpfs -o size=64k tmpfs run/tokens", "no finished tokens"),
        ("disk", "mount -t tmpfs -o size=64k tmpfs run/checkpoints", "are needed for this rank's part of a checkpoint"),
    ],
)
def test_a_rank_without_data_or_disk_fails_before_training(tokens, tmp_path, lacks, mount, message):
    folder = prepared(tokens, tmp_path / "work")
    (folder / "run" / "checkpoints").mkdir(exist_ok=True)
    ranks = start(folder, [[], ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh"]])
    try:
        assert [rank.wait(300) for rank in ranks] == [1, 1], failures(folder)
    finally:
        for rank in ranks:
            rank.kill()
    for line in failures(folder):  # both name the same rank
        assert "rank 1 on" in line and message in line and "rank 0 on" not in line
    assert "pldr-status" not in (folder / "rank0.log").read_text()


@pytest.fixture
def two_networks(tmp_path, make_hosts):
    """Two hosts with a cable between them, without ssh."""
    with make_hosts(tmp_path, ssh=False) as network:
        yield network


@pytest.mark.multinode
def test_a_cut_cable_ends_both_ranks_within_the_timeout(tokens, tmp_path, two_networks):
    """No packet shows that the other end is gone: without timeouts in ZeRO's own groups this hangs for half an hour."""
    folder = prepared(tokens, tmp_path / "work")
    prefixes = [two_networks.enter(host) for host in (0, 1)]
    ranks = start(folder, prefixes, address=two_networks.addresses[0], interface="cable")
    try:
        end = time.monotonic() + 300
        while not committed(folder / "run" / "checkpoints"):
            assert time.monotonic() < end and all(rank.poll() is None for rank in ranks), failures(folder)
            time.sleep(0.1)
        two_networks.cable("down")
        cut = time.monotonic()
        assert [rank.wait(120) for rank in ranks] == [1, 1], failures(folder)
        assert time.monotonic() - cut < 20 + 25  # train.timeout_s, and rank 0 closes its MLflow run
    finally:
        for rank in ranks:
            rank.kill()
    named = failures(folder)
    assert any("the network between rank 0 on" in line and "is cut" in line for line in named), named
