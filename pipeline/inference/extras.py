"""Packages that only some commands need: one line with the pip command where one is missing."""

from __future__ import annotations

import importlib

from pipeline.errors import UserError


def require(*modules: str, extra: str) -> None:
    """Import these modules, or raise UserError that names the first one that cannot be and the extra that installs it."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            missing = error.name or module  # perhaps one that this module itself needs
            raise UserError(f"{missing} is not installed; pip install 'pldr[{extra}]'", exit_code=2) from None
