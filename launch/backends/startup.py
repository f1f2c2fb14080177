"""What ranks do until their first step, reported every few seconds: importing libraries, meeting, reading a checkpoint and
compiling can each take minutes, and silence looks like a hang."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

TELL_S = 5.0


class Startup:
    """A thread that tells what is going on and for how long, until `over`."""

    def __init__(self, ranks: int, report: Callable[[str], None]) -> None:
        self._report, self._over = report, threading.Event()
        self._phase, self._since = f"starting {ranks} ranks" if ranks > 1 else "starting the rank", time.monotonic()
        threading.Thread(target=self._tell, name="startup", daemon=True).start()

    def enter(self, phase: str) -> None:
        """The next thing that they do."""
        self._phase, self._since = phase, time.monotonic()

    def over(self) -> None:
        """The first step is done, or the job has ended."""
        self._over.set()

    def _tell(self) -> None:
        while not self._over.wait(TELL_S):
            phase, since = self._phase, self._since
            self._report(f"{phase}: {time.monotonic() - since:.0f} s")
