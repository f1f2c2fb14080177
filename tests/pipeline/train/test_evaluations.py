"""Evaluations beside training: whatever their process does, training gets scores or one line. Real processes."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.format import COMMITTED, checkpoint_name
from pipeline.checkpoint.retention import Policy
from pipeline.config.load import parse_config
from pipeline.config.paths import RunPaths
from pipeline.tracking.publish import Publisher
from pipeline.train import evaluations
from pipeline.train.evaluations import Evaluations

LAST = 600


class Run:
    """A run directory with checkpoints that say how their evaluation behaves."""

    def __init__(self, root: Path, **settings: Any) -> None:
        self.paths = RunPaths(root)
        evaluate = {"every": 100, "tasks": ["arc_easy"], "threads": 3, **settings}
        train = {"steps": LAST, "warmup_steps": 1, "checkpoint_every": 100, "evaluate": evaluate}
        tree = {
            "name": "t",
            "run_dir": str(root),
            "data": {"sources": [{"url": "x.txt"}]},
            "model": {"vocab_size": 300, "num_layers": 1, "num_heads": 1, "head_dim": 4, "context_length": 8},
            "train": train,
        }
        self.config = parse_config(tree, where="test")
        self.logged: list[tuple[int, dict[str, float]]] = []

    def checkpoint(self, step: int, behaves: str = "scores") -> None:
        folder = self.paths.checkpoints / checkpoint_name(step)
        folder.mkdir(parents=True)
        (folder / "behaves").write_text(behaves)
        (folder / "MANIFEST.json").write_text(f"{step}")
        (folder / COMMITTED).write_text("")

    def start(self, step: int = 0) -> Evaluations:
        return Evaluations(
            self.config,
            self.paths,
            self.paths.logs / "job.json",
            lambda at, values: self.logged.append((at, values)),
            start=step,
        )

    def until_idle(self, found: Evaluations) -> list[str]:
        lines, end = found.poll(), time.monotonic() + 120
        while found.busy():
            assert time.monotonic() < end
            time.sleep(0.02)
            lines += found.poll()
        return lines


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(evaluations, "PROGRAM", "tests.pipeline.train.small_evaluation")
    return Run(tmp_path / "run")


def commit(run: Run, found: Evaluations, step: int, behaves: str = "scores") -> None:
    run.checkpoint(step, behaves)
    found.committed(step)


def process_of(found: Evaluations) -> int:
    assert found._process is not None
    return found._process.pid


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_scores_are_logged_at_their_step(run: Run) -> None:
    found = run.start()
    commit(run, found, 50)  # not due
    assert not found.busy()
    commit(run, found, 100)
    assert run.until_idle(found) == ["evaluated step-000100: arc_easy/acc 0.25"]
    assert run.logged == [(100, {"eval/arc_easy/acc": 0.25, "threads": 3.0})]


@pytest.mark.parametrize(
    ("behaves", "line"),
    [("fails", "failed: piqa: no documents;"), ("crashes", "failed: exit code 1, see ")],
)
def test_one_that_fails_is_one_line_and_the_next_one_runs(run: Run, behaves: str, line: str) -> None:
    found = run.start()
    commit(run, found, 100, behaves)
    [text] = run.until_idle(found)
    assert text.startswith(f"the evaluation of step-000100 {line}") and text.endswith("training continues")
    assert not run.logged
    commit(run, found, 200)
    assert run.until_idle(found) == ["evaluated step-000200: arc_easy/acc 0.25"]


def test_one_that_is_killed_is_one_line(run: Run) -> None:
    found = run.start()
    commit(run, found, 100, "hangs")
    assert found.poll() == []
    os.kill(process_of(found), signal.SIGKILL)
    [text] = run.until_idle(found)
    assert "step-000100 failed: signal SIGKILL, see" in text and not run.logged


def test_one_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluations, "PROGRAM", "tests.pipeline.train.small_evaluation")
    run = Run(tmp_path / "run", timeout_s=0.5)
    found = run.start()
    commit(run, found, 100, "hangs")
    assert found.poll() == []
    pid = process_of(found)
    os.kill(pid, signal.SIGSTOP)
    assert run.until_idle(found) == ["the evaluation of step-000100 was ended: train.evaluate.timeout_s is over"]
    assert not is_alive(pid)


def test_one_at_a_time_and_the_last_is_never_left_out(run: Run) -> None:
    found = run.start()
    commit(run, found, 100, "waits")
    assert found.poll() == []
    commit(run, found, 200)
    assert found.poll() == ["step-000200 is not evaluated: the evaluation of step-000100 is not done"]
    commit(run, found, LAST)
    assert found.busy() == {"step-000100", "step-000600"}
    (run.paths.root / "go").write_text("")
    lines: list[str] = []
    found.close(lines.append, finished=True, stop=lambda: False)
    assert lines[-2:] == ["evaluated step-000100: arc_easy/acc 0.25", "evaluated step-000600: arc_easy/acc 0.25"]
    assert [step for step, _ in run.logged] == [100, 600]


@pytest.mark.parametrize(
    ("finished", "wait_s", "stop", "why"),
    [
        (False, 600, False, "a resumed run continues it"),
        (True, 0.3, False, "train.evaluate.wait_s is over"),
        (True, 600, True, "a stop was asked for"),
    ],
)
def test_none_outlives_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool, wait_s: float, stop: bool, why: str
) -> None:
    monkeypatch.setattr(evaluations, "PROGRAM", "tests.pipeline.train.small_evaluation")
    run = Run(tmp_path / "run", wait_s=wait_s)
    found = run.start()
    commit(run, found, 100, "hangs")
    found.poll()
    pid, lines = process_of(found), list[str]()
    found.close(lines.append, finished=finished, stop=lambda: stop)
    assert "the evaluation of step-000100 ends with training" in lines[-1] and why in lines[-1]
    assert not is_alive(pid) and not found.busy()


def test_a_resumed_run_repeats_none_and_loses_none(run: Run) -> None:
    first = run.start()
    commit(run, first, 100)
    run.until_idle(first)
    commit(run, first, 200, "hangs")
    first.poll()
    (run.paths.evaluations / "step-000200").mkdir(exist_ok=True)  # as far as it came
    commit(run, first, 300)  # left out
    first.close(lambda _: None, finished=False, stop=lambda: False)
    run.checkpoint(400)  # training was killed here
    for step in (200, 400):
        (run.paths.checkpoints / checkpoint_name(step) / "behaves").write_text("scores")
    run.logged.clear()
    second = run.start(400)
    assert run.logged == [(100, {"eval/arc_easy/acc": 0.25, "threads": 3.0})]  # the tracker has it: it leaves it out
    assert second.busy() == {"step-000200", "step-000400"}
    run.until_idle(second)
    assert [step for step, _ in run.logged[1:]] == [200, 400]
    assert run.start(400).busy() == set()
    assert run.start(150).busy() == set()  # rolled back: what is later is not of this training


def test_scores_of_another_checkpoint_are_not_taken(run: Run) -> None:
    first = run.start()
    commit(run, first, 100)
    run.until_idle(first)
    (run.paths.checkpoints / "step-000100" / "MANIFEST.json").write_text("another")
    run.logged.clear()
    assert run.start(100).busy() == {"step-000100"} and not run.logged


def test_a_process_that_cannot_be_started_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run.start()
    commit(run, found, 100)
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    [line] = found.poll()
    assert "could not be started" in line and "training continues" in line and not found.busy()


def test_what_is_read_is_not_removed(run: Run) -> None:
    found = run.start()
    publisher = Publisher(run.paths.checkpoints, Policy(2), lambda: None, print, found.busy)
    commit(run, found, 100, "waits")
    found.poll()
    for step in (200, 300, 400):
        commit(run, found, step)
    publisher.saved(400)
    publisher.close(0)
    assert sorted(path.name for path in run.paths.checkpoints.iterdir()) == [
        "step-000100", "step-000300", "step-000400"
    ]  # fmt: skip
    (run.paths.root / "go").write_text("")
    run.until_idle(found)
    assert [step for step, _ in run.logged] == [100]
    publisher._prune()
    assert not (run.paths.checkpoints / "step-000100").exists()
