"""The files that are handed to schedulers: `launch/backends/templates/`, readable, filled in with jinja2."""

from __future__ import annotations

import shlex
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from pipeline.errors import ConfigError


def fill_in(name: str, values: dict[str, Any], *, own: str | None = None) -> str:
    """A template of the package, or the user's `own` file, with its values. Raises ConfigError naming the file."""
    where = own or name
    try:
        text = (
            Path(own).read_text(encoding="utf-8")
            if own
            else (resources.files("launch") / "backends" / "templates" / name).read_text()
        )
        environment = SandboxedEnvironment(
            undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
        )
        environment.filters["sh"] = shlex.quote
        return environment.from_string(text).render(values)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--template {where}: cannot be read ({error})") from None
    except TemplateError as error:
        raise ConfigError(f"--template {where}: {error}; it may use: {', '.join(sorted(values))}") from None
