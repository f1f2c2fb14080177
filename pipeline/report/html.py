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

HERE = Path(__file__).parent  # page.css and parts.html, which all pages share


def render(template: Path, content: dict[str, Any], filters: dict[str, Callable[[Any], str]]) -> str:
    """The template filled with `content` and with `style`; it may import `parts.html`. Raises for unknown names in it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, HERE]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= filters
    style = Markup((HERE / "page.css").read_text(encoding="utf-8"))  # our own file, no user's text
    return environment.get_template(template.name).render({**content, "style": style})
