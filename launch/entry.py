"""The console script `pldr`: signals first, because one that comes before kills; then the imports of the command line."""

from __future__ import annotations

from launch.backends.standard_files import open_standard_files
from launch.backends.stop import stop_signals


def main() -> int:
    """Run the command line of this process; the exit code."""
    open_standard_files()
    stop_signals.listen()
    from launch.cli import main

    return main()
