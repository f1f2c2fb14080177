"""Exports of bundles, for tests of what runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.inference.hf.export import export_hf
from pipeline.inference.source import open_model
from pipeline.io.storage import sha256_file
from pipeline.post.extract import extract_g
from pipeline.post.package.bundle import build_bundle
from pldr_model.model import PLDRModel
from tests.helpers.models import LINEAGE


def write_bundle(
    folder: Path, model: PLDRModel, text: torch.Tensor, certificate: dict[str, Any], tokenizer: Path
) -> Path:
    """The tiny model's bundle; returns its folder. (`make_bundle` is for a test; this is for a module's fixture.)"""
    lineage = {**LINEAGE, "tokenizer_sha256": sha256_file(tokenizer)}
    g_lm = extract_g(model, text[:, :-1], "mean").g_lm
    build_bundle(model, g_lm, certificate=certificate, tokenizer=tokenizer, out=folder, lineage=lineage)
    return folder


def write_export(bundle: Path, folder: Path) -> Path:
    """What `pldr export hf` writes of a bundle; returns its folder."""
    export_hf(open_model(bundle), folder)
    return folder
