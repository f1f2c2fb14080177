"""HTML pages of ours: one file each, without scripts, loading nothing.

What a page shows may be hostile (documents, names of runs): every value goes through jinja2's escaping, and the templates
have a content security policy that forbids everything but the style in them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

STYLE = Path(__file__).with_name("page.css")


def render(template: Path, content: dict[str, Any], filters: dict[str, Callable[[Any], str]]) -> str:
    """The template filled with `content`, and `style`, which all pages share. An unknown name in the template raises."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= filters
    style = Markup(STYLE.read_text(encoding="utf-8"))  # ours: no user's text is in it
    return environment.from_string(template.read_text(encoding="utf-8")).render({**content, "style": style})
