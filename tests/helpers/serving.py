"""Servers for tests: an engine that decodes when it is told to, requests without a socket, and `pldr serve` as a process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.inference.serve.engine import DecodeRequest, EngineError, EngineLoad, Token
from pipeline.network import free_port

JSON = {"content-type": "application/json"}


class HeldEngine:
    """Gives the tokens 4, 5, 6, … one by one; waits for `go` before each. What a server does meanwhile can be looked at."""

    name = "held"

    def __init__(self, *, go: bool = False, fails: str | None = None) -> None:
        self.go = asyncio.Event()
        if go:
            self.go.set()
        self.fails, self.ready = fails, True
        self.running, self.begun = 0, 0
        self.pause_at: int | None = None  # tokens of a sequence after which `go` is taken back

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    def problem(self) -> str | None:
        return None if self.ready else "the model is being loaded"

    def load(self) -> EngineLoad:
        return EngineLoad(running=self.running)

    async def decode(self, request: DecodeRequest) -> AsyncGenerator[list[Token], None]:
        self.running, self.begun = self.running + 1, self.begun + 1
        try:
            for count in range(request.max_tokens):
                if count == self.pause_at:
                    self.go.clear()
                await self.go.wait()
                if self.fails is not None:
                    raise EngineError(self.fails)
                yield [Token(4 + count % 40, -1.0 if request.num_top is not None else None)]
        finally:
            self.running -= 1

    async def score(self, ids: list[int], num_top: int) -> list[Token]:
        return [Token(ids[0]), *(Token(id, -1.0) for id in ids[1:])]


@dataclass
class Exchange:
    """A request to an ASGI application, and what has come back so far."""

    body: bytes
    headers: dict[str, str] = field(default_factory=lambda: dict(JSON))
    path: str = "/v1/completions"
    method: str = "POST"
    chunk: int = 0  # bytes at a time; 0: all at once
    gone: asyncio.Event = field(default_factory=asyncio.Event)  # the client has gone away
    reads: asyncio.Event | None = None  # the client takes what is sent only while this is set
    status: int | None = None
    answer_headers: dict[str, str] = field(default_factory=dict)
    answer: bytes = b""
    ended: bool = False

    @property
    def json(self) -> Any:
        return json.loads(self.answer)

    @property
    def events(self) -> list[Any]:
        """The events of a stream, without [DONE]."""
        found = [event.removeprefix(b"data: ") for event in self.answer.split(b"\n\n") if event]
        return [json.loads(event) for event in found if event != b"[DONE]"]

    async def run(self, app: Any) -> Exchange:
        size = self.chunk or max(len(self.body), 1)
        parts = [self.body[start : start + size] for start in range(0, len(self.body), size)] or [b""]

        async def receive() -> dict[str, Any]:
            if parts:
                part = parts.pop(0)
                return {"type": "http.request", "body": part, "more_body": bool(parts)}
            await self.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if self.reads is not None:
                await self.reads.wait()
            if message["type"] == "http.response.start":
                self.status = message["status"]
                self.answer_headers = {key.decode(): value.decode() for key, value in message["headers"]}
            else:
                self.answer += message.get("body", b"")
                self.ended = not message.get("more_body", False)

        headers = [(key.encode(), value.encode()) for key, value in self.headers.items()]
        if not self.chunk and "content-length" not in self.headers:
            headers.append((b"content-length", str(len(self.body)).encode()))
        scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
                 "method": self.method, "scheme": "http", "path": self.path, "raw_path": self.path.encode(),
                 "query_string": b"", "root_path": "", "headers": headers, "client": ("127.0.0.1", 1),
                 "server": ("127.0.0.1", 2), "state": {}}  # fmt: skip
        await app(scope, receive, send)
        return self


def exchange(data: Any = None, **more: Any) -> Exchange:
    """A request with this JSON."""
    return Exchange(json.dumps({"prompt": [5, 6], **(data or {})}).encode(), **more)


async def until(condition: Any, *, timeout: float = 60.0) -> None:
    """Wait until it holds."""
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.01)


class Served:
    """`pldr serve MODEL` as a process."""

    def __init__(self, model: Path, log: Path, *options: str, port: int | None = None, **variables: str) -> None:
        self.port, self.log = port or free_port(), log
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "launch.cli", "serve", str(model), "--port", str(self.port), *options]
        with log.open("ab") as stream:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
            self.process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)

    def wait_ready(self, *, timeout: float = 240.0) -> Served:
        end = time.monotonic() + timeout
        while self.health()[0] != 200:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)
        return self

    def health(self) -> tuple[int, Any]:
        """Status and answer of /health; 0 if nothing listens."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)
        except OSError:
            return 0, None

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.signal()
        return self.process.wait(timeout=120)


@contextlib.contextmanager
def serving(model: Path, log: Path, *options: str, **variables: str) -> Iterator[Served]:
    """A server that is ready; it is ended with the block."""
    served = Served(model, log, *options, **variables)
    try:
        yield served.wait_ready()
    finally:
        if served.process.poll() is None:
            served.process.kill()
        served.process.wait()
