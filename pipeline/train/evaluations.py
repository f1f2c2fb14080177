"""Benchmark scores of checkpoints while training runs (`train.evaluate`): rank 0 starts a process for one and trains on.

The process (`python -m pipeline.stages.evaluate`) has the lowest priority, few threads and no GPU, and talks to training
through files only. Decision: whatever happens to it is one line of the log, never an error. At most one runs; a checkpoint that
is due meanwhile is left out, but for the last. Its scores go through the tracker's spool, so that an outage of MLflow loses
none and a resumed run repeats none. It ends with rank 0, however that ends: its stdin is a pipe that closes. What it had
scored is kept, and the resumed run continues it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.checkpoint.format import checkpoint_name, committed, step_of
from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.environment import without_other_jobs
from pipeline.errors import UserError, first_line
from pipeline.io.sealed import read_sealed
from pipeline.io.storage import MANIFEST, sha256_file
from pipeline.train.signals import HEAD_FILE, PARENT_PIPE

PROGRAM = "pipeline.stages.evaluate"
SCORES, MODEL, LOG = "scores.json", "model", "evaluate.log"
FAILED = "not evaluated: "  # begins the line of the log that says why
POLL_S, KILL_S = 0.2, 1.0
TAIL = 4096  # bytes of the log in which that line is looked for
Log = Callable[[int, dict[str, float]], None]


class Evaluations:
    """Rank 0's evaluations. log: the tracker's. start: the step that this start of training begins with.

    `committed` may be called by another thread, `poll` and `close` by the training loop's.
    """

    def __init__(self, config: RunConfig, paths: RunPaths, job_file: Path, log: Log, *, start: int) -> None:
        assert config.train.evaluate is not None
        self._settings, self._steps = config.train.evaluate, config.train.steps
        self._paths, self._job_file, self._log = paths, job_file, log
        self._lines: list[str] = []
        self._pending: list[int] = []
        self._step: int | None = None  # of the checkpoint that is evaluated
        self._process: subprocess.Popen[bytes] | None = None
        self._ends = 0.0
        with self._harmless():
            self._take_up(start)

    def committed(self, step: int) -> None:
        """A checkpoint was committed."""
        if not self._is_due(step):
            return
        if self._step is None and not self._pending:
            self._pending = [step]
        elif step == self._steps:
            self._pending = [step]  # in place of what was not begun
        else:
            busy = checkpoint_name(self._pending[0] if self._step is None else self._step)
            self._lines.append(f"{checkpoint_name(step)} is not evaluated: the evaluation of {busy} is not done")

    def busy(self) -> set[str]:
        """Names of the checkpoints that must stay."""
        return {checkpoint_name(step) for step in (*self._pending, self._step) if step is not None}

    def poll(self) -> list[str]:
        """Take what is done, start what is next. Costs microseconds while nothing happens."""
        with self._harmless():
            if self._process is not None:
                self._look_at(self._process)
            if self._process is None and self._pending:
                self._start()
        lines, self._lines = self._lines, []
        return lines

    def close(self, announce: Callable[[str], None], *, finished: bool, stop: Callable[[], bool]) -> None:
        """The end of training. After the last step the last evaluations may end, within `wait_s`, until a stop is asked for."""
        ends = time.monotonic() + (self._settings.wait_s if finished else 0)
        lines = self.poll() if finished else []
        if finished and self.busy():
            lines.append(f"waiting for the evaluation of {self._busy_names()}, {self._settings.wait_s:g} s at most")
        while self.busy() and time.monotonic() < ends and not stop():
            for line in lines:
                announce(line)
            time.sleep(POLL_S)
            lines = self.poll()
        if self.busy():
            after = (
                "train.evaluate.wait_s is over, or a stop was asked for" if finished else "a resumed run continues it"
            )
            lines.append(f"the evaluation of {self._busy_names()} ends with training: {after}")
        for line in lines:
            announce(line)
        with self._harmless():
            self._end()
        self._pending = []

    def _busy_names(self) -> str:
        return ", ".join(sorted(self.busy()))

    def _is_due(self, step: int) -> bool:
        return step % self._settings.every == 0 or step == self._steps

    def _take_up(self, start: int) -> None:
        """What an earlier start has left: scores that MLflow may lack, an evaluation that was cut, the newest checkpoint."""
        due = [c for c in committed(self._paths.checkpoints) if step_of(c) <= start and self._is_due(step_of(c))]
        left = []
        for checkpoint in due:
            scores = self._scores(checkpoint)
            if scores is not None:
                self._log(step_of(checkpoint), scores["metrics"])  # the tracker leaves out what it has
            else:
                left.append(step_of(checkpoint))
        cut = [step for step in left if (self._paths.evaluations / checkpoint_name(step)).is_dir()]
        newest = [step for step in left if due and step == step_of(due[-1])]
        self._pending = sorted({*cut[-1:], *newest})

    def _scores(self, checkpoint: Path) -> dict[str, Any] | None:
        """The scores of this checkpoint under today's settings; None where there are none."""
        try:
            scores = read_sealed(self._paths.evaluations / checkpoint.name / SCORES)
            same = scores["checkpoint_sha256"] == sha256_file(checkpoint / MANIFEST)
            same = same and scores["tasks"] == list(self._settings.tasks) and scores["limit"] == self._settings.limit
            return dict(scores) if same and scores["step"] == step_of(checkpoint) else None
        except (OSError, UserError, KeyError, TypeError):
            return None

    def _start(self) -> None:
        step = self._pending.pop(0)
        self._step = step
        self._paths.logs.mkdir(parents=True, exist_ok=True)
        environment = without_other_jobs(os.environ) | {
            "OMP_NUM_THREADS": str(self._settings.threads),
            "CUDA_VISIBLE_DEVICES": "",
        }
        for ours in (PARENT_PIPE, HEAD_FILE):
            environment.pop(ours, None)
        with open(self._paths.logs / LOG, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", PROGRAM, str(self._job_file), checkpoint_name(step)],
                stdin=subprocess.PIPE,  # closes with this process
                stdout=log,
                stderr=log,
                env=environment,
                # A terminal's Ctrl-C is for training. Not a session: its priority would not count beside other sessions.
                process_group=0,
            )
        self._ends = time.monotonic() + self._settings.timeout_s

    def _look_at(self, process: subprocess.Popen[bytes]) -> None:
        assert self._step is not None
        code, name = process.poll(), checkpoint_name(self._step)
        if code is None:
            if time.monotonic() > self._ends:
                self._end()
                self._lines.append(f"the evaluation of {name} was ended: train.evaluate.timeout_s is over")
            return
        self._end()
        scores = self._scores(self._paths.checkpoints / name) if code == 0 else None
        if scores is None:
            self._lines.append(f"the evaluation of {name} failed: {self._reason(code)}; training continues")
            return
        self._log(scores["step"], scores["metrics"])
        shown = [
            f"{key.removeprefix('eval/')} {value:.4g}"
            for key, value in scores["metrics"].items()
            if key.endswith("/acc")
        ]
        shown += [f"{task} failed ({why})" for task, why in scores["failed"].items()]
        self._lines.append(f"evaluated {name}: {', '.join(shown)}")

    def _reason(self, code: int) -> str:
        file = self._paths.logs / LOG
        with contextlib.suppress(OSError), open(file, "rb") as log:
            log.seek(max(0, file.stat().st_size - TAIL))
            last = log.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
            if code > 0 and last.startswith(FAILED):
                return last.removeprefix(FAILED)
        return f"{f'signal {signal.Signals(-code).name}' if code < 0 else f'exit code {code}'}, see {file}"

    def _end(self) -> None:
        """No process of ours runs afterwards."""
        process, self._process, self._step = self._process, None, None
        if process is None:
            return
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(KILL_S)
        if process.stdin is not None:
            process.stdin.close()

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        """What fails here must not fail training."""
        try:
            yield
        except Exception as error:
            self._lines.append(f"an evaluation could not be started or read: {first_line(error)}; training continues")
            self._pending, self._step = [], None
