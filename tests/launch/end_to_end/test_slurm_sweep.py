"""`pldr sweep --slurm` on a real Slurm cluster of two nodes: an array of children, one canceled, one requeued."""

import json
import os
import subprocess
import sys
import time

import pytest
import yaml

from pipeline.checkpoint.format import committed

pytestmark = [
    pytest.mark.multinode,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]
PLDR = [sys.executable, "-m", "launch.cli"]
SIZES = ("--ranks-per-node", "1", "--gpus-per-node", "0", "--cpus-per-rank", "1", "--at-once", "2", "--time", "60")


class Follower:
    """`pldr sweep --slurm` on the first node."""

    def __init__(self, cluster, folder, name: str) -> None:
        self.out = folder / f"{name}.out"
        command = [*cluster.enter, *PLDR, "sweep", "sweep.yaml", "--slurm", *SIZES, "--json"]
        with open(self.out, "wb") as out:
            self.process = subprocess.Popen(
                command, cwd=folder, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, **cluster.environment, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    @property
    def output(self) -> str:
        return self.out.read_text(errors="replace")

    def wait(self, condition) -> None:
        while not condition():
            assert self.process.poll() is None, self.output
            time.sleep(0.5)


def test_an_array_of_children_one_canceled_one_requeued_and_its_follower_killed(make_slurm, make_run, tmp_path):
    with make_slurm(tmp_path / "slurm") as cluster:
        make_run(tmp_path, steps=200, warmup_steps=10, checkpoint_every=10, validate_every=200, ranks=1)
        tree = {"name": "three", "config": "tiny.yaml", "run_dir": str(tmp_path / "sweep"), "until": "train",
                "grid": {"seed": [1, 2, 3]}}  # fmt: skip
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(tree))
        children, logs = tmp_path / "sweep" / "children", tmp_path / "sweep" / "logs"

        def commits(seed: int) -> int:
            folder = children / f"seed-{seed}" / "checkpoints"
            return len(committed(folder)) if folder.exists() else 0

        def resumed(seed: int) -> str | None:
            return json.loads((children / f"seed-{seed}/stages/train.json").read_bytes())["result"]["resumed_from"]

        with Follower(cluster, tmp_path, "first") as first:
            first.wait((logs / "sweep-array.json").exists)
            array = json.loads((logs / "sweep-array.json").read_bytes())["job"]
            first.wait(lambda: "PENDING JobArrayTaskLimit" in cluster.slurm("squeue", "-h", "-o", "%T %r"))  # the third
            first.wait(lambda: commits(2))
            cluster.slurm("scancel", f"{array}_2")
            first.wait(lambda: cluster.state(f"{array}_2") == "CANCELLED")
            assert "3 of 3 children, 2 at once" in first.output
        assert not (children / "seed-2/stages/train.json").exists(), "it ended before the test could cancel it"

        with Follower(cluster, tmp_path, "second") as second:  # the array went on alone
            second.wait(lambda: f"waiting     for Slurm job {array} of an earlier start" in second.output)
            second.wait(lambda: commits(3))
            cluster.slurm(
                "scancel", "--batch", "--signal=USR1", f"{array}_3"
            )  # Slurm's own number of it is the array's
            assert second.process.wait() == 1
        result = json.loads(second.output.splitlines()[-1])
        assert "1 of 3 children failed, seed-2 with: ended as CANCELLED in Slurm job" in result["error"]
        assert [row["status"] for row in result["table"]] == ["finished", "failed", "finished"]
        assert "stopped by SIGUSR1: saved, requeued" in (logs / f"sweep-{array}_3.out").read_text()
        assert resumed(1) is None and resumed(3) is not None

        with Follower(cluster, tmp_path, "third") as third:
            assert third.process.wait() == 0, third.output
        assert "1 of 3 children, 2 at once" in third.output and resumed(2) is not None
        table = json.loads(third.output.splitlines()[-1])["table"]
        assert [(row["child"], row["status"], row["step"]) for row in table] == [
            (f"seed-{seed}", "finished", 200) for seed in (1, 2, 3)
        ]
        assert len({row["data_fingerprint"] for row in table}) == 1 and len({row["run_id"] for row in table}) == 3
