"""launch/commands/terminal.py: readers that stand still, are slow, or are gone, as real pipes and files."""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
BEGIN = """
import logging, os, sys
from launch.commands import terminal
from launch.commands.terminal import Display, report
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def begun(code: str, *, stdout: int, stderr: int = subprocess.PIPE) -> subprocess.Popen:
    """A program with `code` in the block of an open display. Its stdin is a pipe."""
    body = "".join(f"    {line}\n" for line in code.strip().splitlines())
    program = f"{BEGIN}with Display(lambda: False) as display:\n{body}"
    command = [sys.executable, "-c", program]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stdout, stderr=stderr, env=ENVIRONMENT)


@pytest.fixture
def pipe():
    """A pipe that holds one page: its ends for reading and writing."""
    ends = os.pipe()
    fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, 4096)
    yield ends
    for end in ends:
        with contextlib.suppress(OSError):
            os.close(end)


def test_a_reader_that_stands_still_stops_nothing_and_is_told_what_it_missed(pipe):
    read, write = pipe
    code = (
        "for n in range(5000): report(f'line {n:060d}')\nos.write(2, b'went on')\nsys.stdin.readline()\nreport('last')"
    )
    program = begun(code, stdout=write)
    os.close(write)
    assert program.stderr.read(7) == b"went on"  # while nobody reads
    data = b""
    while data.count(b"\n") < 900:
        data += os.read(read, 4096)
    program.stdin.close()
    while part := os.read(read, 4096):
        data += part
    lines = data.decode().splitlines()
    shown = [int(line.split()[1]) for line in lines if line.startswith("line ")]
    assert program.wait() == 0 and shown == list(range(len(shown))) and len(shown) < 5000
    assert lines[len(shown) :] == [f"({5000 - len(shown)} lines were not shown)", "last"]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_program_ends_though_its_reader_stands_still(pipe, stream):
    """Also what is logged, and what is not told through `report`, goes the same way."""
    code = (
        "terminal.PATIENCE_S = 0.3\nlogging.basicConfig(stream=sys.stderr)\n"
        "for n in range(5000):\n    report('a line of output'); logging.error('a line of the log')\n"
        "print('told otherwise', file=sys.stderr)"
    )
    out = subprocess.DEVNULL if stream == "stderr" else pipe[1]
    err = subprocess.DEVNULL if stream == "stdout" else pipe[1]
    assert begun(code, stdout=out, stderr=err).wait(60) == 0


def test_a_result_is_not_cut_for_a_slow_reader(pipe):
    """It is longer than the pipe, behind lines that are, too; the reader pauses for longer than a line is waited for."""
    read, write = pipe
    code = "terminal.PATIENCE_S = 0.3\nfor n in range(500): report(f'{n:060d}')\ndisplay.result('x' * 400_000)"
    program = begun(code, stdout=write)
    os.close(write)
    data = os.read(read, 1)
    time.sleep(1)
    while part := os.read(read, 4096):
        data += part
    *lines, result = data.decode().splitlines()
    assert program.wait() == 0 and result == "x" * 400_000 and lines == [f"{n:060d}" for n in range(500)]


def test_what_a_command_answers_is_waited_for_and_never_cut(pipe):
    """Its reader is a pager."""
    read, write = pipe
    code = "display.whole = True\nterminal.PATIENCE_S = terminal.RESULT_S = 0.1\nfor n in range(5000): report(f'{n}')"
    program = begun(code, stdout=write)
    os.close(write)
    time.sleep(1)
    data = b""
    while part := os.read(read, 4096):
        data += part
    assert program.wait() == 0 and data.decode().split() == [f"{n}" for n in range(5000)]


def test_both_streams_to_one_file_keep_their_order(tmp_path):
    code = "for n in range(300): print(n); print(-n, file=sys.stderr)"
    with open(tmp_path / "out", "wb") as file:
        assert begun(code, stdout=file.fileno(), stderr=file.fileno()).wait() == 0
    assert (tmp_path / "out").read_text().split() == [str(m) for n in range(300) for m in (n, -n)]


def test_a_pipe_that_does_not_block_gets_everything(pipe):
    read, write = pipe
    os.set_blocking(write, False)
    program = begun("display.result('x' * 100_000)", stdout=write)
    os.close(write)
    data = b""
    while part := os.read(read, 4096):
        data += part
    assert program.wait() == 0 and data == b"x" * 100_000 + b"\n"


def test_a_disk_with_room_again_gets_the_count(tmp_path):
    code = (
        "display._out._write, write = lambda text: (_ for _ in ()).throw(OSError(28, 'full')), display._out._write\n"
        "import time\nreport('lost'); report('lost')\n"
        "while display._out._waiting.qsize() or display._out._lost < 2: time.sleep(0.01)\n"
        "display._out._write = write\nreport('shown')"
    )
    with open(tmp_path / "out", "wb") as file:
        assert begun(code, stdout=file.fileno()).wait() == 0
    assert (tmp_path / "out").read_text() == "(2 lines were not shown)\nshown\n"


@pytest.mark.parametrize("to", [">&-", ">/dev/full", "2>/dev/full >/dev/full", "2>&- >&-", "| true"])
def test_output_that_is_gone_is_silence(repository, tmp_path, to):
    """The exit code is the command's own, and there is no traceback."""
    config = repository / "configs" / "quickstart.yaml"
    line = f'cd "$0"; {{ "$1" -m launch.cli plan "$2" --devices 8 --json; echo $? > code; }} {to}'
    words = ["bash", "-c", line, str(tmp_path), sys.executable, str(config)]
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT)
    assert (tmp_path / "code").read_text() == "0\n" and done.stderr == ""


def test_a_closed_stdout_is_not_taken_by_a_file_of_ours(repository, tmp_path):
    """Else what a library prints would be written into it."""
    code = (
        "import os, sys; from launch.cli import main\n"
        "main(['plan', sys.argv[1], '--devices', '8']); os.write(1, b'x' * 9)\n"
        "print(os.readlink('/proc/self/fd/1'), file=sys.stderr)"
    )
    words = [
        "bash",
        "-c",
        'exec "$@" >&-',
        "-",
        sys.executable,
        "-c",
        code,
        str(repository / "configs/quickstart.yaml"),
    ]
    assert subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT).stderr == "/dev/null\n"


def test_names_that_are_no_text_are_printed(tmp_path):
    """Of files, say: what stdout cannot encode is escaped."""
    code = 'display.result(\'{"name": "\\udcff"}\')'
    with open(tmp_path / "out", "wb") as file:
        assert begun(code, stdout=file.fileno()).wait() == 0
    assert json.loads((tmp_path / "out").read_text()) == {"name": "\udcff"}
