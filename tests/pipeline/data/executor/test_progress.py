"""Progress: what workers write adds up, and a terminal shows it with rate and time left."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from pipeline.data.executor import progress
from pipeline.data.executor.progress import Bar, Counter, Counts, advance, counting, expected_bytes, forget


def test_counts_add_up_over_tasks_and_starts(tmp_path: Path) -> None:
    with counting(tmp_path, 0):
        advance(2, 100)
        advance(1, 50)
    with pytest.raises(KeyError), counting(tmp_path, 3):
        advance(1, 10)
        raise KeyError
    counter = Counter(tmp_path)
    assert sorted(counter.read(), key=lambda c: c.bytes) == [Counts(1, 10, False), Counts(3, 150, True)]
    forget(tmp_path, [3])
    assert counter.read() == [Counts(3, 150, True)]
    (tmp_path / progress.FOLDER / "00005.json").write_text("{half")
    assert counter.read() == [Counts(3, 150, True)]
    advance(7, 7)  # of no task
    assert counter.read() == [Counts(3, 150, True)]


def test_a_disk_that_refuses_counts_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / progress.FOLDER).write_text("a file where the folder should be")
    with counting(tmp_path, 0):
        advance(1, 1)


def test_the_expected_size_follows_the_tasks_that_are_done() -> None:
    assert expected_bytes([], tasks=4, total_bytes=400) == 400
    done = [Counts(1, 300, True)] * 3
    assert expected_bytes(done, tasks=4, total_bytes=400) == 900 + 250  # (100 + 900) / 4 for the last one
    assert expected_bytes([Counts(1, 700, False)], tasks=1, total_bytes=400) == 700


def test_a_terminal_shows_a_bar_with_rate_and_time_left(tmp_path: Path, repository: Path) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    command = [sys.executable, "-m", "tests.pipeline.data.executor.show_progress", str(tmp_path)]
    process = subprocess.Popen(command, stderr=theirs, cwd=repository)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert process.wait() == 0
    text = shown.decode()
    assert "shard: clean" in text and "MB/s" in text and " left" in text and "%" in text
    assert "documents" in text and "1 of 2 tasks" in text.splitlines()[-1]


def test_elsewhere_it_prints_a_line_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.05)
    with Bar(tmp_path, "tokenize", tasks=1, total_bytes=None):
        with counting(tmp_path, 0):
            advance(3, 5_000_000)
        time.sleep(0.3)
    assert "100% of tokenize: 1 of 1 tasks, 3 documents, 5.0 MB" in capsys.readouterr().err
