"""What is going on and for how long, reported every few seconds: importing libraries, meeting, reading a checkpoint, compiling
and measuring can each take minutes, and silence looks like a hang."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

TELL_S = 5.0


class Still:
    """A thread that reports what is done, every `times` TELL_S, until `over` or the end of the block."""

    def __init__(self, doing: str, report: Callable[[str], None], *, times: int = 1) -> None:
        self._report, self._over, self._times = report, threading.Event(), times
        self._doing, self._since = doing, time.monotonic()
        threading.Thread(target=self._tell, name="still", daemon=True).start()

    def __enter__(self) -> Still:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over()

    def enter(self, doing: str) -> None:
        """The next thing that is done."""
        self._doing, self._since = doing, time.monotonic()

    def over(self) -> None:
        """Nothing more is reported."""
        self._over.set()

    def _tell(self) -> None:
        while not self._over.wait(self._times * TELL_S):
            doing, since = self._doing, self._since
            self._report(f"{doing}: {time.monotonic() - since:.0f} s")
