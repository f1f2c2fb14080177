"""Signals that ask `pldr` to stop: SIGINT (Ctrl-C), SIGTERM, SIGHUP and SIGUSR1, all alike.

`listen` comes before the imports of the command line; only launch/__init__.py runs earlier. From then on a signal is

- kept, while the command line is read, and raised by `begin`;
- raised as `Interrupted`, while no ranks run: a stage leaves what is complete and goes on at the next start;
- handed to the job, while ranks run (`handed_to`): they save and stop.

The first one counts, and is the one that is named. Later ones change nothing: a terminal, a wrapper and a scheduler may each
send one, and what they would interrupt is the cleaning up. Only Ctrl-C more than AGAIN_S after the first ends everything at
once. So does a thread where no ranks run and `pldr` has not ended LIMIT_S after a signal: a library may swallow `Interrupted`,
and while the main thread is in C++ (training a tokenizer) no handler of Python's runs.

SIGHUP that is ignored at the start stays ignored: that is nohup. A rank has the same signals (pipeline/train/signals.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
AGAIN_S = 3.0
LIMIT_S = 20.0
Announce = Callable[[str], object]  # gets the name of the signal
END_S = 0.5  # for the last line to be written
Receive = Callable[[signal.Signals, bool], None]  # the signal; whether everything is to end at once


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to stop. `name`: the signal's."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class StopSignals:
    """The signals of this process since `listen`, by name in `names`."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._exit_code = 1  # of an end at once
        self._announce: Announce | None = None
        self._first_at, self._raises, self._raised = 0.0, False, False
        self._receive: Receive | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._pipe: tuple[int, int] | None = None

    @property
    def listens(self) -> bool:
        """Whether `listen` was called."""
        return bool(self._before)

    def listen(self) -> None:
        """Handle the signals from now on; only the main thread can. Those of an earlier command are forgotten."""
        self.__init__()  # type: ignore[misc]
        self._before = self._install()
        if self._before:
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            threading.Thread(target=self._limit, args=(self._pipe,), name="stop", daemon=True).start()

    def forget(self) -> None:
        """Handle them as before `listen`."""
        self._raises = False
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._pipe[1])  # its thread ends
            self._before, self._pipe = {}, None

    def begin(self, exit_code: int, announce: Announce) -> None:
        """Raise from now on, and at once what came before. exit_code, announce: for an end at once."""
        self._raises, self._exit_code, self._announce = True, exit_code, announce
        if self.names:
            self._raise()

    def end(self) -> None:
        """The work is over: what comes now changes nothing."""
        self._raises = False

    def ignore(self) -> None:
        """Ignore them: while the interpreter ends, handlers are gone and a late signal would replace the exit code."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    @contextlib.contextmanager
    def handed_to(self, receive: Receive) -> Iterator[None]:
        """While the block runs `receive` gets the first signal, and the Ctrl-C that is to end everything at once."""
        if self.names:
            raise Interrupted(self.names[0])
        before, self._receive = self._install(), receive
        try:
            yield
        finally:
            self._receive = None
            for number, handler in before.items():
                signal.signal(number, handler)

    def _install(self) -> dict[signal.Signals, Any]:
        if threading.current_thread() is not threading.main_thread():
            return {}
        kept = [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
        return {number: signal.signal(number, self._handle) for number in kept}

    def _handle(self, number: int, frame: Any) -> None:
        which, now = signal.Signals(number), time.monotonic()
        self.names.append(which.name)
        first = len(self.names) == 1
        if first:
            self._first_at = now
        at_once = which == signal.SIGINT and not first and now - self._first_at > AGAIN_S
        if self._receive is not None and (first or at_once):
            self._receive(which, at_once)
        elif at_once:
            self._end_at_once(self.names[0])
        elif self._raises and first:
            self._raise()

    def _raise(self) -> None:
        self._raised = True
        raise Interrupted(self.names[0])

    def _limit(self, pipe: tuple[int, int]) -> None:
        came: list[int] = []
        while not came and (data := os.read(pipe[0], 64)):
            came = [number for number in data if number in SIGNALS]
        if came:
            time.sleep(LIMIT_S)
            unseen = not self.names and self._receive is None
            if self._pipe is pipe and self._raises and (self._raised or unseen):
                self._end_at_once(signal.Signals(came[0]).name)
        os.close(pipe[0])

    def _end_at_once(self, name: str) -> None:
        import psutil

        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
        if self._announce is not None:
            self._announce(name)
        time.sleep(END_S)
        os._exit(self._exit_code)


stop_signals = StopSignals()
