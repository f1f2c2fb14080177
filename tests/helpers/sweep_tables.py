"""Whether the tables of a page are what the small copies of sweeps (pipeline/sweep/saved.py) give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.sweep.compare import as_json, compared
from pipeline.sweep.markdown import blocks, markdown
from pipeline.sweep.saved import Saved, read_saved, render_small, small
from tests.helpers.comparisons import Varied


def wrong_tables(page: Path, folder: Path) -> list[str]:
    """What does not agree, a line each: files, their comparisons, the page's tables."""
    tables, wrong, names = blocks(page.read_text("utf-8")), [], set()
    for file in sorted(folder.glob("*.json")):
        sweep = read_saved(file)
        if file.stem != sweep.name:
            wrong.append(f"{file.name} is of the sweep {sweep.name}")
            continue
        names.add(sweep.name)
        if render_small(small(json.loads(file.read_bytes()))) != file.read_bytes():
            wrong.append(f"{file.name} is no small copy: make it with --copy-to")
        if not _follows(sweep):
            wrong.append(f"{file.name}: its comparison does not follow from its children")
        if sweep.name not in tables:
            wrong.append(f"{page.name}: has no table of {sweep.name}")
        elif tables[sweep.name] != markdown(sweep):
            wrong.append(f"{page.name}: the table of {sweep.name} is not what {file.name} gives")
    return wrong + [f"{page.name}: {name}.json is not there" for name in tables if name not in names]


def _follows(sweep: Saved) -> bool:
    """Whether the comparison is that of the rows, which are in the order in which children run: the first seed first."""
    if sweep.compare is None:
        return not sweep.lines
    children = [Varied(row["child"], {key: row.get(key) for key in sweep.grid}) for row in sweep.rows]
    again = as_json(compared(children, {row["child"]: row for row in sweep.rows}, sweep.compare))
    return _close(json.loads(json.dumps(again)), json.loads(json.dumps(as_json(sweep.lines))))


def _close(one: object, other: object) -> bool:
    """Equal to six digits: those of a copy are rounded."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_close(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_close, one, other))
    return one == pytest.approx(other, rel=1e-3, abs=2e-6) if isinstance(one, float) else one == other
