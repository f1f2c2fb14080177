"""Rendering HTML pages: one file each, without scripts or external resources.

Content may be hostile (documents, names of runs): jinja2 escapes every value, and the templates have a content security policy
that forbids everything except their inline style.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

STYLE = Path(__file__).with_name("page.css")


def render(template: Path, content: dict[str, Any], filters: dict[str, Callable[[Any], str]]) -> str:
    """The template filled with `content` and with `style`, which all pages share. Raises for unknown names in the template."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= filters
    style = Markup(STYLE.read_text(encoding="utf-8"))  # our own file, no user's text
    return environment.from_string(template.read_text(encoding="utf-8")).render({**content, "style": style})
