"""Requests to stop: signals of this process, and those of the launching process on another host.

Before its first step a rank has nothing to save, and may wait for minutes: for the others, for data, for a checkpoint. It then
leaves at once (`leaving`). From then on it looks at the request after each step. Signals are read by a thread, which runs
also while the main thread waits in C++; a handler would not.

On one host a pipe ties the ranks to the process that started them, and signals reach them directly. Through ssh neither works:
the ranks are children of another host's sshd. So the launching process rewrites `logs/head.json` once a second, with the
signals it was sent; a thread of every rank reads it (the run directory is on a file system that all hosts see). A rank ends
when the file says that the job is over, or has not changed for as long as a collective may take.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
PARENT_PIPE = "PLDR_PARENT_PIPE"  # set when stdin is a pipe whose other end the launching process holds open
HEAD_FILE = "PLDR_HEAD_FILE"  # names the file to the ranks
BEAT_S = 1.0


class Head:
    """The launching process's side, a context manager: on exit, ranks that still run are made to end."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._state: dict[str, Any] = {"token": uuid.uuid4().hex, "beat": 0, "signals": [], "over": False}
        self._stop = threading.Event()
        self._lock = threading.RLock()  # a signal's handler runs in the main thread, which may hold it
        self._thread = threading.Thread(target=self._beat, name="signals", daemon=True)

    def __enter__(self) -> Head:
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.over()

    def pass_on(self, number: int) -> None:
        """Pass a signal on to every rank."""
        self._write(signals=[*self._state["signals"], int(number)])

    def over(self) -> None:
        """Make ranks that still run end at once."""
        self._write(over=True)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            self._write(beat=self._state["beat"] + 1)

    def _write(self, **changes: Any) -> None:
        with self._lock, contextlib.suppress(OSError):  # a full disk: the next beat tries again
            self._state |= changes
            temporary = self.file.with_suffix(".tmp")
            temporary.write_text(json.dumps(self._state))
            os.replace(temporary, self.file)


def follow(file: Path, *, patience_s: float, note: Callable[[int], None], fail: Callable[[str], None]) -> None:
    """A rank's side: start the thread that reads. note: called with each signal. fail: called once, with the reason to end."""
    threading.Thread(target=_follow, args=(file, patience_s, note, fail), name="signals", daemon=True).start()


def _follow(file: Path, patience_s: float, note: Callable[[int], None], fail: Callable[[str], None]) -> None:
    token, beat, changed, noted = None, None, time.monotonic(), 0
    while True:
        with contextlib.suppress(OSError, ValueError, KeyError):
            state = json.loads(file.read_text())
            token = token or state["token"]
            if state["over"] or state["token"] != token:  # of a later start
                return fail("the job was ended by the process that started it")
            for number in state["signals"][noted:]:
                note(signal.Signals(number))
                noted += 1
            if state["beat"] != beat:
                beat, changed = state["beat"], time.monotonic()
        if time.monotonic() - changed > patience_s:
            return fail(f"no sign of life of the process that started the job for {patience_s:.0f} s ({file})")
        time.sleep(BEAT_S)


class StopRequest:
    """The signals that this process got since `listen`."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._leave: Callable[[str], None] | None = None

    def listen(self) -> None:
        """From now on, note SIGNALS instead of being killed by them. Call it in the main thread.

        SIGHUP that is ignored at the start stays ignored (nohup), unless PARENT_PIPE is set: then the launching process ignores
        it for the launchers alone, and passes on what it means."""
        hangup = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN or os.environ.get(PARENT_PIPE) == "1"
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=self._read, args=(read,), name="stop", daemon=True).start()
        for number in SIGNALS:
            if number != signal.SIGHUP or hangup:
                signal.signal(number, self._handle)

    def leaving(self, leave: Callable[[str], None] | None) -> None:
        """Call `leave` with the name of the first signal, also of one that came before; None: no longer."""
        self._leave = leave
        if leave is not None and self._seen:
            leave(signal.Signals(min(self._seen)).name)

    def flags(self) -> list[float]:
        """For each of SIGNALS 1 if it came, else 0; the ranks sum these."""
        return [float(number in self._seen) for number in SIGNALS]

    def note(self, number: int) -> None:
        """Note a signal that reached this process in another way (`follow`)."""
        self._seen.add(number)
        if (leave := self._leave) is not None:
            leave(signal.Signals(number).name)

    def _read(self, pipe: int) -> None:
        while True:
            for number in os.read(pipe, 64):
                if number in SIGNALS:
                    self.note(number)

    def _handle(self, number: int, frame: Any) -> None:
        """Python writes the number to the pipe only for a signal that has a handler."""


STOP = StopRequest()  # this process's


def signal_name(flags: list[float]) -> str | None:
    """The name of the first signal that any rank got, from the sum of all ranks' flags; None when there was none."""
    return next((number.name for number, flag in zip(SIGNALS, flags, strict=True) if flag), None)
