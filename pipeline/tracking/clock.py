"""The time that goes to MLflow, which orders points by it and takes durations from it: within a process it does not go back
when the clock of the host is set back."""

from __future__ import annotations

import threading
import time

_lock = threading.Lock()
_last = (0.0, 0.0)  # seconds of the epoch, and monotonic ones at the same moment


def now_ms() -> int:
    """Milliseconds of the epoch: those of the host's clock, or where that went back, those since the last call."""
    global _last
    with _lock:
        wall, ticks = time.time(), time.monotonic()
        _last = max(wall, _last[0] + ticks - _last[1]) if _last[0] else wall, ticks
        return int(_last[0] * 1000)
