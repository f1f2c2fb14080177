"""Gopher's quality and repetition rules (Rae et al. 2021, section A1.1): datatrove's filters with our word splitter."""

from __future__ import annotations

import re
from typing import Any

import regex
from datatrove.data import Document
from datatrove.pipeline.filters.gopher_quality_filter import GopherQualityFilter
from datatrove.pipeline.filters.gopher_repetition_filter import GopherRepetitionFilter
from datatrove.utils.word_tokenizers import WordTokenizer

from pipeline.data.words import FOLDED_WORD, SPACELESS, has_spaceless, is_spaceless


class Words(WordTokenizer):  # type: ignore[misc]
    """Words with their inner apostrophes and hyphens, and symbols that stand alone, for datatrove's filters.

    Decision: punctuation attached to a word is not a word. Gopher's rule that 80 % of the words have a letter counts what
    white space separates; with each comma and quotation mark as a word, it removed a fifth of plain prose with dialogue.
    datatrove's own splitter for English is spaCy, which is slow and a hundred times as large as everything else here.
    Where a script has no spaces, pipeline/data/words.py says what a word is.
    """

    SPACELESS = regex.compile(rf"{FOLDED_WORD.pattern}|(?<!\S)[^\w\s]+(?!\S)", regex.VERSION1)
    WORD = re.compile(r"\w+(?:['\u2019-]\w+)*|(?<!\S)[^\w\s]+(?!\S)")

    def __init__(self) -> None:
        super().__init__("any")

    def word_tokenize(self, text: str) -> list[str]:
        return self.SPACELESS.findall(text) if has_spaceless(text) else self.WORD.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        raise NotImplementedError("no filter here splits sentences")

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        words = self.SPACELESS if has_spaceless(text) else self.WORD
        return [found.span() for found in words.finditer(text)]


class Pairs(Words):
    """Pieces of two characters on average where each one would be a word: cut before every second character of the script."""

    def word_tokenize(self, text: str) -> list[str]:
        pieces: list[str] = []
        for word in super().word_tokenize(text):
            if pieces and len(word) == 1 and ord(word) % 2 and SPACELESS.match(word) and SPACELESS.match(pieces[-1]):
                pieces[-1] += word
            else:
                pieces.append(word)
        return pieces


class Quality(GopherQualityFilter):  # type: ignore[misc]
    """datatrove's Gopher quality rules on our words.

    Decision: the mean length of words and the English stop words say nothing about text without spaces, which would never
    pass. These two rules are not applied to it, and the documents are counted (`partly_checked`).
    """

    name = "quality"

    def __init__(self, min_words: int, max_words: int, exclusion_writer: Any = None) -> None:
        super().__init__(
            min_doc_words=min_words, max_doc_words=max_words, exclusion_writer=exclusion_writer, language=Words()
        )
        self._spaceless = GopherQualityFilter(
            min_doc_words=min_words,
            max_doc_words=max_words,
            min_avg_word_length=None,
            max_avg_word_length=None,
            min_stop_words=None,
            language=self.language,
        )

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if not is_spaceless(doc.text):
            return super().filter(doc)  # type: ignore[no-any-return]
        self.stat_update("partly_checked")
        return self._spaceless.filter(doc)  # type: ignore[no-any-return]


class Repetition(GopherRepetitionFilter):  # type: ignore[misc]
    """datatrove's Gopher repetition rules on our words; in text without spaces on two of them at a time, about a real word."""

    name = "repetition"

    def __init__(self, exclusion_writer: Any = None) -> None:
        super().__init__(exclusion_writer=exclusion_writer, language=Words())
        self._spaceless = GopherRepetitionFilter(language=Pairs())

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if not is_spaceless(doc.text):
            return super().filter(doc)  # type: ignore[no-any-return]
        return self._spaceless.filter(doc)  # type: ignore[no-any-return]
