"""Unicode repair: mojibake undone, control characters removed, text normalized."""

from __future__ import annotations

import codecs
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from pipeline.data.normal_form import Form, normalize

PLAIN = re.compile(r"[\n\t\x20-\x7e]*")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufff9-\ufffb]")
MAX_ROUNDS = 8


class RepairUnicode(PipelineStep):  # type: ignore[misc]  # datatrove has no types
    """Repairs text: mojibake undone (ftfy), line ends \\n, no control characters but \\n and \\t, normalized.

    What only affects how text looks is kept: quotes, ligatures and full-width letters (unless NFKC replaces them), HTML
    entities. form: "nfc" or "nfkc".
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


def repair(text: str, form: Form) -> str:
    """The repaired text; repairing it again changes nothing. Plain ASCII is returned unchanged."""
    if PLAIN.fullmatch(text):
        return text
    for _ in range(MAX_ROUNDS):  # nested mojibake: each round undoes one level; nearly always one is enough
        before, text = text, _repair_once(text, form)
        if text == before:
            break
    return text


def _repair_once(text: str, form: Form) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    # Line by line, because one line's encoding implies nothing about another's, and short pieces are fast.
    lines = [line if line.isascii() else _fix_line(line) for line in text.split("\n")]
    return normalize(form, CONTROL.sub("", "\n".join(lines)))


def _fix_line(line: str) -> str:
    fix_text, config = _ftfy()
    return str(fix_text(line, config=config))


@cache
def _ftfy() -> tuple[Any, Any]:
    """ftfy's function and its settings.

    ftfy registers encodings of its own. The package future_typing (which the quickstart's corpus installs) claims every
    encoding that Python does not know, so it has to be registered after ftfy.
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
        remove_control_chars=False,  # CONTROL removes exactly those that should go
        normalization=None,
        explain=False,
    )
    return ftfy.fix_text, config
