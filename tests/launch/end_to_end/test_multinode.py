"""Training on two hosts: over ssh through DeepSpeed's launcher, and with one process on each. Two namespaces play the hosts.

Needs root, iproute2, and for ssh openssh-server and pdsh: `apt install openssh-server pdsh iproute2`. Skips where it may not.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.cli import main
from pipeline.checkpoint.format import committed
from tests.launch.end_to_end.launches import (
    Launch,
    last_step,
    losses,
    rank_hosts,
    ranks,
    wait_for,
    wait_for_commit,
)

pytestmark = [
    pytest.mark.multinode,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]
TIMEOUT_S = 15


@pytest.fixture(scope="module")
def hosts(tmp_path_factory, make_hosts):
    with make_hosts(tmp_path_factory.mktemp("hosts"), ssh=True) as network:
        yield network


@pytest.fixture(scope="module")
def tokens(hosts, tmp_path_factory, make_run):
    """A run directory with everything that training needs, and its YAML beside it."""
    folder = tmp_path_factory.mktemp("multinode")
    config = make_run(folder, steps=60, checkpoint_every=10, validate_every=60, log_every=5, timeout_s=TIMEOUT_S)
    with contextlib.chdir(folder):
        for stage in ("shard", "tokenizer", "tokenize"):
            assert main([stage, str(config)]) == 0
    return folder


@pytest.fixture
def work(tokens, tmp_path):
    """A copy of it to train in."""
    shutil.copytree(tokens, tmp_path / "work")
    return tmp_path / "work"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_trains_through_the_hostfile(hosts, work, stage):
    words = ("launch", "deepspeed", "tiny.yaml", "--hostfile", hosts.hostfile(0, 1), f"train.zero_stage={stage}")
    with Launch(hosts, 0, work, *words) as launch:
        assert launch.wait() == 0, launch.output
    assert last_step(work) == 60 and rank_hosts(work) == hosts.names
    assert losses(work)[-1] < 5.5 < losses(work)[0]


def test_a_cut_cable_ends_both_hosts_and_one_goes_on_alone(hosts, work):
    try:
        words = ("launch", "deepspeed", "tiny.yaml", "--hostfile", hosts.hostfile(0, 1), "train.steps=400")
        with Launch(hosts, 0, work, *words) as launch:
            wait_for_commit(launch)
            assert len(ranks(work)) == 2
            hosts.cable("down")
            cut = time.monotonic()
            wait_for(lambda: not ranks(work), TIMEOUT_S + 15)  # on both sides of the cut
            assert launch.wait(60) == 1
            assert time.monotonic() - cut < TIMEOUT_S + 45  # sshd of the unreachable host is tried once more
            assert "is cut" in launch.result["error"] or "no sign of life" in launch.result["error"]
        at = last_step(work)
        assert at < 400
        alone = ("launch", "deepspeed", "tiny.yaml", "--hostfile", hosts.hostfile(0), "train.steps=400")
        with Launch(hosts, 0, work, *alone) as launch:
            wait_for(lambda: last_step(work) > at or launch.process.poll() is not None)
            launch.process.send_signal(signal.SIGTERM)
            assert launch.wait() == 0, launch.output
        assert f"resumed at step {at} of 400" in launch.output
        assert last_step(work) > at and rank_hosts(work)[:1] == hosts.names[:1]
    finally:
        hosts.cable("up")


def test_a_signal_to_the_head_reaches_ranks_on_other_hosts(hosts, work):
    words = (
        "launch",
        "deepspeed",
        "tiny.yaml",
        "--hostfile",
        hosts.hostfile(1),
        "train.steps=400",
        "train.micro_batch=8",
    )
    with Launch(hosts, 0, work, *words) as launch:  # all ranks are on the other host
        wait_for_commit(launch)
        launch.process.send_signal(signal.SIGUSR1)
        assert launch.wait(60) == 0, launch.output
        assert "SIGUSR1" in launch.result["stopped"]
        assert launch.result["checkpoint"] == f"step-{last_step(work):06d}"
    assert set(rank_hosts(work)) == {hosts.names[1]}


def test_the_heads_death_leaves_no_ranks(hosts, work):
    words = ("launch", "deepspeed", "tiny.yaml", "--hostfile", hosts.hostfile(0, 1), "train.steps=4000")
    with Launch(hosts, 0, work, *words) as launch:
        wait_for_commit(launch)
        os.kill(launch.process.pid, signal.SIGKILL)
        wait_for(lambda: not ranks(work), 2 * TIMEOUT_S)


def test_a_killed_remote_rank_is_restarted_from_the_last_commit(hosts, work):
    words = ("launch", "deepspeed", "tiny.yaml", "--hostfile", hosts.hostfile(0, 1), "train.max_restarts=1")
    with Launch(hosts, 0, work, *words) as launch:
        wait_for_commit(launch)
        os.kill(ranks(work)[1], signal.SIGKILL)
        assert launch.wait() == 0, launch.output
        assert "restarted from step-0000" in launch.output and "0 of 1 restarts are left" in launch.output
    assert last_step(work) == 60


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_one_process_on_each_node_with_a_restart_and_a_stop(hosts, work, launcher):
    """What Slurm and Kubernetes start. A killed rank restarts the job on both; a signal to only node 1 stops both."""

    def words(node: int) -> list[str]:
        where = ["--node-rank", str(node), "--master-addr", hosts.addresses[0], "--stopped-code", "75"]
        if launcher == "deepspeed":
            where += ["--hostfile", hosts.hostfile(0, 1), "--no-ssh"]
        else:
            where += ["--nodes", "2", "--ranks-per-node", "1"]
        return ["launch", launcher, "tiny.yaml", *where, "train.max_restarts=1", "train.steps=400"]

    with Launch(hosts, 1, work, *words(1)) as other, Launch(hosts, 0, work, *words(0)) as first:
        wait_for_commit(first)
        assert rank_hosts(work) == hosts.names
        before = ranks(work)
        os.kill(before[1], signal.SIGKILL)
        wait_for(lambda: len(after := ranks(work)) == 2 and not set(after.values()) & set(before.values()))
        count = len(committed(work / "run" / "checkpoints"))
        at = last_step(work)
        wait_for(lambda: last_step(work) > at or first.process.poll() is not None)
        assert count and first.process.poll() is None and other.process.poll() is None, first.output + other.output
        os.kill(other.process.pid, signal.SIGUSR1)
        assert [first.wait(120), other.wait(60)] == [75, 75], first.output + other.output
        assert "SIGUSR1" in first.result["stopped"] and "SIGUSR1" in other.result["stopped"]
        assert "restarted from step-0000" in first.output
    assert last_step(work) > at


def test_a_node_that_does_not_come_is_named(hosts, work):
    words = ["--hostfile", hosts.hostfile(0, 1), "--no-ssh", "--node-rank", "0", "--wait", "3"]
    with Launch(hosts, 0, work, "launch", "deepspeed", "tiny.yaml", *words) as launch:
        assert launch.wait() == 1
        assert "node 1 was not there within 3 s" in launch.result["error"]


def test_doctor_passes_two_hosts_and_names_the_one_that_is_cut_off(hosts, work):
    words = ("doctor", "tiny.yaml", "--hostfile", hosts.hostfile(0, 1))
    with Launch(hosts, 0, work, *words) as launch:
        assert launch.wait() == 0, launch.output
        bandwidth = [f for f in launch.result["findings"] if f["check"] == "all-reduce"]
        assert [f["status"] for f in bandwidth] == ["ok"] and "gloo, 2 ranks" in bandwidth[0]["found"]
    hosts.cable("down")
    try:
        with Launch(hosts, 0, work, *words) as launch:
            assert launch.wait() == 1
            failed = [f for f in launch.result["findings"] if f["status"] == "FAIL"]
            assert [(f["check"], f["host"]) for f in failed] == [("ssh", hosts.addresses[1])] and failed[0]["fix"]
    finally:
        hosts.cable("up")


def test_a_run_directory_that_one_host_does_not_see_is_reported(hosts, work):
    """The other host has an empty tmpfs where the run directory is."""
    shutil.rmtree(work / "run" / "logs", ignore_errors=True)
    enter = hosts.enter(1)
    hidden = f'mount -t tmpfs tmpfs {work} && mkdir {work}/run && exec "$@"'
    question = {"run_dir": str(work / "run"), "token": "abc", "urls": [], "mlflow": None, "remote_tokens": False,
                "staging": None}  # fmt: skip
    (work / "run" / ".pldr-doctor-abc").touch()
    command = [
        *enter,
        "unshare",
        "--mount",
        "sh",
        "-c",
        hidden,
        "sh",
        sys.executable,
        "-m",
        "launch.commands.doctor.probe",
    ]
    done = subprocess.run(command, input=json.dumps(question), capture_output=True, text=True, cwd="/", env={
        **os.environ, "PYTHONPATH": str(Path(__file__).parents[3])})  # fmt: skip
    facts = json.loads(done.stdout.strip().splitlines()[-1])
    assert "is another directory here" in facts["run_dir"]
