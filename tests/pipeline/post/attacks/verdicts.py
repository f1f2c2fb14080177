"""What the right verdict on a model is, and what the verdict was."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from pipeline.errors import UserError
from tests.pipeline.post.attacks.trained import Lab

NAMED = 3  # checks that failed, in words
Attempt = Callable[[Lab], dict[str, Any]]  # returns a certificate, or raises what refuses it


@dataclass(frozen=True)
class Failed:
    """The verdict is `failed`, and at least one of these checks is among those that failed."""

    by: frozenset[str]

    def __str__(self) -> str:
        return f"failed by {' or '.join(sorted(self.by))}"


@dataclass(frozen=True)
class Refused:
    """Refused by an error in one line that has this text."""

    text: str

    def __str__(self) -> str:
        return f"refused: {self.text}"


@dataclass(frozen=True)
class Certified:
    """Certified, and the statement has each of these (regular expressions)."""

    says: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "certified" + "".join(f", and says {text.replace(chr(92), '')}" for text in self.says)


@dataclass(frozen=True)
class NotProven:
    """Failed, or certified for the prompts that were tried and no more: the tier is not `proven`."""

    def __str__(self) -> str:
        return "not proven"


Right = Failed | Refused | Certified | NotProven


@dataclass(frozen=True)
class Verdict:
    """What came out. `certificate` is None where there was none."""

    text: str
    certificate: dict[str, Any] | None

    def is_right(self, right: Right) -> bool:
        """Whether this is what it should be."""
        if isinstance(right, Refused):
            return self.certificate is None and right.text in self.text
        if self.certificate is None:
            return False
        certified = self.certificate["verdict"] == "certified"
        if isinstance(right, Failed):
            return not certified and bool(right.by & set(failed(self.certificate)))
        if isinstance(right, NotProven):
            return self.certificate["tier"] != "proven"
        return certified and all(re.search(text, self.certificate["statement"]) for text in right.says)


@dataclass(frozen=True)
class Case:
    """A cheat or an honest model: how it is made, and the verdict that is right."""

    attempt: Attempt
    right: Right

    @property
    def name(self) -> str:
        """In words."""
        return self.attempt.__name__.replace("_", " ")

    @property
    def what(self) -> str:
        """One line: the attempt's docstring."""
        return (self.attempt.__doc__ or "").strip()

    def run(self, lab: Lab) -> Verdict:
        """Try it."""
        try:
            certificate = self.attempt(lab)
        except ValidationError as error:  # of a configuration: `pldr` prints key and message
            first = error.errors()[0]
            return Verdict(f"refused: {'.'.join(map(str, first['loc']))}: {first['msg']}", None)
        except UserError as error:
            return Verdict(f"refused: {str(error).replace(f'{lab.folder}/', '').partition('; ')[0]}", None)
        return Verdict(in_words(certificate, self.right), certificate)


def failed(certificate: dict[str, Any]) -> list[str]:
    """The checks that failed."""
    return [failure["measure"] for failure in certificate["failed"]]


def in_words(certificate: dict[str, Any], right: Right) -> str:
    """The verdict with its tier, or with the checks that failed: some of them, those that had to fail first."""
    if certificate["verdict"] == "certified":
        said = [re.search(text, certificate["statement"]) for text in getattr(right, "says", ())]
        return f"certified, {certificate['tier']}" + "".join(f"; says “{found[0]}”" for found in said if found)
    names = failed(certificate)
    if isinstance(right, Failed):
        names.sort(key=lambda name: name not in right.by)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"failed: {', '.join(names[:NAMED])}{more}"


class Cases(dict[str, Case]):
    """By name, in the order of their definition."""

    def add(self, right: Right) -> Callable[[Attempt], Attempt]:
        """Decorator of an attempt."""

        def register(attempt: Attempt) -> Attempt:
            case = Case(attempt, right)
            assert case.name not in self and case.what and "\n" not in case.what, case.name
            self[case.name] = case
            return attempt

        return register


def failed_by(*measures: str) -> Failed:
    """Failed by at least one of these."""
    return Failed(frozenset(measures))
