"""A sweep's comparison as Markdown, and its place in a page of the docs: between two comments that name the sweep."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipeline.errors import UserError
from pipeline.sweep import describe
from pipeline.sweep.report import MOST_WANTED, cell
from pipeline.sweep.saved import Saved

BLOCK = re.compile(r"<!-- sweep: (\S+) -->\n(.*?)<!-- end of sweep -->\n", re.DOTALL)


def markdown(sweep: Saved) -> str:
    """Its table and what follows from it; where nothing is compared, its children. Ends with a newline."""
    if sweep.compare is None:
        keys = [*sweep.grid, *(key for key in MOST_WANTED if key not in sweep.grid)]
        keys = [key for key in keys if any(row.get(key) is not None for row in sweep.rows)]
        return _table(
            [describe.last(key) for key in keys], [[cell(row.get(key)) for key in keys] for row in sweep.rows]
        )
    headings = describe.headings(sweep.compare)
    table = _table(headings, [describe.cells(line, sweep.compare) for line in sweep.lines])
    notes = [describe.AT_EDGE] if any(line.at_edge for line in sweep.lines) else []
    notes += describe.conclusions(sweep.lines, sweep.compare)
    open_questions = describe.unknown(sweep.lines, sweep.compare, sweep.to_come)
    notes += [f"Not known. {' '.join(open_questions)}"] if open_questions else []
    return table + "".join(f"\n{_escaped(note)}\n" for note in notes)


def block(sweep: Saved) -> str:
    """The Markdown between its comments."""
    return f"<!-- sweep: {sweep.name} -->\n{markdown(sweep)}<!-- end of sweep -->\n"


def blocks(text: str) -> dict[str, str]:
    """The sweeps of a page: name -> what stands between its comments."""
    return dict(BLOCK.findall(text))


def put_into(text: str, sweep: Saved, name: str) -> str:
    """The page `text`, named `name`, with the sweep's Markdown of today. Raises UserError where it has no place for it."""
    if sweep.name not in blocks(text):
        raise UserError(
            f"{name}: has no lines `<!-- sweep: {sweep.name} -->` and `<!-- end of sweep -->`; add them where its table is to "
            "be"
        )
    return BLOCK.sub(lambda found: block(sweep) if found[1] == sweep.name else found[0], text)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join("| " + " | ".join(_escaped(text) for text in line) + " |\n" for line in lines)


def _escaped(text: str) -> str:
    """Names come from a YAML: what would end a cell or begin a tag does not."""
    return re.sub(r"([|<*])", r"\\\1", text)
