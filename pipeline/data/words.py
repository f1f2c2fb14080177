"""What a word is, also in text that is written without spaces.

Chinese and Japanese: each character is a word. Thai, Lao, Burmese, Khmer and their neighbors: a word is about three letters,
cut where a letter of a third of the alphabet stands, so that equal passages are cut alike wherever they begin. No dictionary is
needed, and text with spaces is not affected.
"""

from __future__ import annotations

import re

import regex

INVISIBLE = "\u00ad\u200b-\u200d\u2060\ufeff"  # soft hyphen, zero-width spaces: inside a word
CHARACTERS = (  # Han, kana, Bopomofo: letters only, as a class of `re` and `regex`
    "\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3038-\u303c\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u3105-\u312f"
    "\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d\U00020000-\U000323af"
)
LETTERS = (  # of scripts that write words together, with their marks
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e50-\u0e59\u0e81-\u0edf\u1000-\u1049\u1050-\u109d\u1780-\u17d3\u17dc\u17e0-\u17e9"
    "\u1950-\u1974\u1980-\u19da\u1a20-\u1a99\ua9e0-\ua9fe\uaa60-\uaa76\uaa7a-\uaa7f"
)
_ALL = [chr(code) for a, b in regex.findall("(.)-(.)", LETTERS) for code in range(ord(a), ord(b) + 1)]
CUTS = "".join(letter for letter in _ALL if ord(letter) % 3 == 0 and regex.match(r"\p{L}", letter))
_INNER = "".join(letter for letter in _ALL if letter not in CUTS)
SPACELESS = re.compile(f"[{CHARACTERS}{LETTERS}]")
WORD = re.compile(rf"[^\W{CHARACTERS}{LETTERS}]+|[{CHARACTERS}]|[{LETTERS}][{_INNER}]*")  # `\w+`, but for these scripts
PLAIN_WORD = re.compile(r"\w+")  # the same in text without such scripts, and three times as fast
PLAIN_FOLDED_WORD = regex.compile(rf"[\p{{L}}\p{{N}}][\p{{L}}\p{{N}}\p{{M}}{INVISIBLE}]*")
# Combining marks belong to their letter.
FOLDED_WORD = regex.compile(
    rf"[[\p{{L}}\p{{N}}]--[{CHARACTERS}{LETTERS}]][[\p{{L}}\p{{N}}\p{{M}}{INVISIBLE}]--[{CHARACTERS}{LETTERS}]]*"
    rf"|[{CHARACTERS}][\p{{M}}\uff9e\uff9f{INVISIBLE}]*"
    rf"|[[{LETTERS}]&&[\p{{L}}\p{{N}}]][[{LETTERS}\p{{M}}{INVISIBLE}]--[{CUTS}]]*",
    regex.VERSION1,
)


def has_spaceless(text: str) -> bool:
    """Whether a text has a letter of a script without spaces."""
    return not text.isascii() and SPACELESS.search(text) is not None


def count_words(text: str) -> int:
    """What white space separates; in a text with letters of scripts without spaces, its words."""
    return len(FOLDED_WORD.findall(text)) if has_spaceless(text) else len(text.split())


def is_spaceless(text: str) -> bool:
    """Whether most of a text's letters are of scripts without spaces."""
    return has_spaceless(text) and 2 * len(SPACELESS.findall(text)) > sum(map(str.isalnum, text))
