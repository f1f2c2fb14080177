"""Normal forms: the same result as Python's, in time linear in the length of hostile runs of marks."""

from __future__ import annotations

import random
import time
import unicodedata

import pytest

from pipeline.data.dedup.exact import normalized
from pipeline.data.filters.unicode import repair
from pipeline.data.normal_form import LONG_RUN, Form, normalize

CHARACTERS = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
MARKS = [c for c in CHARACTERS if unicodedata.category(c).startswith("M")] + ["\uff9e", "\uff9f"]
RUNS = [
    "\u0301\u0323",
    "\u0344\u0323",
    "\u0f73",
    "\uff9e\u0301",
    "\u3099\u0301",
    "\u05b0\u0301\u0323",
    "\u093e\u0323\u0301",
]


@pytest.mark.parametrize("form", ["NFC", "NFKC"])
def test_the_result_is_that_of_python(form: Form) -> None:
    chance = random.Random(1)
    for _ in range(300):
        run = "".join(chance.choices(MARKS, k=chance.randint(20, 200)))
        rest = "".join(chance.choices([*MARKS, "a", "\u1100", "\uac00", "\u00e9"], k=100))
        text = f"\u00e9{run}x{rest}"
        assert normalize(form, text) == unicodedata.normalize(form, text)


def test_whatever_can_become_a_mark_is_in_a_run() -> None:
    for character in CHARACTERS:
        if any(map(unicodedata.combining, unicodedata.normalize("NFKD", character)[:1])):
            assert LONG_RUN.fullmatch(character * 40), hex(ord(character))


@pytest.mark.parametrize("run", RUNS)
def test_hostile_marks_take_linear_time(run: str) -> None:
    text = "z" + run * (400_000 // len(run)) + " end"
    start = time.process_time()
    normalized(text)
    repair(text, "NFC")
    repair(text, "NFKC")
    assert time.process_time() - start < 30  # quadratic: minutes
