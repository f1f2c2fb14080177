"""The table of verdicts in docs/certificate.md, between two comments."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from tests.pipeline.post.attacks.verdicts import Case

BEGIN, END = "<!-- verdicts: begin -->", "<!-- verdicts: end -->"
PAGE = Path("docs/certificate.md")
TITLES = {"cheats": "cheat", "honest": "honest model"}


def read_table(repository: Path) -> str:
    """What is between the two comments."""
    text = (repository / PAGE).read_text("utf-8")
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)]


def write_table(repository: Path, suite: Mapping[str, Mapping[str, Case]], verdicts: Mapping[str, str]) -> None:
    """Replace it."""
    path = repository / PAGE
    before, _, rest = path.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    parts = [_part(TITLES[kind], cases, verdicts) for kind, cases in suite.items()]
    path.write_text("\n".join([before + BEGIN, *parts, END + after]), "utf-8")


def names_in(table: str) -> list[str]:
    """The first cell of every row."""
    return re.findall(r"^\| `([^`]+)`", table, flags=re.MULTILINE)


def _part(title: str, cases: Mapping[str, Case], verdicts: Mapping[str, str]) -> str:
    rows = [f"| `{name}` | {_cell(case.what)} | {_cell(verdicts[name])} |" for name, case in cases.items()]
    return "\n".join([f"| {title} | what it is | verdict |", "|---|---|---|", *rows, ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
