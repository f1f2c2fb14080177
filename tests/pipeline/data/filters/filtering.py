"""Helpers for the tests of filters: sample texts, and running texts through the steps of `data.clean`."""

from __future__ import annotations

from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from pipeline.config.data import Clean
from pipeline.data.filters.chain import document_blocks

ENGLISH = """The old keeper climbed the narrow stairs every evening, and he carried the lamp that his father had given to him.
He said that the sea was like a book which nobody would ever read to the end, because it was written again each night.
When the winter came, the boats stayed in the harbor, and the children of the village brought bread to the tower."""
GERMAN = """Der alte Wärter stieg jeden Abend die enge Treppe hinauf und trug die Lampe, die ihm sein Vater gegeben hatte.
Er sagte, das Meer sei wie ein Buch, das niemand zu Ende lesen könne, weil es in jeder Nacht neu geschrieben werde."""
FRENCH = """Le vieux gardien montait chaque soir l'escalier étroit et portait la lampe que son père lui avait donnée.
Il disait que la mer était comme un livre que personne ne lirait jamais jusqu'à la fin."""


class Removed:
    """An exclusion writer that keeps what it gets."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def __enter__(self) -> Removed:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def write(self, document: Document, rank: int = 0) -> None:
        self.reasons[document.id] = document.metadata["filter_reason"]


def through(texts: dict[str, str], **clean: Any) -> tuple[dict[str, str], dict[str, str]]:
    """({id: text} of what is kept, {id: reason} of what is removed) by the steps of `data.clean`."""
    limits = {key: clean.pop(key, default) for key, default in (("min_characters", 1), ("max_characters", None))}
    removed = Removed()
    blocks = document_blocks(
        Clean.model_validate(clean).model_dump(), **limits, contamination=None, removed=lambda step: removed
    )
    data: Any = (Document(text, name) for name, text in texts.items())
    for block in blocks:
        assert isinstance(block, PipelineStep)
        data = block.run(data, 0, 1)
    return {document.id: document.text for document in data}, removed.reasons
