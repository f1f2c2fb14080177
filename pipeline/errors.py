"""The one exception a user is meant to read.

Whatever a user can get wrong (a key, a file, a full disk) raises `UserError` with one line that names the thing and
the mend; the command line prints that line without a traceback and leaves with `exit_code`. Everything else is our bug
and keeps its traceback.
"""

from __future__ import annotations

from typing import Any


class UserError(ValueError):
    """A user's mistake or a broken input. The message is one line: what, where, and the mend.

    `exit_code`: 2 for wrong usage or configuration, 1 for a failure while working, 3 for a certificate that failed.
    `again`: whether the same might go well when it is started again by itself (`train.max_restarts`); never a mistake.
    """

    def __init__(
        self, message: str, *, exit_code: int = 1, details: dict[str, Any] | None = None, again: bool = True
    ) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.again = again and exit_code != 2
        self.details = details or {}  # plain values for --json


def first_line(error: BaseException) -> str:
    """What an exception says, in one line: libraries add pages of SQL and advice."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


class Stopped(UserError):
    """Not an error: the user's signal ended training after a save (exit code 0, or what a scheduler asked to be told)."""

    def __init__(self, message: str, *, details: dict[str, Any], exit_code: int = 0) -> None:
        super().__init__(message, exit_code=exit_code, details=details, again=False)


class ConfigError(UserError):
    """Wrong usage or configuration (exit code 2)."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=2)
