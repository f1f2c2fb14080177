"""The text of a completion as its tokens come, and stop strings in it.

Both go on from where they were, so a token costs the same however long the text and however many the stop strings are.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class StopStrings:
    """Texts that end a completion. A character costs a look into a sorted list, for each place where one may have begun."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._whole = set(texts)
        self._sorted = sorted(self._whole)
        self._first = {text[0] for text in self._whole}

    def __bool__(self) -> bool:
        return bool(self._sorted)

    def __contains__(self, text: str) -> bool:
        return text in self._whole

    def may_begin(self, character: str) -> bool:
        """Whether a stop string begins with this character."""
        return character in self._first

    def begin(self, text: str) -> bool:
        """Whether a stop string begins with this text, or is it."""
        index = bisect_left(self._sorted, text)
        return index < len(self._sorted) and self._sorted[index].startswith(text)


class Completion:
    """What the new tokens of a prompt add to its text.

    decode: the text that ids add to a text before them. A character whose bytes are not all there is decoded as U+FFFD; it is
    searched, and part of `settled`, only when the text goes on after it.
    """

    __slots__ = ("_begun", "_decode", "_decoded", "_found", "_num_decoded", "_searched", "_stops", "_text")

    def __init__(self, decode: Callable[[list[int]], str], stops: StopStrings) -> None:
        self._decode, self._stops = decode, stops
        self._text = self._decoded = ""  # all of it; what no further token changes
        self._num_decoded = 0  # tokens
        self._searched = 0  # characters
        self._begun: list[int] = []  # where a stop string may have begun, that may still become one
        self._found: int | None = None

    def take(self, new: list[int]) -> bool:
        """Read on; `new` holds the tokens so far. Whether a stop string has appeared."""
        self._text = self._decoded + self._decode(new[self._num_decoded :])
        if not self._text.endswith(INCOMPLETE):
            self._decoded, self._num_decoded = self._text, len(new)
        self._search(len(self._text.rstrip(INCOMPLETE)))
        return self._found is not None

    @property
    def size(self) -> int:
        """Characters so far, without half of one at the end: where the next token's text begins."""
        return len(self._text.rstrip(INCOMPLETE))

    @property
    def stopped(self) -> bool:
        """Whether a stop string has appeared."""
        return self._found is not None

    def settled(self) -> str:
        """The beginning that no further token changes: without half a character, or an end that may become a stop string."""
        if self._found is not None:
            return self._text[: self._found]
        return self._text[: self._begun[0] if self._begun else self._searched]

    def finish(self) -> str:
        """The text, up to the first stop string; there are no more tokens."""
        self._search(len(self._text))
        return self._text[: self._found]

    def _search(self, until: int) -> None:
        """The first of the stop strings that end in the characters from the last search to `until`."""
        if self._found is not None:
            return
        if not self._stops:
            self._searched = max(self._searched, until)
            return
        for end in range(self._searched + 1, until + 1):
            if self._stops.may_begin(self._text[end - 1]):
                self._begun.append(end - 1)
            self._begun = [start for start in self._begun if self._stops.begin(self._text[start:end])]
            here = [start for start in self._begun if self._text[start:end] in self._stops]
            if here and (self._found is None or here[0] < self._found):
                self._found = here[0]
        self._searched = max(self._searched, until)
