"""`pldr sweep` as a user runs it: two children, killed inside the second one's training, started again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launch.cli import main
from pipeline.network import free_port
from pipeline.tracking.client import client

PLDR = [sys.executable, "-m", "launch.cli"]


# Runs on this machine what it is to run on each host; %n is a host's number.
PDSH = """#!/bin/sh
hosts= pids= number=0 code=0
while [ $# -gt 0 ]; do case $1 in -S) shift;; -f) shift 2;; -w) hosts=$2; shift 2;; *) break;; esac; done
for host in $(echo $hosts | tr , ' '); do
  echo "$host" >> "$PDSH_CALLS"
  sh -c "$(echo "$*" | sed "s/%n/$number/g")" & pids="$pids $!"
  number=$((number + 1))
done
for pid in $pids; do wait $pid || code=$?; done
exit $code
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_child_is_trained_on_the_hosts_of_a_hostfile(tmp_path, make_run):
    make_run(tmp_path, steps=4, warmup_steps=1, validate_every=4, checkpoint_every=4)
    tree = {"name": "two", "config": "tiny.yaml", "run_dir": str(tmp_path / "sweep"), "until": "consolidate",
            "grid": {"seed": [1, 2]}}  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "hosts").write_text("one slots=1\ntwo slots=1\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pdsh").write_text(PDSH)
    (tmp_path / "bin" / "pdsh").chmod(0o755)
    words = ["sweep", "sweep.yaml", "--json", "--hostfile", "hosts", "--master-addr", "127.0.0.1"]
    done = subprocess.run(
        [*PLDR, *words, "--master-port", str(free_port())], cwd=tmp_path, capture_output=True, text=True, timeout=600,
        env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PDSH_CALLS": str(tmp_path / "calls"),
             "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "calls").read_text().split() == ["one", "two"] * 2
    table = json.loads(done.stdout.splitlines()[-1])["table"]
    assert [(row["status"], row["step"]) for row in table] == [("finished", 4)] * 2
    for child in ("seed-1", "seed-2"):
        state = json.loads((tmp_path / "sweep/children" / child / "checkpoints/step-000004/state.json").read_bytes())
        assert state["world_size"] == 2


def test_ranks_that_do_not_divide_a_childs_batch_are_refused_before_anything_starts(tmp_path, make_run, capsys):
    make_run(tmp_path)
    tree = {"name": "two", "config": "tiny.yaml", "run_dir": str(tmp_path / "sweep"), "grid": {"seed": [1, 2]}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "hosts").write_text("one slots=3\n")
    assert main(["sweep", str(tmp_path / "sweep.yaml"), "--hostfile", str(tmp_path / "hosts")]) == 2
    error = capsys.readouterr().err
    assert "train.global_batch 8 is not a multiple of micro_batch 4 x 3 ranks" in error and error.count("\n") == 1
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_killed_sweep_goes_on_where_it_was_and_ends_with_one_table(tmp_path, make_run):
    make_run(tmp_path, steps=120, warmup_steps=10, validate_every=60, checkpoint_every=20, ranks=1)
    tree = {
        "name": "two",
        "config": "tiny.yaml",
        "run_dir": str(tmp_path / "sweep"),
        "set": {"post.register_as": None},
        "grid": {"train.metric_weight_decay": [0.1, 100]},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(tree))
    command = [*PLDR, "sweep", "sweep.yaml", "--json"]
    first = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    children = tmp_path / "sweep" / "children"
    second = children / "metric_weight_decay-100"
    end = time.monotonic() + 600
    while not list((second / "checkpoints").glob("step-*/COMMITTED")):
        assert first.poll() is None, first.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    table = json.loads((tmp_path / "sweep" / "report" / "sweep.json").read_bytes())
    assert [row["child"] for row in table["rows"]] == [
        "metric_weight_decay-0.1"
    ]  # one was finished, and is in the table

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = done.stdout.split("child       2 of 2")
    assert parts[0].count("complete, skipped") == 7 and "train        ..." not in parts[0]
    assert "train        ..." in parts[1]
    train = json.loads((second / "stages" / "train.json").read_bytes())["result"]
    assert train["resumed_from"] is not None and train["steps"] == 120

    result = json.loads(done.stdout.splitlines()[-1])
    weak, strong = result["table"]
    assert (weak["status"], strong["status"], weak["verdict"]) == ("finished", "finished", "failed")
    assert weak["budget"] < 0.1 and 5 < strong["budget"] < 20
    assert strong["relative_deviation_g"] < 0.2 * weak["relative_deviation_g"]
    assert weak["data_fingerprint"] == strong["data_fingerprint"]
    assert "<circle" in Path(result["files"]["page"]).read_text()
    mlflow = client(f"sqlite:///{tmp_path}/mlflow.db")
    parent = mlflow.get_run(result["run_id"])
    runs = mlflow.search_runs([parent.info.experiment_id])
    assert {run.info.run_id for run in runs} == {parent.info.run_id, weak["run_id"], strong["run_id"]}
    assert {run.info.status for run in runs} == {"FINISHED"}
    kept = {Path(item.path).name for item in mlflow.list_artifacts(parent.info.run_id, "sweep")}
    assert kept == {"sweep.json", "sweep.html"}
