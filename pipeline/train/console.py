"""The lines that ranks print for the user, marked so that the launching process can find them.

Ranks run under a launcher, whose output and that of every rank goes to the log file. Lines that begin with `STATUS` are
shown to the user: rewritten in place on a terminal, plain lines otherwise.
"""

from __future__ import annotations

import sys
import time

from pipeline.config.run import RunConfig

STATUS = "pldr-status| "
FAILURE = "pldr-failure| "  # followed by an exit code, a space, and one line
STOPPED = "pldr-stopped| "
PHASE = "pldr-phase| "  # what ranks do until their first step; shown with the time it takes (pipeline/stages/still.py)
LISTENING = "pldr-listening| "  # this rank now saves and stops when it gets a signal


class Progress:
    """Rank 0's status lines."""

    def __init__(self, config: RunConfig, *, start_step: int) -> None:
        self._steps = config.train.steps
        self._start_step, self._started = start_step, time.perf_counter()
        self._latest: dict[str, float] = {}
        self._validated = 0
        if start_step:
            _print(f"resumed at step {start_step} of {self._steps}")

    def first_step(self, step: int) -> None:
        """The first step of this start is done, which nobody may wait for in silence (log_every can be long)."""
        if step == self._start_step + 1:
            _print(f"step {step}/{self._steps}")

    def update(self, step: int, values: dict[str, float]) -> None:
        """Print the newest values, as of this step."""
        self._latest.update(values)
        if "val/loss_block" in values:
            self._validated = step
        _print(self._line(step))

    def end(self, step: int, *, stop: str | None) -> None:
        """The last line. `stop`: the signal that ended training before its last step."""
        if step == self._steps:
            _print(f"trained {self._steps} steps")
        else:
            _print(f"{stop} at step {step} of {self._steps}: saved", STOPPED)

    def event(self, text: str) -> None:
        """Print something that a user should know immediately."""
        _print(text)

    def _line(self, step: int) -> str:
        v = self._latest
        parts = [f"step {step}/{self._steps}"]
        if step > self._start_step:
            left = (time.perf_counter() - self._started) / (step - self._start_step) * (self._steps - step)
            parts.append(f"{int(left // 60)}:{int(left % 60):02d} left")
        if "train/loss" in v:
            parts += [f"loss {v['train/loss']:.4f}", f"{v['train/tokens_per_second']:,.0f} tok/s"]
        if "train/mfu" in v:
            parts.append(f"MFU {v['train/mfu']:.1%}")
        if "val/loss_block" in v:
            parts.append(f"val@{self._validated} {v['val/loss_block']:.4f} (cached G {v['val/loss_cached']:.4f})")
        if "invariance/order_parameter_G" in v:
            parts.append(f"order parameter of G {v['invariance/order_parameter_G']:.1e}")
        if "invariance/budget" in v:
            parts.append(f"budget {v['invariance/budget']:.2f}")
        return "  ".join(parts)


def _print(text: str, mark: str = STATUS) -> None:
    print_line(mark + text)


def print_line(line: str) -> None:
    """Print a line in one write: with `python -u`, as DeepSpeed starts ranks, `print` writes the newline separately, and
    another rank's output can come between."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
