"""Runs a command and ends it, with all its children, when stdin closes: `python guard.py COMMAND …`.

Stdin is a pipe from the server. It closes when the server ends, however that happens; a kill -9 leaves no time for more. A file
of the standard library only: it is run by path, and imports nothing of ours.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

TERM_S = 10.0


def main() -> int:
    """The command's exit code."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the server ends it, by closing stdin
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_default_term)
    threading.Thread(target=_end_with_stdin, args=(child,), daemon=True).start()
    code = child.wait()
    _signal_group(child.pid, signal.SIGKILL)  # what it left behind
    return code if code >= 0 else 128 - code


def _default_term() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end_with_stdin(child: "subprocess.Popen[bytes]") -> None:
    while os.read(0, 4096):
        pass
    _signal_group(child.pid, signal.SIGTERM)
    end = time.monotonic() + TERM_S
    while child.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    _signal_group(child.pid, signal.SIGKILL)


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(main())
