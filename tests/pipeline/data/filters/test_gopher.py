"""Gopher's rules with our words."""

from __future__ import annotations

from pathlib import Path

from tests.pipeline.data.filters.filtering import ENGLISH, through


def test_gopher_rules() -> None:
    prose = " ".join([ENGLISH] * 1)
    symbols = " ".join(f"# word{n} the and" for n in range(60))
    bullets = "\n".join(f"- {line} and the other thing number {n}" for n, line in enumerate(ENGLISH.split("\n") * 4))
    repeated = "\n".join(["The same line of text stands here, and that is all that there is to read in it."] * 40)
    texts = {
        "prose": prose,
        "symbols": symbols,
        "few": "only four words here",
        "bullets": bullets,
        "repeated": repeated,
    }
    kept, removed = through(texts, quality=True)
    assert set(kept) == {"prose"}
    assert removed["few"] == "gopher_short_doc" and removed["symbols"] == "gopher_too_many_hashes"
    assert removed["bullets"] == "gopher_too_many_bullets" and "dup" in removed["repeated"]
    kept, removed = through(texts, quality={"repetition": False, "min_words": 3})
    assert {"prose", "repeated"} <= set(kept) and removed["few"] != "gopher_short_doc"
    kept, removed = through(texts, quality={"quality": False})
    assert "prose" in kept and removed["repeated"] == "dup_line_frac" and removed["symbols"] == "top_2_gram"


def test_dialogue_and_quotation_marks_are_not_words(tmp_path: Path) -> None:
    said = [
        '"Well," said Jeeves, "I think, sir, that the aunt, if I may say so, is - well - out," he said;',
        '"Oh, no!"',
    ]
    prose = "\n".join(f"{line} and the lamp of number {n}." for n, line in enumerate(said * 8))
    kept, removed = through({"prose": prose}, quality={"repetition": False})
    assert set(kept) == {"prose"}, removed
    table = "\n".join(f"{n + 10**5} | {n * 7 + 10**6} | {n * 13 + 10**6} the of with" for n in range(40))
    assert through({"table": table}, quality={"repetition": False})[1] == {"table": "gopher_below_alpha_threshold"}
