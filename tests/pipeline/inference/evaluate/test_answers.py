"""Answers survive a kill, and are never taken for others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.inference.evaluate.answers import AnswersFile

ONE, OTHER = [([1, 2], [3])], [([1, 2], [4])]


def test_what_was_kept_is_found_by_the_same_asker_only(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    with AnswersFile(file, ["a", "b"]) as answers:
        answers.of("a").keep(ONE, [(-1.25, True)])
    with AnswersFile(file, ["a", "b"]) as answers:
        mine = answers.of("a")
        assert mine.get(ONE) == [(-1.25, True)] and mine.taken == 1
        assert mine.get(OTHER) is None and answers.of("b").get(ONE) is None


@pytest.mark.parametrize(
    "tail",
    [
        b'{"key": "x", "asker": "a", "ans',
        b"\x00\xff\n",
        b'{"asker": "a"}\n',
        b"3\n",
        b'{"key": "x", "asker": [], "answers": []}\n',
    ],
)
def test_a_line_that_was_cut_or_damaged_is_dropped(tmp_path: Path, tail: bytes) -> None:
    file = tmp_path / "answers.jsonl"
    with AnswersFile(file, ["a"]) as answers:
        answers.of("a").keep(ONE, [(-1.0, False)])
    whole = file.read_bytes()
    file.write_bytes(whole + tail)
    with AnswersFile(file, ["a"]) as answers:
        assert answers.of("a").get(ONE) == [(-1.0, False)]
        answers.of("a").keep(OTHER, [(-2.0, True)])
    assert file.read_bytes().startswith(whole) and file.read_bytes().count(b"\n") == 2


def test_lines_of_others_leave_the_file(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    with AnswersFile(file, ["old"]) as answers:
        answers.of("old").keep(ONE, [(-1.0, False)])
    with AnswersFile(file, ["new"]) as answers:
        assert answers.of("new").get(ONE) is None
    assert file.read_bytes() == b""


def test_two_processes_do_not_write_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from pipeline.inference.evaluate.answers import AnswersFile\n"
        "with AnswersFile(pathlib.Path(sys.argv[1]), ['a']):\n"
        "    print('holds', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "answers.jsonl")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"holds\n"
        with (
            pytest.raises(UserError, match=f"process {process.pid} evaluates into it"),
            AnswersFile(tmp_path / "answers.jsonl", ["a"]),
        ):
            pass
        process.communicate(b"")
    with AnswersFile(tmp_path / "answers.jsonl", ["a"]):
        pass
