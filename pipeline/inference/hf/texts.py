"""Texts on which two tokenizers are compared: passages of a run's held-out documents where a run is exported; else, and where
those are few, paragraphs of the documentation of Python's standard library, which no shipped file has to hold; and strings
that tokenizers stumble over.
"""

from __future__ import annotations

import ast
import functools
import sysconfig
from collections.abc import Sequence
from pathlib import Path

MIN_TEXTS = 1000  # so that 1 in 1000 can be told
MAX_TEXTS = 2000
MODULES = (
    "argparse ast calendar cmd configparser contextlib copy csv datetime decimal difflib doctest fractions ftplib functools "
    "gettext glob heapq imaplib inspect ipaddress locale mailbox optparse pathlib pickletools random shutil smtplib statistics "
    "string subprocess tarfile tempfile textwrap threading trace turtle typing zipfile"
)
ODD = (
    *("", " ", "  a  b ", "\n\n x\n", "\r\nCRLF\r\n", "tab\tx", "\x00\x01", "123456", "a" * 300),
    *("[END]", "a [PAD] b", "<0x41>", "x<0x41>y [UNK]", "[START][END]", "\u2581under", "\u2581\u2581a"),
    *("\u200bzero", "\ufeffmark", "\u3000 wide", "h\u00e9llo w\u00f6rld", "e\u0301 \u00a0space"),
    *("\uff26\uff35\uff2c\uff2c \ufb01 \u2460", "\u03a9\u2248\u00e7\u221a", "\u65e5\u672c\u8a9e\u306e\u30c6"),
    *("\u0645\u0631\u062d\u0628\u0627", "\u041f\u0440\u0438\u0432\u0435\u0442", "\u0928\u092e\u0938\u094d\u0924\u0947"),
    *("\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "\U0001f44d\U0001f3fd\U0001f1e9\U0001f1ea"),
)


def checked_texts(held_out: Sequence[str] | None) -> tuple[list[str], str]:
    """The texts of the check without ODD, and where they are from, in words."""
    if held_out is not None and len(held_out) >= MIN_TEXTS:
        return list(held_out), "held-out texts of the run"
    library = "documentation of Python's standard library"
    if not held_out:
        return library_texts(), library
    return [*held_out, *library_texts()], f"{len(held_out)} held-out texts of the run, and {library}"


@functools.cache
def library_texts() -> list[str]:
    """Paragraphs of at least eight words from docstrings of Python's standard library, which is read and not imported."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts: dict[str, None] = {}
    for name in MODULES.split():
        file = folder / f"{name}.py" if (folder / f"{name}.py").is_file() else folder / name / "__init__.py"
        if not file.is_file():
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                paragraphs = (ast.get_docstring(node) or "").split("\n\n")
                texts |= dict.fromkeys(paragraph for paragraph in paragraphs if len(paragraph.split()) >= 8)
    return list(texts)[:MAX_TEXTS]
