"""Exports of bundles, for tests of what runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.bundle.formats import Packed
from pipeline.errors import UserError
from pipeline.inference.hf.export import export_hf
from pipeline.inference.source import open_model
from pipeline.io.storage import render_json, sha256_file
from pipeline.post.extract import extract_g
from pipeline.post.package.bundle import build_bundle
from pldr_model.model import PLDRModel
from tests.helpers.models import LINEAGE

CODE = {"configuration_pldr.py", "layers_pldr.py", "modeling_pldr.py"}
TOKENIZER = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json"}
FILES = {
    *CODE,
    *TOKENIZER,
    *("README.md", "certificate.json", "config.json", "generation_config.json", "model.safetensors", "MANIFEST.json"),
}


def write_bundle(
    folder: Path,
    model: PLDRModel,
    text: torch.Tensor,
    certificate: dict[str, Any],
    tokenizer: Path,
    packed: Packed | None = None,
) -> Path:
    """The tiny model's bundle; returns its folder. (`make_bundle` is for a test; this is for a module's fixture.)"""
    lineage = {**LINEAGE, "tokenizer_sha256": sha256_file(tokenizer)}
    g_lm = extract_g(model, text[:, :-1], "mean").g_lm
    build_bundle(model, g_lm, certificate=certificate, tokenizer=tokenizer, out=folder, lineage=lineage, packed=packed)
    return folder


def write_export(bundle: Path, folder: Path) -> Path:
    """What `pldr export hf` writes of a bundle; returns its folder."""
    export_hf(open_model(bundle), folder)
    return folder


def refused(work: Callable[[], object]) -> str:
    """The one line that this is refused with."""
    with pytest.raises(UserError) as caught:
        work()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path: Path, **changes: Any) -> None:
    """Replace top-level keys of a JSON file."""
    path.write_bytes(render_json({**json.loads(path.read_bytes()), **changes}))
