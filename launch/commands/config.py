"""`pldr config`: every key of a configuration with its value and meaning, or the JSON Schema for editors."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from launch.commands.verbs import Report, Result, Verbs, add_overrides
from pipeline.errors import ConfigError


def add_config_verb(verbs: Verbs) -> None:
    """The verb `config`."""
    sub = verbs.add(
        "config", _config, "every key: its value, default, meaning, origin, and whether it may change on resume"
    )
    sub.add_argument("config", metavar="CONFIG", nargs="?", help="YAML of a run")
    add_overrides(sub)
    sub.add_argument("--schema", action="store_true", help="print the JSON Schema of a run's YAML, for editors")


def _config(arguments: Any, report: Report) -> Result:
    from pipeline.config.explain import json_schema, lines, rows
    from pipeline.config.load import load_with_origins

    if arguments.schema:
        schema = json_schema()
        if not arguments.json:
            report(json.dumps(schema, indent=2, ensure_ascii=False))
        return schema
    if arguments.config is None:
        raise ConfigError("config: name a YAML, or ask for the JSON Schema with --schema")
    found = rows(*load_with_origins(arguments.config, arguments.overrides))
    if not arguments.json:
        report("\n".join(lines(found)))
    return {"keys": [asdict(row) for row in found]}
