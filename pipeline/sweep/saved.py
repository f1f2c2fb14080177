"""A sweep from its sweep.json alone, without the runs; and the small copy of one that is kept with the docs.

The copy has what a reader elsewhere can use: what was varied and set, each child's numbers, the comparison and the curves
behind it. Ids of runs, errors (they name paths) and the curves of children that are in no mean are left out, and numbers have
seven digits, those of curves five.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.io.storage import read_json
from pipeline.sweep.compare import Compared, from_json
from pipeline.sweep.config import COLUMNS, CompareConfig
from pipeline.sweep.curves import CURVES

SCHEMA_VERSION = 1
DIGITS, CURVE_DIGITS = 7, 5
MAX_POINTS = 60  # of a curve in a copy
FACTS = (
    "schema_version",
    "name",
    "about",
    "config",
    "set",
    "grid",
    "variants",
    "compare",
    "compared",
    "children",
    "plot",
)
LEFT_OUT = ("run_id", "data_fingerprint")
Tree = dict[str, Any]


@dataclass(frozen=True)
class Saved:
    """A sweep's file. compare, lines: None and empty where nothing is compared."""

    name: str
    about: str
    grid: tuple[str, ...]
    children: int
    rows: tuple[Tree, ...]
    compare: CompareConfig | None
    lines: tuple[Compared, ...]
    curves: Mapping[str, Any]

    @property
    def to_come(self) -> int:
        """How many children have not ended."""
        return self.children - len(self.rows)


def read_saved(path: Path) -> Saved:
    """Read a sweep.json or a copy. Raises UserError, one line."""
    tree = read_json(path, schema_version=SCHEMA_VERSION)
    try:
        compare = tree.get("compare")
        return Saved(
            name=tree["name"],
            about=tree.get("about", ""),
            grid=tuple(tree["grid"]),
            children=tree["children"],
            rows=tuple(tree["rows"]),
            compare=None if compare is None else CompareConfig.model_validate(compare),
            lines=tuple(from_json(tree.get("compared", []))),
            curves=tree.get(CURVES, {}),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        wrong = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        raise UserError(
            f"{path}: is no table of a sweep ({wrong}); name a sweep.json, or start the sweep again"
        ) from None


def small(tree: Mapping[str, Any]) -> Tree:
    """The copy of a sweep.json."""
    rows = tree["rows"]
    compared = {child for line in tree.get("compared", []) for child in line["children"]}
    columns = ["child", "status", *tree["grid"], *(column for column in COLUMNS if column not in LEFT_OUT)]
    return {
        **{key: tree[key] for key in FACTS if key in tree},
        "compared": [_rounded(line) for line in tree.get("compared", [])],
        "rows": [_rounded({key: row[key] for key in columns if row.get(key) is not None}) for row in rows],
        CURVES: {
            child: {metric: _rounded(_fewer(points), CURVE_DIGITS) for metric, points in theirs.items()}
            for child, theirs in tree.get(CURVES, {}).items()
            if child in compared
        },
    }


def render_small(tree: Mapping[str, Any]) -> bytes:
    """A copy as JSON, a line for each key, child and variant."""

    def one(value: Any) -> str:
        return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)

    parts = []
    for key, value in sorted(tree.items()):
        if isinstance(value, list) and value and isinstance(value[0], dict):
            inner = "[\n" + ",\n".join(f"  {one(item)}" for item in value) + "\n ]"
        elif key == CURVES and value:
            inner = "{\n" + ",\n".join(f"  {one(name)}: {one(value[name])}" for name in sorted(value)) + "\n }"
        else:
            inner = one(value)
        parts.append(f" {one(key)}: {inner}")
    return ("{\n" + ",\n".join(parts) + "\n}\n").encode()


def _fewer(points: Sequence[Any]) -> list[Any]:
    """Every so many of a curve's points, the last one among them."""
    every = -(-len(points) // MAX_POINTS)
    return list(points)[::-1][:: max(1, every)][::-1]


def _rounded(value: Any, digits: int = DIGITS) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(inner, digits) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner, digits) for inner in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value
