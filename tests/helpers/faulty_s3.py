"""An S3 that fails on command: moto's server in its own process, behind a proxy that injects faults.

`s3` is a new bucket for each test; `faulty_s3` is the same one, for tests that inject faults. Both set
the environment (endpoint, dummy credentials, one attempt in botocore, short waits), so that worker processes see it too.
"""

from __future__ import annotations

import http.client
import importlib.util
import itertools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
import pytest

ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>injected</Message></Error>"
CODES = {403: "AccessDenied", 404: "NoSuchKey", 503: "SlowDown"}  # others: InternalError
HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive", "date", "server"}
BUCKETS = itertools.count()


class FaultyS3:
    """A bucket behind the proxy. Faults apply to GETs of objects; with method="PUT" every PUT and POST, with method="LIST" the
    listings."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.bucket = ""
        self.lock = threading.Lock()
        self.failures: dict[str, list[int]] = {"GET": [], "PUT": [], "LIST": []}
        self.truncations = 0
        self.keep, self.announce = 0.5, True
        self.requests: list[tuple[str, str, str | None]] = []  # method, /bucket/key, Range header

    def url(self, key: str = "") -> str:
        """`s3://BUCKET/key`."""
        return f"s3://{self.bucket}/{key}"

    def put(self, key: str, data: bytes) -> str:
        """Store an object, bypassing the proxy. Returns its URL."""
        status, answer = self._direct("PUT", f"/{self.bucket}/{key}", data)
        assert status == 200, answer
        return self.url(key)

    def read(self, key: str) -> bytes | None:
        """An object, bypassing the proxy; None if it does not exist."""
        status, answer = self._direct("GET", f"/{self.bucket}/{key}")
        return answer if status == 200 else None

    def keys(self) -> list[str]:
        """Every object of the bucket, bypassing the proxy."""
        _, answer = self._direct("GET", f"/{self.bucket}?list-type=2")
        return re.findall(r"<Key>(.*?)</Key>", answer.decode())

    def fail_next(self, count: int, status: int = 500, method: str = "GET") -> None:
        """The next requests of the method get this status and do not reach the storage."""
        with self.lock:
            self.failures[method] += [status] * count

    def truncate_next(self, count: int, keep: float = 0.5, announce: bool = True) -> None:
        """The next GETs of objects announce the full length, send this share of it, and hang up; without `announce` the
        response looks complete."""
        with self.lock:
            self.truncations, self.keep, self.announce = count, keep, announce

    def heal(self) -> None:
        """Remove all pending faults."""
        with self.lock:
            self.failures = {"GET": [], "PUT": [], "LIST": []}
            self.truncations = 0

    def _direct(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.backend, timeout=20)
        try:
            connection.request(method, path, body, {"Authorization": "AWS test:test"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


def _handler(state: FaultyS3) -> type[BaseHTTPRequestHandler]:
    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = urlsplit(self.path)
            is_object = path.path.strip("/").count("/") >= 1
            kind = "PUT" if self.command in ("PUT", "POST") else self.command
            if kind == "GET" and not is_object:
                kind = "LIST"
            with state.lock:
                state.requests.append((self.command, path.path, self.headers.get("Range")))
                status = state.failures[kind].pop(0) if state.failures.get(kind) else None
                cut = status is None and kind == "GET" and state.truncations > 0
                state.truncations -= cut
            if status is not None:
                error = ERROR.format(CODES.get(status, "InternalError")).encode()
                self.answer(status, {"Content-Type": "application/xml"}, error, len(error))
                return
            connection = http.client.HTTPConnection(state.backend, timeout=60)
            try:
                headers = {k: v for k, v in self.headers.items() if k.lower() not in HOP_BY_HOP - {"date"}}
                connection.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
                got = connection.getresponse()
                data = got.read()
                length = int(got.headers.get("Content-Length") or len(data)) if self.command == "HEAD" else len(data)
                kept = {k: v for k, v in got.headers.items() if k.lower() not in HOP_BY_HOP}
                if cut:
                    data = data[: int(len(data) * state.keep)]
                    length = length if state.announce else len(data)
                self.answer(got.status, kept, data, length)
                self.close_connection = self.close_connection or cut
            finally:
                connection.close()

        def answer(self, status: int, headers: dict[str, str], body: bytes, length: int) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Proxy


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FaultyS3, str]]:
    """The one server and proxy of a test session: (the proxy's state, its URL)."""
    for package in ("moto", "s3fs"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; pip install 'pldr[dev]'")
    log = tmp_path_factory.mktemp("moto") / "log"
    with log.open("wb") as stream:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        server = subprocess.Popen(command, stdout=stream, stderr=stream, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    state = FaultyS3(_address(server, log))
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), _handler(state))
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True).start()
    yield state, f"http://127.0.0.1:{proxy.server_port}"
    proxy.shutdown()
    proxy.server_close()
    server.terminate()
    server.wait(10)


def _address(server: subprocess.Popen[bytes], log: Path) -> str:
    """Where the server listens: it chooses a free port and logs it."""
    waiter = threading.Event()
    for _ in range(600):
        if found := re.search(r"Running on http://(127\.0\.0\.1:\d+)", log.read_text()):
            return found[1]
        assert server.poll() is None, f"moto died: {log.read_text()[-500:]}"
        waiter.wait(0.05)
    raise AssertionError(f"moto does not start: {log.read_text()[-500:]}")


@pytest.fixture
def faulty_s3(s3_server: tuple[FaultyS3, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """A new, empty bucket whose next requests can be made to fail: see FaultyS3."""
    state, endpoint = s3_server
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    settings = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
        "PLDR_RETRY_SECONDS": "0.01",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # an earlier test's listings
    state.heal()
    state.bucket = f"test-{next(BUCKETS)}"
    status, answer = state._direct("PUT", f"/{state.bucket}")
    assert status == 200, answer
    state.requests.clear()
    yield state
    state.heal()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def s3(faulty_s3: FaultyS3) -> FaultyS3:
    """A new, empty bucket."""
    return faulty_s3
