"""Gopher's quality and repetition rules (Rae et al. 2021, section A1.1): datatrove's filters with our word splitter."""

from __future__ import annotations

import re
from typing import Any

from datatrove.pipeline.filters.gopher_quality_filter import GopherQualityFilter
from datatrove.pipeline.filters.gopher_repetition_filter import GopherRepetitionFilter
from datatrove.utils.word_tokenizers import WordTokenizer


class Words(WordTokenizer):  # type: ignore[misc]
    """Words with their inner apostrophes and hyphens, and symbols that stand alone, for datatrove's filters.

    Decision: punctuation attached to a word is not a word. Gopher's rule that 80 % of the words have a letter counts what
    white space separates; with each comma and quotation mark as a word, it removed a fifth of plain prose with dialogue.
    datatrove's own splitter for English is spaCy, which is slow and a hundred times as large as everything else here.
    """

    WORD = re.compile(r"\w+(?:['\u2019-]\w+)*|(?<!\S)[^\w\s]+(?!\S)")

    def __init__(self) -> None:
        super().__init__("any")

    def word_tokenize(self, text: str) -> list[str]:
        return self.WORD.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        raise NotImplementedError("no filter here splits sentences")

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [found.span() for found in self.WORD.finditer(text)]


class Quality(GopherQualityFilter):  # type: ignore[misc]
    """datatrove's Gopher quality rules on our words."""

    name = "quality"

    def __init__(self, min_words: int, max_words: int, exclusion_writer: Any = None) -> None:
        super().__init__(
            min_doc_words=min_words, max_doc_words=max_words, exclusion_writer=exclusion_writer, language=Words()
        )


class Repetition(GopherRepetitionFilter):  # type: ignore[misc]
    """datatrove's Gopher repetition rules on our words."""

    name = "repetition"

    def __init__(self, exclusion_writer: Any = None) -> None:
        super().__init__(exclusion_writer=exclusion_writer, language=Words())
