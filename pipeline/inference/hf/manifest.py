"""MANIFEST.json of an export: its files with their hashes, where it came from, and what its self-check found.

As in a bundle, it finds damage, mix-ups and careless edits; it is not a signature.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.inference.opened import OpenModel
from pipeline.io.sealed import read_sealed
from pipeline.io.storage import MANIFEST, parse_json, verify_manifest

SCHEMA_VERSION = 1
KIND = "pldr-hf-export"
MAX_SMALL = 64 << 20  # bytes


def why_uncertified(
    opened: OpenModel, *, dtype: str, live: bool, measured: Mapping[str, Any] | None = None
) -> str | None:
    """Why an export of this model is not certified; None for one that is. measured: the certificate's section on the smaller
    weights of the bundle, where they are not fp32."""
    if live:
        return "with its metric learner, so that no cached G_LM is certified"
    if opened.rounded:
        return "made of an export with rounded weights, and a certificate is about fp32 weights"
    if not opened.certified:
        return "its cached G_LM may give other answers than the model"
    if dtype != "fp32":
        return f"rounded to {dtype}, and a certificate is about fp32 weights"
    if measured:
        return f"made of a bundle with {measured['format']} weights, and a certificate is about fp32 weights"
    return None


def is_export(folder: Path) -> bool:
    """Whether a folder has the manifest of an export, intact or not."""
    file = folder / MANIFEST
    if not file.is_file() or file.stat().st_size > MAX_SMALL:
        return False
    try:
        value = parse_json(file.read_bytes())
    except ValueError:
        return False
    return isinstance(value, dict) and value.get("kind") == KIND


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, with all files verified. Raises UserError, one line, for what is missing, damaged or extra."""
    file = folder / MANIFEST
    if not file.is_file() or file.stat().st_size > MAX_SMALL:
        raise UserError(f"{file}: missing, or too large; this is no export of `pldr export hf`, or an incomplete one")
    manifest = read_sealed(file, schema_version=SCHEMA_VERSION)
    listed = manifest.get("files")
    well_formed = (
        manifest.get("kind") == KIND
        and isinstance(manifest.get("certified"), bool)
        and isinstance(manifest.get("model"), dict)
        and isinstance(listed, dict)
        and all(isinstance(entry, dict) and entry.keys() == {"sha256", "size"} for entry in listed.values())
    )
    if not well_formed:
        raise UserError(f"{file}: not the manifest of an export; export the model again")
    verify_manifest(folder, manifest["files"])
    return manifest
