"""JSON files with a digest of their own content: one changed digit is damage, and not another number.

For small records that no other file has a hash of. A file of before December 2026 has no digest and is read as it is. What a
person may edit by hand, or other files show to be right, is left out of the digest (`free`). This is not a signature.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.io.storage import publish_json, read_json, sha256_json
from pipeline.io.urls import public_url

DIGEST = "digest"


def seal(value: dict[str, Any], *, free: Collection[str] = ()) -> dict[str, Any]:
    """The value with its digest. free: keys that may change."""
    return {**value, DIGEST: _digest(value, free)}


def is_intact(value: dict[str, Any], *, free: Collection[str] = ()) -> bool:
    """Whether the digest is that of the content, or there is none."""
    return DIGEST not in value or value[DIGEST] == _digest(value, free)


def publish_sealed(url: str | Path, value: dict[str, Any], *, free: Collection[str] = ()) -> None:
    """`publish_json` with a digest."""
    publish_json(url, seal(value, free=free))


def read_sealed(url: str | Path, *, schema_version: int | None = None, free: Collection[str] = ()) -> dict[str, Any]:
    """`read_json` of an object, without its digest. Raises UserError also when it was changed since it was written."""
    value = read_json(url, schema_version=schema_version)
    if not isinstance(value, dict) or not is_intact(value, free=free):
        raise UserError(f"{public_url(url)}: is not as it was written; it was damaged or edited: make it again")
    return {key: inner for key, inner in value.items() if key != DIGEST}


def _digest(value: dict[str, Any], free: Collection[str]) -> str:
    return sha256_json({key: inner for key, inner in value.items() if key != DIGEST and key not in free})
