"""What all verbs share: how one is added to the parser, and the arguments CONFIG and key=value."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]
Report = Callable[[str], None]
Work = Callable[[Any, Report], Result]  # the parsed arguments, where lines for the user go -> the result


class Verbs:
    """The verbs of `pldr`, or those below one of them (`pldr data ...`)."""

    def __init__(self, subparsers: Any, common: argparse.ArgumentParser) -> None:
        self._subparsers, self._common = subparsers, common
        self.helps: dict[str, str] = {}  # of each verb, in the order in which they were added

    def add(self, name: str, work: Work, help: str, *, is_work: bool = False) -> argparse.ArgumentParser:
        """A verb, with the options that every verb has. is_work: what counts is what it does; else, what it prints."""
        sub: argparse.ArgumentParser = self._subparsers.add_parser(
            name, help=help, description=help, parents=[self._common]
        )
        self.helps[name] = help
        sub.set_defaults(work=work, is_work=is_work)
        return sub

    def group(self, name: str, help: str, *, metavar: str) -> Verbs:
        """A verb that has verbs of its own."""
        sub = self._subparsers.add_parser(name, help=help, description=help)
        self.helps[name] = help
        inner = sub.add_subparsers(dest=f"{name}_verb", required=True, metavar=metavar)
        return Verbs(inner, self._common)


LONG_NAMES = ("bundle verify", "export hf", "import hf")


def long_name(words: Sequence[str]) -> list[str]:
    """Two words as one verb where the first is a verb too, so that argparse has no room for verbs below it.

    `pldr export hf CKPT.pth` still means a folder called `hf` where there is one: as `export hf` it would lack an argument.
    """
    name = " ".join(words[:2])
    folder = name != "bundle verify" and len(words) == 3 and Path(words[1]).is_dir()
    return [name, *words[2:]] if name in LONG_NAMES and not folder else list(words)


def add_config(sub: argparse.ArgumentParser, *, metavar: str = "CONFIG", help: str = "YAML of the run") -> None:
    """CONFIG and its overrides."""
    sub.add_argument("config", metavar=metavar, help=help)
    add_overrides(sub)


def add_overrides(sub: argparse.ArgumentParser, help: str = "override a key, for example train.steps=100") -> None:
    """`key=value` after CONFIG."""
    sub.add_argument("overrides", nargs="*", metavar="key=value", help=help).completer = _keys  # type: ignore[attr-defined]


def _keys(**_: object) -> list[str]:
    """What a shell completes to: every key of a configuration."""
    from pipeline.config.keys import all_kinds

    return [f"{key}=" for key in all_kinds()]
