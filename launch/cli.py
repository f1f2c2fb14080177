"""The `pldr` command: signals first (a signal before that kills), then all the rest, launch/commands/line.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from launch.backends.stop import stop_signals


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code. argv: None for that of this process, which ends with it."""
    stop_signals.listen()
    try:
        from launch.commands.line import run

        return run(argv)
    finally:
        if argv is not None:
            stop_signals.forget()


if __name__ == "__main__":
    sys.exit(main())
