"""Filters on the length of documents: drop short or long ones, split long ones at good places.

Joined, the parts of a split document are the document, character for character. Each has its number (`part`), which is also in
its id, and pipeline/data/documents/write.py keeps them in one split.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter

# Where a part may end, best first: after a paragraph, a line, a sentence, a word.
ENDS = [
    re.compile(pattern) for pattern in (r"\n\s*\n", r"\n", r"[.!?\u3002\uff01\uff1f]['\"\u201d\u2019)]*\s+", r"\s+")
]
WINDOW = 0.5  # share of a part, at its end, that is searched for a good place


class SplitLong(PipelineStep):  # type: ignore[misc]  # datatrove has no types
    """Splits documents of more than `max_characters`; others pass untouched."""

    type = "FORMAT"
    name = "split_long"

    def __init__(self, max_characters: int) -> None:
        super().__init__()
        self.max_characters = max_characters

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for document in data:
            self.stat_update("total")
            if len(document.text) <= self.max_characters:
                self.stat_update("forwarded")
                yield document
                continue
            self.stat_update("changed")
            for number, part in enumerate(split(document.text, self.max_characters)):
                self.stat_update("forwarded")
                metadata = {**document.metadata, "part": number}
                yield Document(text=part, id=f"{document.id}/{number}", metadata=metadata)


def split(text: str, max_characters: int) -> list[str]:
    """The text in parts of at most `max_characters`, as even as the places to split allow."""
    parts: list[str] = []
    start = 0
    while (left := len(text) - start) > max_characters:
        even = -(-left // -(-left // max_characters))  # length of the remaining parts if they were equal
        end = _end(text, start, start + even, start + max_characters)
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def _end(text: str, start: int, wanted: int, latest: int) -> int:
    """The best place to end a part, at most `latest`: of the best kind, the nearest to `wanted`."""
    earliest = max(start + 1, int(wanted - WINDOW * (wanted - start)))
    for end in ENDS:
        # A part ends after the match, so matches may begin a little before the window.
        places = [found.end() for found in end.finditer(text, earliest - 1, latest) if found.end() <= latest]
        if places:
            return min(places, key=lambda place: (abs(place - wanted), place))
    return latest


class LengthFilter(BaseFilter):  # type: ignore[misc]
    """Keeps documents of `minimum` to `maximum` characters, not counting white space at the ends."""

    name = "length"

    def __init__(self, minimum: int, maximum: int | None, exclusion_writer: Any = None) -> None:
        super().__init__(exclusion_writer)
        self.minimum = minimum
        self.maximum = maximum

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        length = len(doc.text.strip())
        if length < self.minimum:
            return False, "too_short"
        return self.maximum is None or length <= self.maximum or (False, "too_long")
