"""Reading remote files: complete, or an error.

Networks fail in two ways that look like data: a connection that ends early, and a response that is an error. So every read here
knows its number of bytes; a failed read is retried from where it stopped, with exponential backoff, and a persistent failure is
a UserError with the URL. s3fs, gcsfs and aiohttp each have their own exceptions for this (aiohttp's are not even subclasses of
OSError); only `_is_transient` knows them.

Filesystems are fsspec's instances, one per process: a fork gets new ones.

Environment variables: PLDR_RETRIES (default 5) more attempts, the first after about PLDR_RETRY_SECONDS (0.5).
"""

from __future__ import annotations

import io
import logging
import os
import random
import time
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import quote

import fsspec

from pipeline.errors import UserError, first_line
from pipeline.io.limits import limit_of
from pipeline.io.urls import check_url, is_http, is_local, public_url, without_secrets

PIECE = 8 << 20  # bytes per request
LONGEST_WAIT = 30.0  # seconds
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
LIBRARIES = (
    "aiohttp",
    "aiobotocore",
    "botocore",
    "gcsfs",
    "google",
    "requests",
    "urllib3",
    "s3fs",
)  # of network errors
VERSION_KEYS = ("size", "ETag", "etag", "generation", "md5Hash")  # of fsspec's info: they differ if the content does
log = logging.getLogger(__name__)
Result = TypeVar("Result")


def filesystem_of(url: str) -> tuple[Any, str]:
    """(fsspec filesystem, path in it), without cached listings, because other processes write too.

    Raises UserError for an unknown protocol or a missing package.
    """
    check_url(url)
    protocol = url.partition("://")[0]
    try:
        if is_http(url):
            filesystem, path = _http_filesystem(protocol.lower()), as_given(url)
        else:
            filesystem, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = PACKAGES.get(protocol)
        fix = f"pip install {package}" if package else first_line(error)
        raise UserError(f"{public_url(url)}: {protocol}:// needs a package that is not installed; {fix}") from None
    except ValueError as error:
        raise UserError(f"{public_url(url)}: {without_secrets(first_line(error))}; fix the URL") from None
    filesystem.invalidate_cache()
    return filesystem, path


def _http_filesystem(protocol: str) -> Any:
    """A signature is of the bytes of a URL: they are not decoded and quoted anew, neither here nor where a server redirects to.
    What else the user has set for fsspec's http stays."""
    settings = {"requote_redirect_url": False, **fsspec.config.conf.get(protocol, {}).get("client_kwargs", {})}
    return fsspec.filesystem(protocol, encoded=True, client_kwargs=settings)


def as_given(url: str) -> str:
    """An http URL as it is requested: byte for byte, but for what no request can hold (blanks, other alphabets)."""
    return quote(url, safe="".join(map(chr, range(0x21, 0x7F))))


def open_retrying(url: str, *, size: int | None = None, start: int = 0) -> BinaryIO:
    """A file for sequential reading from byte `start`, with retries if it is remote.

    `size`: the expected size of the file, if known. Opening a remote file does nothing yet; reading raises FileNotFoundError,
    or UserError naming the URL if retries do not help or the file has changed.
    """
    if is_local(url):
        stream = open(url.removeprefix("file://"), "rb")  # noqa: SIM115  # the caller closes it
        stream.seek(start)
        return stream
    if is_http(url):
        return cast(BinaryIO, io.BufferedReader(_HttpStream(url, start, None, size), 1 << 20))
    return cast(BinaryIO, io.BufferedReader(_Ranges(url, start, size), PIECE))


def read_range(url: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of a file, exactly. Raises FileNotFoundError, or UserError naming the URL."""
    if is_local(url):
        with open(url.removeprefix("file://"), "rb") as stream:
            stream.seek(start)
            data = stream.read(end - start)
        if len(data) != end - start:
            raise UserError(f"{url}: {len(data)} bytes at {start}, {end - start} expected: it was truncated")
        return data
    if is_http(url):
        with io.BufferedReader(_HttpStream(url, start, end, None), 1 << 20) as remote:
            return remote.read(end - start)
    filesystem, path = filesystem_of(url)

    def read() -> bytes:
        data: bytes = filesystem.cat_file(path, start=start, end=end)
        if len(data) != end - start:
            raise EOFError(f"{len(data)} bytes at {start}, {end - start} expected")
        return data

    return retrying(url, read) if end > start else b""


def size_of(url: str) -> int:
    """Bytes of a file. Raises FileNotFoundError, or UserError naming the URL, also if a server does not report it."""
    if is_local(url):
        return os.stat(url.removeprefix("file://")).st_size
    filesystem, path = filesystem_of(url)
    size = retrying(url, lambda: filesystem.info(path)).get("size")
    if size is None:
        raise UserError(f"{public_url(url)}: the server does not report its size; copy it to a disk or object store")
    return int(size)


def version_of(url: str) -> dict[str, Any]:
    """What identifies the content of a remote file without reading it: its size, and the ETag, generation and hash if the
    store has them. Raises FileNotFoundError, or UserError naming the URL."""
    filesystem, path = filesystem_of(url)
    info = retrying(url, lambda: filesystem.info(path))
    return {key: info[key] for key in VERSION_KEYS if info.get(key) is not None}


def retrying(url: str, action: Callable[[], Result], *, what: str = "read") -> Result:
    """The result of `action`, which is retried after transient errors.

    Raises FileNotFoundError, UserError ("cannot be {what}"), and unchanged any exception that is not about files or networks.
    """
    retries = int(os.environ.get("PLDR_RETRIES", "5"))
    wait = float(os.environ.get("PLDR_RETRY_SECONDS", "0.5"))
    for attempt in range(retries + 1):
        try:
            return action()
        except Exception as error:
            problem = _cause(error)
            if isinstance(problem, FileNotFoundError) or getattr(problem, "status", None) in (404, 410):
                raise FileNotFoundError(f"{public_url(url)}: no such file") from None
            transient = _is_transient(problem)
            if transient is None:
                raise
            if limit := limit_of(problem):
                raise UserError(f"{public_url(url)}: cannot be {what}: {limit}") from None
            why = without_secrets(first_line(problem))
            if not transient:
                raise UserError(
                    f"{public_url(url)}: cannot be {what} ({why}); fix the address or the credentials in the environment"
                ) from None
            if attempt == retries:
                raise UserError(
                    f"{public_url(url)}: cannot be {what}, {retries + 1} attempts failed (last: {why}); check the "
                    "network and the store and start again, finished work is kept"
                ) from None
            log.warning("%s: %s; retrying, attempt %d of %d", public_url(url), why, attempt + 2, retries + 1)
            time.sleep(
                min(wait * 2**attempt, LONGEST_WAIT) * random.uniform(0.5, 1)
            )  # jitter: many workers fail at once
    raise AssertionError("the last attempt returns or raises")


def _cause(error: Exception) -> Exception:
    """The actual error: fsspec's http reports every failure as a missing file, with the actual error as its cause."""
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        return _cause(error.__cause__)
    return error


def _is_transient(error: Exception) -> bool | None:
    """Whether an error may not occur again at the next attempt; None if it is not about files or networks."""
    status = getattr(error, "status", getattr(error, "code", None))
    if isinstance(status, int) and 400 <= status < 500:
        return status in (408, 425, 429)
    if isinstance(error, (PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError)):
        return False
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "InvalidURL", "NonHttpUrlClientError"):
        return False
    if isinstance(error, (OSError, EOFError)) or type(error).__module__.split(".")[0] in LIBRARIES:
        return True
    return None


class _Ranges(io.RawIOBase):
    """A file of an object store from byte `start`, read sequentially, one request per piece."""

    def __init__(self, url: str, start: int, size: int | None) -> None:
        self._url = url
        self._filesystem, self._path = filesystem_of(url)
        self._position = start
        self._size = size
        self._version: dict[str, Any] | None = None
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._version is None:
            self._version = self._current_version()
            self._size = _same_size(self._url, self._size, self._version["size"])
        assert self._size is not None
        count = min(len(buffer), self._size - self._position)
        if count <= 0:
            if not self._ended and self._current_version() != self._version:
                raise UserError(f"{public_url(self._url)}: changed while it was read; start again")
            self._ended = True
            return 0
        data = read_range(self._url, self._position, self._position + count)
        buffer[:count] = data
        self._position += count
        return count

    def _current_version(self) -> dict[str, Any]:
        return version_of(self._url)


class _HttpStream(io.RawIOBase):
    """Bytes [start, end) of a web server's file, read sequentially over one connection; a new one if that breaks."""

    def __init__(self, url: str, start: int, end: int | None, size: int | None) -> None:
        self._url = url
        self._filesystem, self._path = filesystem_of(url)
        self._position = start
        self._end = end
        self._size = size
        self._version: tuple[int | None, str | None] | None = None
        self._stream: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = retrying(self._url, lambda: self._read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._drop()
        super().close()

    def _read(self, count: int) -> bytes:
        try:
            if self._stream is None and (self._end is None or self._position < self._end):
                self._stream = self._open()
            end = self._size if self._end is None else self._end
            if end is not None:
                count = min(count, end - self._position)
            data: bytes = self._stream.read(count) if count > 0 else b""
            if not data and end is not None and self._position < end:
                raise EOFError(f"ends at byte {self._position} of {end}")
        except BaseException:
            self._drop()
            raise
        self._position += len(data)
        return data

    def _drop(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def _open(self) -> Any:
        """The response from the current position. A server without ranges sends the entire file: its beginning is skipped."""
        import aiohttp

        headers = {"Accept-Encoding": "identity"}
        if self._position or self._end is not None:
            headers["Range"] = f"bytes={self._position}-" + (str(self._end - 1) if self._end is not None else "")
        stream = self._filesystem.open(
            self._path,
            "rb",
            block_size=0,  # streamed; then the size is not used, it only avoids a HEAD request
            size=1,
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60),
        )
        try:
            stream.r.raise_for_status()
            self._check_version(stream.r.headers)
            if stream.r.status != 206:
                self._skip_to_position(stream)
        except BaseException:
            stream.close()
            raise
        return stream

    def _check_version(self, headers: Any) -> None:
        total = headers.get("Content-Range", "").rpartition("/")[2] or headers.get("Content-Length", "")
        found = (int(total) if total.isdigit() else None, headers.get("ETag"))
        if self._version not in (None, found):
            raise UserError(f"{public_url(self._url)}: changed while it was read; start again")
        self._version = found
        self._size = _same_size(self._url, self._size, found[0])

    def _skip_to_position(self, stream: Any) -> None:
        left = self._position
        while left > 0:
            data = stream.read(min(left, 1 << 20))
            if not data:
                raise EOFError(f"ends at byte {self._position - left}")
            left -= len(data)


def _same_size(url: str, expected: int | None, found: int | None) -> int | None:
    """The size, after checking that the expected and the actual one agree. Either may be unknown."""
    if expected is not None and found is not None and expected != found:
        raise UserError(
            f"{public_url(url)}: {found} bytes, {expected} expected: it changed or was truncated; start again"
        )
    return expected if found is None else found
