"""launch/backends/stop.py and reaction.py: which signals stop what, in processes of their own; how long ranks may take."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.backends import reaction
from launch.backends.reaction import Reaction

ROOT = Path(__file__).resolve().parents[3]
BEGIN = """
import os, signal, sys, time
from launch.backends import stop
from launch.backends.stop import Interrupted, stop_signals
def send(name): os.kill(os.getpid(), getattr(signal, name)); time.sleep(0.05)
"""
ALL = ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"]


def run(code: str, *before: str) -> subprocess.CompletedProcess:
    words = [*before, sys.executable, "-c", BEGIN + code]
    return subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60
    )


@pytest.mark.parametrize("name", ALL)
def test_each_signal_is_kept_then_raised_by_its_name_and_later_ones_change_nothing(name):
    code = f"""
stop_signals.listen(); send('{name}')
try: stop_signals.begin(1, print)
except Interrupted as first:
    for other in {ALL}: send(other)
    print(first.name, stop_signals.names)
"""
    done = run(code)
    assert done.stdout.strip() == f"{name} {[name, *ALL]}", done.stderr


def test_a_job_gets_the_first_signal_and_a_late_ctrl_c():
    code = """
stop_signals.listen(); stop_signals.begin(1, print)
with stop_signals.handed_to(lambda number, at_once: print(number.name, at_once)):
    send('SIGTERM'); send('SIGINT'); send('SIGINT')
    stop_signals._first_at -= stop.AGAIN_S
    send('SIGHUP'); send('SIGINT')
"""
    assert run(code).stdout == "SIGTERM False\nSIGINT True\n"


SWALLOWED = """
try: send('SIGUSR1')
except BaseException: pass
time.sleep(60)
"""
IN_C = """
import ctypes, threading
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
mutex = ctypes.create_string_buffer(64)
for _ in range(2): ctypes.CDLL(None).pthread_mutex_lock(mutex)  # the second one never returns
"""


@pytest.mark.parametrize("waiting", [SWALLOWED, IN_C], ids=["swallowed", "in C"])
def test_what_does_not_end_is_killed_with_its_children(waiting):
    """A library may swallow the interrupt, and while the main thread is in C no handler of Python's runs."""
    code = """
import subprocess
stop.LIMIT_S = 0.5
child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True)
stop_signals.listen()
stop_signals.begin(7, lambda name: print(name, flush=True))
"""
    done = run(code + waiting)
    child, *told = done.stdout.split()
    assert done.returncode == 7 and told == ["SIGUSR1"], done.stderr
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] in "ZX"


def test_under_nohup_a_hangup_is_nothing():
    code = "stop_signals.listen(); stop_signals.begin(1, print); send('SIGHUP'); print('goes on')"
    assert run(code, "nohup").stdout == "goes on\n"


def test_a_late_signal_does_not_change_the_exit_code():
    """Python gives signals back their default, which kills, before it has ended."""
    code = """
class Late:
    def __del__(self, kill=os.kill, write=os.write, pid=os.getpid(), number=signal.SIGINT):
        kill(pid, number); write(2, b'still here')
sys.late = Late()  # a global of this module would never be deleted
from launch.cli import main
sys.argv = ['pldr', 'plan', 'absent.yaml']
sys.exit(main())
"""
    done = run(code)
    assert done.returncode == 2 and done.stderr.endswith("still here"), done.stderr


def beat(folder: Path, phase: str, step_s: float = 0.1) -> None:
    record = {"job": "a", "rank": 0, "step": 5, "phase": phase, "for_s": 0.0, "time": time.time(), "step_s": step_s}
    (folder / "rank-0.json").write_text(json.dumps(record))


def watched(folder: Path, phase: str, *, seconds: float, step_s: float = 0.1) -> bool:
    """Whether ranks whose heartbeat says this are overdue after so long."""
    found, end = Reaction(folder), time.monotonic() + seconds
    while time.monotonic() < end:
        beat(folder, phase, step_s)
        if found.overdue():
            return True
        time.sleep(0.02)
    return False


def test_ranks_that_do_not_react_are_overdue_unless_they_save(tmp_path, monkeypatch):
    monkeypatch.setattr(reaction, "LIMIT_S", 0.3)
    assert watched(tmp_path, "compute", seconds=5)
    assert not watched(tmp_path, "save", seconds=0.7)
    assert not watched(tmp_path, "compute", seconds=0.7, step_s=5.0)  # a step takes that long
    beat(tmp_path, "save")
    left = Reaction(tmp_path)  # the file of an earlier start: nobody writes it
    time.sleep(0.4)
    assert left.overdue() and "did not save and stop within" in left.what()


def test_signals_of_a_rank_are_noted_while_its_main_thread_waits():
    """Before the first step it leaves at once; a hangup that was ignored at its start stays so, unless pldr started it."""
    code = """
import threading
from pipeline.train.signals import StopRequest
request = StopRequest(); request.listen()
lock = threading.Lock(); lock.acquire()
def leave(name): print(request.flags(), [name], flush=True); os._exit(0)
request.leaving(leave)
threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGHUP)).start()
lock.acquire(timeout=30)
"""
    assert run(code).stdout == "[0.0, 0.0, 0.0, 1.0] ['SIGHUP']\n"
    kept = "from pipeline.train.signals import StopRequest\nr = StopRequest(); r.listen(); send('SIGHUP'); print(r.flags())"
    assert run(kept, "nohup").stdout == "[0.0, 0.0, 0.0, 0.0]\n"
    assert run(kept, "env", "PLDR_PARENT_PIPE=1", "nohup").stdout == "[0.0, 0.0, 0.0, 1.0]\n"
    assert run("from pipeline.train.signals import StopRequest\nr = StopRequest(); r.listen(); send('SIGUSR1')\n"
               "r.leaving(None); r.leaving(print)").stdout == "SIGUSR1\n"  # fmt: skip
