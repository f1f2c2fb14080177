"""Connections whose other side does not move: a request that never ends, an answer that nobody takes."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeline.errors import UserError

HEADERS_S = 30.0  # for a request's headers to arrive
STALLED_MS = 120_000  # that an answer may wait for a reader who takes nothing; the kernel counts


class Connection(H11Protocol):  # type: ignore[misc]  # uvicorn's types are not read
    """uvicorn's, which waits for headers without end."""

    _due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unwatch()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._unwatch()
        elif self._due is None and not self.transport.is_closing():
            self._due = self.loop.call_later(HEADERS_S, self.transport.abort)

    def _unwatch(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens at this address: two servers may bind one while neither listens. Raises UserError."""
    if not 0 <= port < 2**16:
        raise UserError(f"--port {port}: ports are 0 to 65535", exit_code=2)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):  # a connection is a file
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_MS)
        bound.bind(address)
        bound.listen()
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: {error.strerror or error}; name another one", exit_code=2
        ) from None
    return bound
