"""What every key of a configuration is: its value, default, meaning, where the value comes from, and the JSON Schema.

`pldr config CONFIG` prints `rows`; `pldr config --schema` prints `json_schema`, which editors complete YAMLs from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from pipeline.config.keys import on_resume
from pipeline.config.load import EXTENDS, Location, Origins
from pipeline.config.run import RunConfig
from pipeline.config.section import section_in
from pldr_model.config import ModelConfig

DEFAULT = "default"


@dataclass(frozen=True)
class Row:
    """One key. value, default: plain values. required: it has no default. origin: the file that sets it, "command line" or
    "default". on_resume: see Kind (section.py)."""

    key: str
    value: Any
    default: Any
    required: bool
    meaning: str
    origin: str
    on_resume: str


def rows(config: RunConfig, origins: Origins) -> list[Row]:
    """Every key in the order of the sections; keys of an optional section where it is set."""
    return list(_rows(config, RunConfig, (), origins))


def lines(found: list[Row]) -> list[str]:
    """The rows for a terminal: a heading for each section, below it `key  value  meaning (default; origin; on resume)`."""
    texts, section = [], None
    width = max(len(row.key.partition(".")[2] or row.key) for row in found)
    values = {row.key: json.dumps(row.value, ensure_ascii=False) for row in found}
    for row in found:
        head, dot, rest = row.key.partition(".")
        if dot and head != section:
            section = head
            texts.append(f"\n{head}")
        usual = "required" if row.required else f"default {json.dumps(row.default, ensure_ascii=False)}"
        notes = [] if row.origin == DEFAULT else [usual, row.origin]
        notes += [] if row.on_resume == "may change" else [f"on resume: {row.on_resume}"]
        note = f" ({'; '.join(notes)})" if notes else ""
        texts.append(f"  {rest or row.key:<{width}}  {values[row.key]:<12}  {row.meaning}{note}")
    return texts


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a run's YAML. No key is required in it: what `extends` names may have it."""
    schema: dict[str, Any] = _plain(RunConfig.model_json_schema())
    named = {"type": "string", "description": "a YAML that this one changes, relative to this file"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "properties": {EXTENDS: named, **schema["properties"]},
    }


def _rows(value: Any, section: Any, at: Location, origins: Origins) -> Iterator[Row]:
    for name, (annotation, default, meaning) in _fields(section).items():
        required = default is PydanticUndefined or default is MISSING
        location, inner = (*at, name), getattr(value, name)
        below = section_in(annotation, ModelConfig)
        if below is not None and isinstance(inner, below):
            yield from _rows(inner, below, location, origins)
            continue
        key = ".".join(str(part) for part in location)
        plain = to_jsonable_python(inner)
        usual = None if required else to_jsonable_python(default)
        yield Row(key, plain, usual, required, meaning, _origin(location, origins), on_resume(key))


def _fields(section: Any) -> dict[str, tuple[Any, Any, str]]:
    """Annotation, default and meaning of each key of a section, or of ModelConfig."""
    if section is not ModelConfig:
        known: dict[str, FieldInfo] = section.model_fields
        return {name: (one.annotation, one.default, one.description or "") for name, one in known.items()}
    described = RunConfig.model_json_schema()["$defs"][ModelConfig.__name__]["properties"]
    meanings = {name: " ".join(one["description"].split()) for name, one in described.items()}
    return {one.name: (one.type, one.default, meanings[one.name]) for one in fields(ModelConfig)}


def _origin(location: Location, origins: Origins) -> str:
    """Where a value comes from: of a list or mapping, where any part of it does."""
    found = [
        origins[known] for known in origins if known[: len(location)] == location or location[: len(known)] == known
    ]
    return os.path.normpath(found[-1]) if found else DEFAULT


def _plain(schema: Any) -> Any:
    """Without pydantic's titles, required keys and what `Kind` holds for the pipeline."""
    if isinstance(schema, list):
        return [_plain(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    kind = schema.get("kind")
    kept: dict[str, Any] = {
        key: {name: _plain(one) for name, one in value.items()} if key in ("properties", "$defs") else _plain(value)
        for key, value in schema.items()
        if key not in ("required", "title", "kind")
    }
    if kind is not None and "description" in kept:
        kept["description"] += f" (on resume: {kind['on_resume']})"
    return kept
