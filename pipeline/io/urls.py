"""URLs as text: which are local, which are refused, and how to show one without its secrets.

These functions only look at the string; nothing is opened.
"""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.errors import UserError

_USERINFO = re.compile(r"(?<=://)[^/?#@]*@")
_HTTP = re.compile(r"https?://", re.IGNORECASE)
_QUERY = re.compile(r"(https?://[^\s?#'\"]*)[?#][^\s'\")]*", re.IGNORECASE)


def check_url(url: str) -> str:
    """The URL itself. Raises UserError for schemes that run programs and for passwords."""
    if url.lower().startswith("pipe:") or "::pipe:" in url.lower():
        raise UserError(f"{url}: pipe: URLs run a shell and are refused; copy the data to a file or object store")
    found = _USERINFO.search(url)
    if found and (":" in found[0] or _HTTP.search(url)):  # sftp://user@host contains no secret
        raise UserError(f"{public_url(url)}: a password in a URL ends up in logs; put credentials into the environment")
    return url


def is_local(url: str | Path) -> bool:
    """Whether the URL is a file on this machine."""
    text = str(url)
    return "://" not in text or text.startswith("file://")


def is_http(url: str) -> bool:
    """Whether it is on a web server: read only, no listing, maybe no ranges, and secrets in the query."""
    return url.lower().startswith(("http://", "https://"))


def local_path(url: str | Path) -> Path:
    """The path of a local URL."""
    assert is_local(url), url
    return Path(str(url).removeprefix("file://"))


def public_url(url: str | Path) -> str:
    """The URL for names, logs and MLflow: without credentials, and for http without query and fragment, which may hold
    signatures and tokens. (In a key of an object store `?` and `#` are ordinary characters.)"""
    return without_secrets(str(url))


def without_secrets(text: str) -> str:
    """A text, such as another library's error message, with every URL in it changed as by `public_url`."""
    return _QUERY.sub(r"\1", _USERINFO.sub("", text))


def join(base: str | Path, *parts: str) -> str:
    """A path or URL below `base`."""
    return "/".join([str(base).rstrip("/"), *parts])
