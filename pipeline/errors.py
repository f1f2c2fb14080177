"""The exception for users.

Anything a user can get wrong (a key, a file, a full disk) raises `UserError` with one line that names the problem and the fix;
the command line prints that line without a traceback and exits with `exit_code`. Every other exception is a bug and keeps its
traceback.
"""

from __future__ import annotations

from typing import Any


class UserError(ValueError):
    """A user's mistake or a broken input. The message is one line: what, where, and the fix.

    `exit_code`: 2 for wrong usage or configuration, 1 for a failure at work, 3 for a certificate that failed.
    `again`: whether an automatic restart (`train.max_restarts`) may succeed; false for mistakes in usage.
    """

    def __init__(
        self, message: str, *, exit_code: int = 1, details: dict[str, Any] | None = None, again: bool = True
    ) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.again = again and exit_code != 2
        self.details = details or {}  # plain values for --json


def first_line(error: BaseException) -> str:
    """The first line of an exception's message: libraries add pages of SQL and advice."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


class Caution(UserWarning):
    """What a user must know and may ignore: a line. `pldr` prints it as such, Python as a warning."""


class Stopped(UserError):
    """Not an error: the user's signal ended training after a save (exit code 0, or the one that a scheduler expects)."""

    def __init__(self, message: str, *, details: dict[str, Any], exit_code: int = 0) -> None:
        super().__init__(message, exit_code=exit_code, details=details, again=False)


class ConfigError(UserError):
    """Wrong usage or configuration (exit code 2)."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=2)


class AnotherRunError(ConfigError):
    """The configuration is that of another run than the one in its run directory: `key` has another value."""

    def __init__(self, message: str, *, key: str) -> None:
        super().__init__(message)
        self.key = key
