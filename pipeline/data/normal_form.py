"""Unicode's normal forms in time that is linear in the text.

`unicodedata.normalize` sorts the marks that follow a letter by insertion, so 80,000 marks in a row, which some pages have to
break their readers, cost seconds, and a megabyte of them costs an hour. Here long runs are sorted first: a text whose marks are
in canonical order is equivalent to the one before, and normalizes to the same result at once.
"""

from __future__ import annotations

import unicodedata
from itertools import groupby
from typing import Literal

import regex

Form = Literal["NFC", "NFKC"]

# Characters that are marks, or become marks in NFKC (half-width voiced sound marks). Unicode's own limit for streams is 30.
LONG_RUN = regex.compile(r"[\p{M}\uff9e\uff9f]{32,}")


def normalize(form: Form, text: str) -> str:
    """`unicodedata.normalize`, the same result."""
    if text.isascii():
        return text
    decomposed: Literal["NFD", "NFKD"] = "NFD" if form == "NFC" else "NFKD"

    def in_order(found: regex.Match[str]) -> str:
        # Characters of class 0 do not move, and nothing moves past them.
        marks = "".join(unicodedata.normalize(decomposed, character) for character in found[0])
        runs = groupby(marks, key=lambda character: unicodedata.combining(character) == 0)
        return "".join("".join(run if starts else sorted(run, key=unicodedata.combining)) for starts, run in runs)

    return unicodedata.normalize(form, LONG_RUN.sub(in_order, text))
