"""What the command line prints: plain lines, and on a terminal status lines that the next one overwrites.

A reader may stand still (Ctrl-S, a full pipe) or be gone (`| head`, a closed terminal, a full disk), and nothing waits for
it: while a `Display` is open, sys.stdout and sys.stderr only put text into a queue, which a thread writes. What does not fit is
left out and counted. A result (`result`; all that a command prints whose work is its answer, such as `pldr runs`) always fits,
and is waited for at the end.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import select
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable
from errno import EDQUOT, ENOSPC
from typing import Any, TextIO, cast

LIMIT = 1000  # texts that wait, usually lines
CATCH_UP_S, HELD_UP_S = 0.2, 0.05  # a burst gives the thread that long to write, unless it has been held up this long
SLICE = 4096  # bytes at a time: what a pipe always takes whole
PATIENCE_S = 5.0  # at the end, with a reader that takes nothing
RESULT_S = 60.0  # the same while a result waits, from when it last took something
_live = False


class Display:
    """A context manager, for the standard streams of a command. On exit what waits is written.

    hurried: whether the process was asked to stop: it then waits PATIENCE_S at most for a reader that stands still.
    """

    def __init__(self, hurried: Callable[[], bool]) -> None:
        self._hurried = hurried
        self.whole = False  # whether all that goes to stdout is the result

    def __enter__(self) -> Display:
        self._before = sys.stdout, sys.stderr
        out, err = (open(os.devnull, "w") if stream is None else stream for stream in self._before)  # noqa: SIM115
        self._out = _Writer(out)
        self._err = self._out if _same(out, err) else _Writer(err)
        sys.stdout = cast(TextIO, _Stream(out, lambda text: self._out.put(text, kept=self.whole)))
        sys.stderr = cast(TextIO, _Stream(err, self._err.put))
        return self

    def __exit__(self, *_: object) -> None:
        _end_live()
        sys.stdout, sys.stderr = self._before
        for writer in (self._err, self._out):
            writer.close()
        for writer in (self._err, self._out):
            self._wait(writer)

    def result(self, line: str) -> None:
        """Print a line that must arrive."""
        _end_live()
        self._out.put(line + "\n", kept=True)

    def error(self, line: str) -> None:
        """Print a line to stderr that must arrive."""
        _end_live()
        self._err.put(line + "\n", kept=True)

    def _wait(self, writer: _Writer) -> None:
        began, moved, progress = time.monotonic(), writer.moved, writer.progress()
        while not writer.ended.wait(0.05):
            now, newer = time.monotonic(), writer.progress()
            if newer != progress:
                moved, progress = now, newer
            patience = PATIENCE_S if self._hurried() or not writer.holds_result else RESULT_S
            forever = self.whole and writer is self._out and not self._hurried()
            if not forever and now > max(began + PATIENCE_S, moved + patience):
                return


class _Stream:
    """Stands for sys.stdout or sys.stderr."""

    def __init__(self, stream: TextIO, put: Callable[[str], None]) -> None:
        self._stream, self._put = stream, put

    def write(self, text: str) -> int:
        self._put(text)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        self._put("".join(lines))

    def flush(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Writer:
    """A queue of texts and the thread that writes them to one stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._file = _file_of(stream)
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
        # Texts, and how many lines each stands for. SimpleQueue: a signal's handler may interrupt `put` and put, too.
        self._waiting: queue.SimpleQueue[tuple[str, int] | None] = queue.SimpleQueue()
        self._lock = threading.RLock()  # for the same reason
        self._lost, self._line_is_open, self._closed = 0, False, False
        self._gone = False
        self._written = 0
        self._writing_since: float | None = None
        self.moved = time.monotonic()  # when the reader last took something
        self.holds_result = False
        self.ended = threading.Event()
        threading.Thread(target=self._work, name="display", daemon=True).start()

    def put(self, text: str, *, kept: bool = False) -> None:
        """Queue a text to be written. One that is not `kept` is left out when too many wait; then so are those that follow,
        until half of them were written."""
        with self._lock:
            if self._closed:
                self._put_late(text)
                return
            self.holds_result |= kept
            if not kept and self._is_full():
                self._lost += text.count("\n")
                return
            self._tell_lost()
            self._waiting.put((text, text.count("\n")))
            self._line_is_open = not text.endswith("\n")

    def _is_full(self) -> bool:
        until = time.monotonic() + CATCH_UP_S
        while self._waiting.qsize() >= (LIMIT // 2 if self._lost else LIMIT):
            now, since = time.monotonic(), self._writing_since
            if now > until or (since is not None and now - since > HELD_UP_S):
                return True
            time.sleep(0.002)
        return False

    def close(self) -> None:
        """`ended` is set when all is written."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._tell_lost()
                self._waiting.put(None)

    def progress(self) -> tuple[int, int]:
        """Differs when the reader has taken something: bytes written, and bytes that it has not taken yet."""
        unread = 0
        for request in (termios.FIONREAD, termios.TIOCOUTQ):
            with contextlib.suppress(OSError):
                if self._file is not None:
                    unread += struct.unpack("i", fcntl.ioctl(self._file, request, bytes(4)))[0]
        return self._written, unread

    def _tell_lost(self) -> None:
        if self._lost:
            lines = "1 line was" if self._lost == 1 else f"{self._lost} lines were"
            self._waiting.put(("\n" * self._line_is_open + f"({lines} not shown)\n", self._lost))
            self._lost = 0

    def _put_late(self, text: str) -> None:
        """What is said after the end, by whoever kept the stream."""
        if self.ended.is_set() and not self._gone:
            with contextlib.suppress(OSError, ValueError):
                self._stream.write(text)
                self._stream.flush()

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            text, lines = item
            if self._gone:
                continue
            try:
                self._write(text)
            except OSError as error:
                self._gone = error.errno not in (ENOSPC, EDQUOT)  # a disk may have room again
                with self._lock:
                    self._lost += lines
            except ValueError:  # the stream was closed
                self._gone = True
        self.ended.set()

    def _write(self, text: str) -> None:
        if self._file is None:  # not a file: a test's
            self._stream.write(text)
            self._stream.flush()
            return
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        data = text.encode(encoding, "backslashreplace")
        for start in range(0, len(data), SLICE):
            self._write_part(self._file, data[start : start + SLICE])

    def _write_part(self, file: int, part: bytes) -> None:
        self._writing_since = time.monotonic()
        while part:
            try:
                count = os.write(file, part)  # not through the stream: its lock would be held when the process ends
            except BlockingIOError:
                select.select([], [file], [])
                continue
            part = part[count:]
            self._written += count
            self.moved = self._writing_since = time.monotonic()
        self._writing_since = None


def _file_of(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None


def _same(one: TextIO, other: TextIO) -> bool:
    """Whether both go to the same file: then their order is kept."""
    try:
        return one is other or os.path.samestat(os.fstat(one.fileno()), os.fstat(other.fileno()))
    except (OSError, ValueError, AttributeError):
        return False


def report(text: str) -> None:
    """Print a plain line."""
    _end_live()
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def report_live(text: str) -> None:
    """Print a line that the next one overwrites, on a terminal."""
    global _live
    try:
        width = os.get_terminal_size(sys.stdout.fileno()).columns
    except OSError:  # it is gone
        width = 200
    sys.stdout.write(f"\r\033[K{text[: width - 1]}")
    sys.stdout.flush()
    _live = True


def _end_live() -> None:
    """Begin a new line after one that would be overwritten."""
    global _live
    if _live:
        _live = False
        sys.stdout.write("\n")


def status_lines(*, json: bool) -> Callable[[str], None]:
    """For a training's status lines, indented: on a terminal each makes room for the next."""
    write = report_live if sys.stdout.isatty() and not json else report
    return lambda text: write(f"  {text}")
