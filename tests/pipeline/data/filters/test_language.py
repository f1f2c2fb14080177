"""Language identification."""

from __future__ import annotations

from pipeline.data.filters.language import language_of
from tests.pipeline.data.filters.filtering import ENGLISH, FRENCH, GERMAN, through


def test_language() -> None:
    texts = {"en": ENGLISH, "de": GERMAN, "fr": FRENCH, "none": "12345 67890 +++"}
    kept, removed = through(texts, language={"keep": ["en", "fr"]})
    assert set(kept) == {"en", "fr"} and removed["de"] == "other_language"
    assert language_of(GERMAN)[0] == "de" and language_of("")[0] == "none"
    kept, removed = through({"en": ENGLISH}, language={"keep": ["en"], "min_score": 1})
    assert language_of(ENGLISH)[1] < 1 and removed == {"en": "unsure_language"}


def test_the_language_of_a_long_text_is_identified_from_samples() -> None:
    assert language_of(ENGLISH * 1000)[0] == "en" and language_of("x" * 10 + GERMAN * 1000)[0] == "de"
