"""Remote files are complete or an error: retries, truncated answers, servers without ranges, secrets, forks."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pipeline.errors import UserError
from pipeline.io import remote, urls
from pipeline.io.remote import open_retrying, read_range, size_of

DATA = random.Random(0).randbytes(300_000)


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PIECE", 1 << 16)
    monkeypatch.setenv("PLDR_RETRY_SECONDS", "0.01")


def serve(handler: Any) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def plain_server(tmp_path: Path) -> Iterator[str]:
    """Python's own server, which does not support ranges."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    (tmp_path / "data.bin").write_bytes(DATA)
    yield from serve(partial(Quiet, directory=str(tmp_path)))


class Flaky(BaseHTTPRequestHandler):
    """The first request of all gets a 503, the next two responses end after 70,000 bytes; URLs with `secret` a 403."""

    protocol_version = "HTTP/1.1"
    ranges = True
    length = True
    asked: list[str | None] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append(self.headers.get("Range"))
        if "secret" in self.path or len(self.asked) == 1:
            self.send_error(403 if "secret" in self.path else 503)
            return
        wanted = self.headers.get("Range") if self.ranges else None
        start = int(wanted.split("=")[1].split("-")[0]) if wanted else 0
        self.send_response(206 if wanted else 200)
        if self.length:
            self.send_header("Content-Length", str(len(DATA) - start))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(DATA) - 1}/{len(DATA)}")
        self.end_headers()
        self.wfile.write(DATA[start : start + 70_000] if len(self.asked) <= 3 else DATA[start:])
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def flaky_server() -> Iterator[str]:
    Flaky.asked.clear()
    yield from serve(Flaky)


def test_s3_is_read_despite_errors_and_truncated_responses(faulty_s3: Any) -> None:
    url = faulty_s3.put("deep/data.bin", DATA)
    assert size_of(url) == len(DATA)
    faulty_s3.fail_next(3)
    faulty_s3.truncate_next(2)
    with open_retrying(url, size=len(DATA)) as stream:
        assert hashlib.sha256(stream.read()).digest() == hashlib.sha256(DATA).digest()
    assert not faulty_s3.failures["GET"] and faulty_s3.truncations == 0  # all faults occurred
    with open_retrying(url, start=299_990) as stream:
        assert stream.read() == DATA[299_990:]
    with open_retrying(url, start=len(DATA)) as stream:
        assert stream.read() == b""
    faulty_s3.fail_next(1)
    faulty_s3.truncate_next(1)
    assert read_range(url, 1000, 200_000) == DATA[1000:200_000] and read_range(url, 7, 7) == b""
    faulty_s3.truncate_next(1, announce=False)  # a response that is too short but looks complete
    assert read_range(url, 1000, 200_000) == DATA[1000:200_000] and faulty_s3.truncations == 0


def test_a_persistent_failure_names_the_url(faulty_s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url = faulty_s3.put("a.bin", DATA)
    monkeypatch.setenv("PLDR_RETRIES", "2")
    faulty_s3.fail_next(100)
    with pytest.raises(UserError, match=f"{url}: cannot be read, 3 attempts failed"):
        read_range(url, 0, 10)
    faulty_s3.heal()
    with pytest.raises(FileNotFoundError, match="absent"):
        open_retrying(faulty_s3.url("absent")).read()
    with pytest.raises(FileNotFoundError, match="absent"):
        size_of(faulty_s3.url("absent"))
    faulty_s3.fail_next(1, status=403)
    with pytest.raises(UserError, match="cannot be read .*fix the address or the credentials"):
        read_range(url, 0, 10)


def test_a_file_that_changes_meanwhile_is_noticed(faulty_s3: Any) -> None:
    url = faulty_s3.put("a.bin", DATA)
    with pytest.raises(UserError, match="300000 bytes, 300001 expected"):
        open_retrying(url, size=300_001).read()
    with open_retrying(url) as stream:
        assert stream.read(10) == DATA[:10]
        faulty_s3.put("a.bin", DATA[::-1])  # as long as before
        with pytest.raises(UserError, match="changed while it was read"):
            stream.read()


@pytest.mark.parametrize("ranges", [True, False])
def test_http_continues_where_it_broke_off(flaky_server: str, ranges: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flaky, "ranges", ranges)
    with open_retrying(f"{flaky_server}/data.bin", size=len(DATA), start=5) as stream:
        assert stream.read() == DATA[5:]
    assert len(Flaky.asked) == 4


def test_http_without_a_length_is_read_to_the_size_that_was_listed(
    flaky_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Flaky, "ranges", False)
    monkeypatch.setattr(Flaky, "length", False)  # the end of the connection is the end of the file, also where it broke
    monkeypatch.setattr(Flaky, "protocol_version", "HTTP/1.0")
    with open_retrying(f"{flaky_server}/data.bin", size=len(DATA)) as stream:
        assert stream.read() == DATA
    assert len(Flaky.asked) == 4


def test_http_servers_without_ranges(plain_server: str) -> None:
    url = f"{plain_server}/data.bin"
    assert size_of(url) == len(DATA)
    with open_retrying(url, start=123_456) as stream:
        assert stream.read() == DATA[123_456:]
    assert read_range(url, 100, 200) == DATA[100:200]
    with pytest.raises(FileNotFoundError):
        open_retrying(f"{plain_server}/absent").read()


def test_secrets_of_a_signed_url_are_not_shown(flaky_server: str, caplog: pytest.LogCaptureFixture) -> None:
    url = f"{flaky_server}/secret.bin?X-Signature=HUSH&x=1#frag"
    assert urls.public_url(url) == f"{flaky_server}/secret.bin"
    with pytest.raises(UserError, match="secret.bin: cannot be read") as raised:
        open_retrying(url).read()
    assert "HUSH" not in str(raised.value)
    with pytest.raises(UserError, match="cannot be read, 2 attempts") as raised, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLDR_RETRIES", "1")
        open_retrying("http://127.0.0.1:1/x?X-Signature=HUSH").read()
    assert "HUSH" not in str(raised.value) + caplog.text and "attempt 2 of 2" in caplog.text


def test_a_missing_package_or_protocol_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, package in (("gs", "gcsfs"), ("s3", "s3fs")):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, name, raising=False)
        with pytest.raises(UserError, match=f"pip install {package}") as raised:
            remote.filesystem_of(f"{name}://bucket/x")
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="nosuch"):
        remote.filesystem_of("nosuch://x")


def test_a_forked_child_reads_with_filesystems_of_its_own(faulty_s3: Any) -> None:
    url = faulty_s3.put("a.bin", DATA)
    assert read_range(url, 0, 10) == DATA[:10]
    child = os.fork()
    if child == 0:  # no pytest in here
        ok = read_range(url, 10, 20) == DATA[10:20]
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0 and read_range(url, 20, 30) == DATA[20:30]


def test_bugs_are_not_retried() -> None:
    calls = []

    def broken() -> None:
        calls.append(1)
        raise TypeError("ours")

    with pytest.raises(TypeError):
        remote.retrying("s3://x", broken)
    assert len(calls) == 1


class Recorder(BaseHTTPRequestHandler):
    """Answers every path with its own bytes; /to sends on to a signed address."""

    asked: ClassVar[list[str]] = []
    sent_to = "/b%2fc?sig=%2b%41~%7e&x='q'&y=[1]"

    def do_GET(self) -> None:
        self.asked.append(self.path)
        body = self.path.encode()
        self.send_response(302 if self.path == "/to" else 200)
        self.send_header("Location" if self.path == "/to" else "X-None", self.sent_to)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("given", "requested"),
    [
        (odd, odd)
        for odd in (
            "/a%2fb%2Fc%7Ed%41?sig=%2b%3d+a==&t=2026-11-28T00:00:00Z&x=/%2F",
            "/100%.txt?q='a'&b=(1)*!",
            "/a::b?c=d::e",
            "/a/../b//c?*[0]",
        )
    ]
    + [("/a b/ü", "/a%20b/%C3%BC"), ("/to", Recorder.sent_to)],
)
def test_a_url_is_requested_byte_for_byte(given: str, requested: str) -> None:
    Recorder.asked.clear()
    with contextlib.contextmanager(serve)(Recorder) as url, remote.open_retrying(url + given) as stream:
        assert stream.read().decode() == requested
        assert Recorder.asked[-1] == requested
        assert remote.size_of(url + given) == len(requested)
        assert set(Recorder.asked) <= {given, requested}
