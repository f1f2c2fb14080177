"""Repeated paragraphs, anywhere in the corpus or in the same document, are cut; the first one is kept.

A paragraph is the text between blank lines. Short ones (fewer than `min_characters` after normalization: headings, dialogue)
may repeat. Keys and search are those of exact.py, with the number of the paragraph after the ordinal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.typeshelper import StatHints

from pipeline.data.dedup.exact import HASH_COLUMNS, KeysStep, found_files, key_row, normalized, text_hash
from pipeline.data.dedup.sorted_rows import MEMORY, Lookup

SEPARATOR = re.compile(r"(\n\s*\n)")
REASON = "paragraph_duplicate"


def split_paragraphs(text: str) -> tuple[list[str], list[str]]:
    """(paragraphs, separators) in order, one separator fewer; alternating, they are the text. A text that begins or ends with
    a separator has an empty paragraph there."""
    pieces = SEPARATOR.split(text)
    return pieces[::2], pieces[1::2]


def cut(text: str, numbers: set[int]) -> str:
    """The text without the paragraphs with these numbers. A paragraph is cut together with the separator after it; the rest
    ends with its last paragraph, not with a separator. Only white space becomes ""."""
    paragraphs, separators = split_paragraphs(text)
    kept = [number for number in range(len(paragraphs)) if number not in numbers]
    if not any(paragraphs[number].strip() for number in kept):
        return ""
    joined = [paragraphs[number] + separators[number] for number in kept[:-1]]
    return "".join(joined) + paragraphs[kept[-1]]


class ParagraphKeys(KeysStep):
    """The keys of a document are the hashes of its paragraphs that are long enough."""

    name = "paragraph_keys"
    columns = HASH_COLUMNS + 2

    def __init__(self, folder: Path, min_characters: int, work: Path, memory: int = MEMORY) -> None:
        super().__init__(folder, work, memory)
        self.min_characters = min_characters

    def keys(self, document: Document) -> bytes:
        rows = []
        for number, paragraph in enumerate(split_paragraphs(document.text)[0]):
            if len(paragraph) < self.min_characters and paragraph.isascii():
                continue  # normalization never makes ASCII text longer
            text = normalized(paragraph)
            if len(text) >= self.min_characters:
                rows.append(key_row(text_hash(text), document.metadata["ordinal"], number))
        return b"".join(rows)


class CutParagraphs(PipelineStep):  # type: ignore[misc]  # datatrove has no types
    """Cuts the paragraphs listed in `found`. A document without any paragraph left comes out with the text "".

    exclusion_writer: receives one record for each paragraph that is cut, with its number as `detail` and the document with the
    first occurrence as `keeper`. Documents must come in the order of their ordinals, with the text that ParagraphKeys saw.
    """

    type = "DEDUP"
    name = "paragraph_duplicates"

    def __init__(self, found: Path, exclusion_writer: Any = None) -> None:
        super().__init__()
        self.found = found
        self.exclusion_writer = exclusion_writer

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        lookup = Lookup(found_files(self.found))
        with self.exclusion_writer or _Discard() as writer:
            for document in data:
                self.stat_update(StatHints.total)
                repeated = {number: keeper for number, keeper in sorted(lookup.rows(document.metadata["ordinal"]))}
                if repeated:
                    self._cut(document, repeated, writer, rank)
                self.stat_update(StatHints.forwarded)
                yield document

    def _cut(self, document: Document, repeated: dict[int, int], writer: Any, rank: int) -> None:
        paragraphs, _ = split_paragraphs(document.text)
        for number, keeper in repeated.items():
            known = {"filter_reason": REASON, "detail": f"paragraph {number}", "keeper": keeper}
            writer.write(Document(paragraphs[number], document.id, metadata={**document.metadata, **known}), rank)
        shorter = cut(document.text, set(repeated))
        self.stat_update("changed")
        self.stat_update("paragraphs_cut", value=len(repeated))
        self.stat_update("characters_cut", value=len(document.text) - len(shorter))
        document.text = shorter


class _Discard:
    """An exclusion writer that discards everything."""

    def write(self, document: Document, rank: int) -> None:
        """Discard the document."""

    def __enter__(self) -> _Discard:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to close."""
