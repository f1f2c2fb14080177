"""Training on a real Slurm cluster of two nodes, through what happens to jobs there. See tests/helpers/slurm_cluster.py.

Needs root, iproute2 and Slurm: `apt install slurm-wlm munge iproute2`. Skips where it may not. It waits for states, never for a
time: on a loaded machine it takes longer and asks the same.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from pipeline.checkpoint.format import committed, step_of

pytestmark = [
    pytest.mark.multinode,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]
PLDR = [sys.executable, "-m", "launch.cli"]
SIZES = ("--nodes", "2", "--ranks-per-node", "1", "--gpus-per-node", "0", "--cpus-per-rank", "1")
STEPS = 500
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, make_slurm):
    with make_slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def pldr(cluster, folder: Path, *words: str, code: int = 0) -> str:
    """`pldr …` on the first node; its output."""
    done = subprocess.run(
        [*cluster.enter, *PLDR, *words], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, **cluster.environment, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == code, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def tokens(cluster, tmp_path_factory, make_run):
    """A run directory with everything that training needs; the tasks of its stages ran on Slurm."""
    folder = tmp_path_factory.mktemp("multinode")
    config = make_run(
        folder, steps=STEPS, checkpoint_every=10, validate_every=250, log_every=10, timeout_s=60, max_restarts=1
    )
    tree = yaml.safe_load(config.read_text())
    tree["data"] |= {"executor": "slurm", "tasks": 2, "slurm": {"partition": "main", "time": "10", "mem_per_cpu_gb": 1}}
    config.write_text(yaml.safe_dump(tree))
    for stage in ("shard", "tokenizer", "tokenize"):
        output = pldr(cluster, folder, stage, "tiny.yaml")
        assert stage == "tokenizer" or re.search(r"Slurm job \d+ submitted", output), output
    done = (cluster.folder / "jobcomp.log").read_text()
    assert len(re.findall(r"Name=pldr-\S+ .*JobState=COMPLETED ", done)) >= 3, done  # tasks, in Slurm's own record
    return folder


@pytest.fixture
def work(tokens, tmp_path):
    """A copy of it to train in."""
    shutil.copytree(tokens, tmp_path / "work")
    return tmp_path / "work"


class Training:
    """A training that Slurm runs, and what can be seen of it."""

    def __init__(self, cluster, folder: Path) -> None:
        self.cluster, self.folder, self.run = cluster, folder, folder / "run"
        self.job = ""

    def submit(self, *words: str) -> None:
        self.said = pldr(self.cluster, self.folder, "launch", "slurm", "tiny.yaml", *SIZES, "--time", "60", *words,
                         f"run_dir={self.run}")  # fmt: skip
        self.job = json.loads((self.run / "logs" / "slurm.json").read_text())["job"]

    @property
    def output(self) -> str:
        """What the job's starts wrote."""
        file = self.run / "logs" / f"slurm-{self.job}.out"
        return file.read_text(errors="replace") if file.exists() else ""

    @property
    def step(self) -> int:
        done = committed(self.run / "checkpoints")
        return step_of(done[-1]) if done else 0

    @property
    def restarts(self) -> int:
        found = re.search(r"Restarts=(\d+)", self.cluster.slurm("scontrol", "show", "job", self.job))
        return int(found[1]) if found else -1

    def ranks(self) -> dict[int, int]:
        """rank -> process id, of the ranks that live (on either node)."""
        found = {}
        for process in psutil.process_iter(["cmdline", "pid"]):
            words = process.info["cmdline"] or []
            if str(self.run / "logs" / "job.json") in words and words[1:4] == ["-u", "-m", "pipeline.worker"]:
                with contextlib.suppress(psutil.Error):
                    found[int(process.environ()["RANK"])] = process.pid
        return found

    def wait(self, condition, *, ended: bool = False) -> None:
        """Until the condition holds. ended: the job may be over."""
        while not condition():
            state = self.cluster.state(self.job)
            assert ended or state not in ENDED, f"{state}: {self.output[-5000:]}"
            time.sleep(0.5)

    def wait_for_progress(self, *, restarts: int) -> None:
        """Until this start (0: the first) has committed a checkpoint of its own."""
        self.wait(lambda: self.restarts == restarts and self.cluster.state(self.job) == "RUNNING")
        at = self.step
        self.wait(lambda: self.step > at)
        assert self.step < STEPS, "the training ended before the test could disturb it"

    def wait_for_end(self) -> str:
        self.wait(lambda: self.cluster.state(self.job) in (*ENDED, ""), ended=True)
        return self.cluster.state(self.job)


@pytest.mark.parametrize(
    ("words", "verdict"),
    [
        (["--gpus-per-node", "2"], "to start at"),
        (["--gpus-per-node", "3"], "Requested node configuration is not available"),
        (["--sbatch", "gres=gpu:a100:2"], "to start at"),
        (["--sbatch", "gpus-per-node=a100:2"], "to start at"),
        (["--sbatch", "gres=gpu:h100:1"], "Requested node configuration is not available"),
    ],
)
def test_the_gpus_of_a_dry_run_are_what_slurm_gives_or_refuses(cluster, tokens, tmp_path, words, verdict):
    """The nodes have two a100, by gres."""
    sizes = ("--nodes", "2", "--ranks-per-node", "2", "--cpus-per-rank", "1", "train.micro_batch=1")
    printed = pldr(cluster, tokens, "launch", "slurm", "tiny.yaml", *sizes, *words, "--dry-run", "--json")
    (script,) = json.loads(printed.splitlines()[-1])["files"].values()
    (tmp_path / "script").write_text(script)
    done = subprocess.run(
        [*cluster.enter, "sbatch", "--test-only", str(tmp_path / "script")], capture_output=True, text=True,
        env={**os.environ, **cluster.environment},
    )  # fmt: skip
    assert verdict in done.stderr, done.stderr


def test_a_more_urgent_job_takes_the_nodes_and_training_resumes_after_it(cluster, work):
    training = Training(cluster, work)
    training.submit()
    training.wait_for_progress(restarts=0)
    urgent = cluster.slurm("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null",
                           "--wrap=srun sleep infinity")  # fmt: skip
    training.wait(lambda: "preempted: saved, requeued; it resumes" in training.output)
    training.wait(lambda: cluster.state(urgent) == "RUNNING" and cluster.state(training.job) == "PENDING")
    at = training.step
    cluster.slurm("scancel", urgent)
    training.wait_for_progress(restarts=1)
    assert f"resumed at step {at} of {STEPS}" in training.output
    cluster.slurm("scancel", training.job)
    assert training.wait_for_end() == "CANCELLED"


def test_a_node_without_power_is_lost_and_training_resumes_when_it_is_back(cluster, work):
    """Everything on the node is gone in a moment; Slurm learns of it later than the ranks on the other node."""
    training = Training(cluster, work)
    training.submit("train.max_restarts=0")
    training.wait_for_progress(restarts=0)
    at = training.step
    cluster.power_off(1)
    training.wait(lambda: "a node does not answer: not saved, requeued; it resumes" in training.output)
    # What Slurm does after SlurmdTimeout. A node that is back before that may get the late order to end the job's first start.
    cluster.slurm("scontrol", "update", f"nodename={cluster.names[1]}", "state=down", "reason=lost")
    cluster.power_on(1)
    training.wait(lambda: "down*" not in cluster.node_states())
    cluster.slurm("scontrol", "update", f"nodename={cluster.names[1]}", "state=resume")
    training.wait_for_progress(restarts=1)
    assert training.step > at and "resumed at step" in training.output
    cluster.slurm("scancel", training.job)
    assert training.wait_for_end() == "CANCELLED"
    cluster.wait_until_idle()


def test_training_goes_on_through_everything_and_is_certified(cluster, tokens, work):
    training = Training(cluster, work)
    training.submit()
    training.wait_for_progress(restarts=0)
    assert sorted(training.ranks()) == [0, 1]
    hosts = [json.loads(f.read_text())["host"] for f in sorted((work / "run/logs/ranks").glob("rank-*.json"))]
    assert hosts == cluster.names

    cluster.slurm("scontrol", "requeue", training.job)  # by hand, or by a site's maintenance
    training.wait_for_progress(restarts=1)

    cluster.slurm("scancel", "--batch", "--signal=USR1", training.job)  # the same as when the time is up
    training.wait(lambda: "stopped by SIGUSR1: saved, requeued" in training.output)
    training.wait_for_progress(restarts=2)

    os.kill(training.ranks()[1], signal.SIGKILL)
    training.wait(lambda: "restarted from step-" in training.output)
    training.wait_for_progress(restarts=2)

    cluster.slurm("scontrol", "update", f"nodename={cluster.names[1]}", "state=down", "reason=test")
    training.wait(lambda: cluster.state(training.job) == "PENDING")
    training.wait(lambda: not training.ranks())
    cluster.slurm("scontrol", "update", f"nodename={cluster.names[1]}", "state=resume")
    training.wait_for_progress(restarts=3)

    cluster.slurm("scancel", training.job)
    assert training.wait_for_end() == "CANCELLED"
    training.wait(lambda: not training.ranks(), ended=True)
    at = training.step
    training.submit()
    training.wait_for_progress(restarts=0)
    assert f"resumed at step {at} of {STEPS}" in training.output
    assert training.wait_for_end() == "COMPLETED", training.output
    assert training.step == STEPS

    # Where the data were made: their stages know the corpus by its place.
    output = pldr(cluster, tokens, "run", "tiny.yaml", f"run_dir={work / 'run'}")
    certificate = json.loads((work / "run/certificate/certificate.json").read_bytes())
    assert certificate["verdict"] == "certified", output
