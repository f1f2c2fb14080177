"""Runs the server: from the first connection until a signal, and then until what was begun is answered.

The first signal (SIGTERM, SIGINT, SIGHUP) drains: /health and new requests get 503, and what is being answered may end within
`Limits.drain_s`. The second ends at once.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from pipeline.errors import UserError, first_line
from pipeline.inference.serve.app import Server
from pipeline.inference.serve.connection import Connection

KEEP_ALIVE_S = 75  # longer than clients keep an idle connection, so that none is closed under a request
GOODBYE_S = 2.0  # for the 503 to those that were cut off
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run(server: Server, bound: socket.socket, *, report: Callable[[str], None]) -> dict[str, Any]:
    """Serve at this address until a signal; returns {"requests", "signal"}.

    Raises UserError when an engine does not start, or dies.
    """
    runner = _Runner(server, report)
    runner.run(sockets=[bound])
    if runner.failure is not None:
        raise UserError(runner.failure)
    return {"requests": server.load.answered, "signal": runner.signals[0] if runner.signals else None}


class _Runner(uvicorn.Server):  # type: ignore[misc]  # uvicorn's types are not read
    """uvicorn's server, with our way to end. `on_tick` runs ten times a second in the event loop."""

    def __init__(self, server: Server, report: Callable[[str], None]) -> None:
        super().__init__(
            uvicorn.Config(
                server.app,
                http=Connection,
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(GOODBYE_S),
            )
        )
        self._server, self._report = server, report
        self._ready = False
        self._end_at = 0.0  # when draining ends; then, when those that were cut off have been told
        self.signals: list[str] = []
        self.failure: str | None = None
        logging.getLogger("uvicorn.error").setLevel(
            logging.CRITICAL
        )  # answers without an end: of clients that are gone

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals only leave their names; `on_tick` acts."""

        def keep(number: int, _: Any) -> None:
            self.signals.append(signal.Signals(number).name)

        before = {
            number: signal.signal(number, keep) for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def on_tick(self, counter: int) -> bool:
        """Whether to end."""
        await super().on_tick(counter)  # the Date header
        if self.failure is None:
            self.failure = self._failed()
        if self.failure is not None:
            return True
        if not self._ready and self._server.problem() is None:
            self._ready = True
            self._report("ready")
        return bool(self.signals) and self._drained()

    def _failed(self) -> str | None:
        """Why the server cannot go on: whoever supervises it starts it again."""
        if self._server.failed is not None:
            return first_line(self._server.failed)
        return self._server.models.problem() if self._ready else None

    def _drained(self) -> bool:
        load, now = self._server.load, time.monotonic()
        if not load.draining:
            load.draining = True
            self._end_at = now + load.limits.drain_s
            if load.requests:
                self._report(
                    f"{self.signals[0]}: {load.requests} requests are being answered; ending when they are, at the latest in "
                    f"{load.limits.drain_s:g} s (a second signal ends at once)"
                )
        if not load.cut.is_set() and (now >= self._end_at or len(self.signals) > 1):
            load.cut.set()
            self._end_at = now + GOODBYE_S
        return not load.requests or (load.cut.is_set() and now >= self._end_at)
