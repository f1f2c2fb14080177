"""launch/backends/local_sweep.py: children at once on this machine.

With real trainings: tests/launch/end_to_end/test_sweep_at_once.py.
"""

import sys
from pathlib import Path

import pytest

from launch.backends import local_sweep
from launch.backends.local_sweep import _Children, devices_for
from launch.cli import main
from pipeline.errors import ConfigError
from pipeline.sweep import apart
from pipeline.sweep.sweep import Sweep

# Stands for `pldr sweep --only NUMBER`: notes its device when it begins and ends; child 3 fails.
CHILD = """
import os, sys, time
number, log = sys.argv[sys.argv.index("--only") + 1], open(sys.argv[1], "a", buffering=1)
print(number, os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["OMP_NUM_THREADS"], "begins", file=log)
time.sleep(0.2)
print(number, os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["OMP_NUM_THREADS"], "ends", file=log)
if number == "3":
    sys.exit("pldr: error: seed-3: no luck")
"""


def gpus(monkeypatch, count, visible=None):
    monkeypatch.setattr(local_sweep, "has_gpu", lambda: count > 0)
    monkeypatch.setattr(local_sweep, "num_devices", lambda: count)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


def test_each_child_gets_a_gpu_of_its_own(monkeypatch):
    gpus(monkeypatch, 4)
    assert devices_for(2) == ["0", "1"]
    gpus(monkeypatch, 2, "5, GPU-8932f937")
    assert devices_for(2) == ["5", "GPU-8932f937"]
    with pytest.raises(ConfigError, match=r"--at-once 3: each child takes a GPU, and 2 are visible here; lower it"):
        devices_for(3)
    gpus(monkeypatch, 0)
    assert devices_for(3) == [None, None, None]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--at-once", "0"], "--at-once 0: at least 1"),
        (["--at-once", "2", "--hostfile", "hosts"], "--at-once goes without --hostfile"),
        (["--at-once", "2", "train.global_batch=6"], "is not a multiple of micro_batch"),
    ],
)
def test_wrong_options(sweep, tmp_path, capsys, words, message):
    assert main(["sweep", sweep, *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("devices", [["0", "7"], [None, None]])
def test_two_run_at_once_on_their_devices_and_one_that_fails_stops_no_other(sweep, tmp_path, monkeypatch, devices):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "all")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(local_sweep.os, "cpu_count", lambda: 6)
    monkeypatch.setattr(local_sweep, "POLL_S", 0.05)
    monkeypatch.setattr(apart, "collect", lambda sweep, parent, errors: {})
    finished, lines = tmp_path / "finished", []
    monkeypatch.setattr(apart, "is_complete", lambda sweep, child: str(child.values["seed"]) in ended(finished))
    monkeypatch.setattr(apart, "unfinished", lambda sweep, failed=(): {
        number: child.name for number, child in enumerate(sweep.children, start=1)
        if child.name not in failed and str(number) not in ended(finished)
    })  # fmt: skip
    children = _Children(Sweep(sweep, [], apart=True), [], devices, lines.append)
    children.command = [sys.executable, "-c", CHILD, str(finished)]
    assert children.run("parent") == {"seed-3": "no luck"}
    assert "seed-3: no luck" in lines and len(lines) == 5

    log, running = [line.split() for line in finished.read_text().splitlines()], {}
    for number, device, threads, event in log:
        if event == "ends":
            del running[number]
            continue
        running[number] = device
        assert threads == "3" and len(running) <= 2 and (len(set(running.values())) == len(running) or device == "all")
    assert {device for _, device, _, _ in log} == ({"all"} if devices == [None, None] else {"0", "7"})
    assert sorted(number for number, *_, event in log if event == "ends") == ["1", "2", "3", "4"]


def ended(finished: Path) -> set[str]:
    """The children that have ended, but for the one that fails."""
    words = [line.split() for line in finished.read_text().splitlines()] if finished.exists() else []
    return {number for number, *_, event in words if event == "ends" and number != "3"}


def test_a_child_that_ends_before_its_work_is_not_started_for_ever(sweep, monkeypatch):
    """As one does that somebody else sent a signal: it saved, and exits 0."""
    monkeypatch.setattr(local_sweep, "POLL_S", 0.05)
    monkeypatch.setattr(apart, "collect", lambda sweep, parent, errors: {})
    children = _Children(Sweep(sweep, [], apart=True), [], [None, None], lambda text: None)
    children.command = [sys.executable, "-c", "pass"]
    assert set(children.run("parent").values()) == {"it was stopped by a signal of its own"}


def test_where_the_stores_are(sweep, tmp_path, monkeypatch, caplog):
    """Nothing is said of nodes: the children run here."""
    lines = []
    made = Sweep(sweep, [], apart=True)
    apart.report_stores(made, lines.append)
    assert not caplog.records and made.config.tracking.uri == f"sqlite:///{tmp_path}/sweep/mlflow.db"
    assert len(lines) == 1 and lines[0].startswith(
        "MLflow      each child's store is in its run directory: a SQLite file has"
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    apart.report_stores(Sweep(sweep, [], apart=True), lines.append)
    assert len(lines) == 1
