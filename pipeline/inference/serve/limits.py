"""What the server takes at once, and when it refuses: concurrency, body, time.

Decision: what cannot be answered now is refused at once (429 with Retry-After) and not queued without end: a client that
knows can wait or go elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pipeline.inference.serve.errors import ApiError, wrong

RETRY_AFTER_S = 1
BODY_TIMEOUT_S = 30.0  # for a body to arrive

T = TypeVar("T")
Receive = Any  # ASGI's
NO_RETRY = {"x-should-retry": "false"}  # the openai client would send the same work again


@dataclass(frozen=True)
class Limits:
    """max_sequences: prompts times n, of all requests together. timeout_s: for one request, its answer included."""

    max_sequences: int = 256
    max_body: int = 4 << 20  # bytes
    max_stop: int = 64  # strings
    timeout_s: float = 600.0
    drain_s: float = 30.0  # after SIGTERM


@dataclass
class Load:
    """What is going on: sequences and requests that have not been answered, and whether new ones are taken."""

    limits: Limits
    sequences: int = 0
    requests: int = 0
    answered: int = 0  # since the start
    draining: bool = False
    cut: asyncio.Event = field(default_factory=asyncio.Event)  # the time to drain is over

    @contextlib.contextmanager
    def request(self) -> Iterator[Slots]:
        """A request, from its first byte on. It holds room for one sequence until it says how many it has."""
        if self.draining:
            raise draining()
        slots = Slots(self)
        slots.hold(1)
        self.requests += 1
        try:
            yield slots
        finally:
            self.requests -= 1
            self.answered += 1
            slots.release()


class Slots:
    """The room that one request holds."""

    def __init__(self, load: Load) -> None:
        self._load, self._held = load, 0

    def hold(self, count: int) -> None:
        """Hold room for this many sequences in all. Raises ApiError: 400 if that is never possible, 429 if not now."""
        most = self._load.limits.max_sequences
        if count > most:
            raise wrong(
                "n", f"prompt, n: {count} sequences (prompts times n); this server takes at most {most} at once"
            )
        if self._load.sequences - self._held + count > most:
            raise ApiError(
                429,
                f"{self._load.sequences} sequences are being answered, at most {most} at once; try again",
                code="rate_limit_exceeded",
                headers={"retry-after": str(RETRY_AFTER_S)},
            )
        self._load.sequences += count - self._held
        self._held = count

    def release(self) -> None:
        """Give the room back."""
        self._load.sequences -= self._held
        self._held = 0


def draining() -> ApiError:
    """No new requests: the server was asked to end."""
    return ApiError(503, "the server is shutting down", code="shutting_down", headers={"retry-after": "5"})


async def read_body(receive: Receive, headers: dict[bytes, bytes], most: int) -> bytes:
    """The body of a request, never more of it than `most` bytes. Raises ApiError 413, 408, and ClientGone."""
    declared = headers.get(b"content-length", b"0")
    if not declared.isdigit() or len(declared) > 18 or int(declared) > most:
        raise _too_large(most)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                body += message.get("body", b"")
                if len(body) > most:
                    raise _too_large(most)
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise ApiError(408, f"body: not all of it came in {BODY_TIMEOUT_S:.0f} s", headers=NO_RETRY) from None


class ClientGone(Exception):
    """Nobody waits for the answer."""


async def while_wanted(work: Coroutine[Any, Any, T], receive: Receive, load: Load) -> T:
    """The result of `work`; cancelled when the client is gone (ClientGone), after the time limit (ApiError 408), or when the
    server must end (ApiError 503). The body of the request has been read."""
    task = asyncio.ensure_future(work)
    gone, cut = asyncio.ensure_future(_disconnected(receive)), asyncio.ensure_future(load.cut.wait())
    others: list[asyncio.Future[Any]] = [gone, cut]
    try:
        await asyncio.wait([task, *others], timeout=load.limits.timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ClientGone
        if cut.done():
            raise draining()
        raise ApiError(
            408,
            f"no answer within {load.limits.timeout_s:g} s, the limit of this server",
            code="timeout",
            headers=NO_RETRY,
        )
    finally:
        for future in [task, *others]:
            future.cancel()
        await asyncio.gather(task, *others, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _too_large(most: int) -> ApiError:
    return wrong(None, f"body: more than {most} bytes; send less", status=413, code="body_too_large")
