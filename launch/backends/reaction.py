"""How long ranks that were asked to stop may take.

They look at the request after each step, save, and exit. Ranks that hang do not, and a stop must come to an end. So they have
LIMIT_S, or three times the last step where that is longer, since the request or since their last save, validation or freeze:
those take as long as they take (what hangs in them ends by `train.timeout_s`). What the ranks do is in their heartbeats.
"""

from __future__ import annotations

import time
from pathlib import Path

from launch.backends.stop import LIMIT_S
from pipeline.train.heartbeat import SILENT_S, beats

WAITED_FOR = ("save", "validate", "freeze")
STEPS = 3.0


class Reaction:
    """From now on, of the ranks whose heartbeats are in this folder. Call `overdue` about once a second."""

    def __init__(self, heartbeats: Path) -> None:
        self._folder = heartbeats
        self._asked = self._since = time.monotonic()
        self._limit_s = LIMIT_S
        self._seen: dict[
            int, tuple[float, float | None]
        ] = {}  # rank -> its last beat; when that changed while we looked

    def overdue(self) -> bool:
        """Whether they have had their time."""
        now = time.monotonic()
        for rank, beat in beats(self._folder).items():
            last, changed = self._seen.get(rank, (beat["written"], None))
            if beat["written"] != last:
                last, changed = beat["written"], now
            self._seen[rank] = last, changed
            if changed is None or now - changed > SILENT_S:  # of an earlier start, or it does not live
                continue
            self._limit_s = max(LIMIT_S, STEPS * beat.get("step_s", 0.0))
            if beat["phase"] in WAITED_FOR:
                self._since = now
        return now - self._since > self._limit_s

    def what(self) -> str:
        """What became of them, once overdue."""
        return f"but the ranks did not save and stop within {time.monotonic() - self._asked:.0f} s and were killed"
