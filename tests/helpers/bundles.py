"""Bundles: damaged by a test (edit, reseal, read the one-line refusal), packed as bf16 or int8, or written by an old commit."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.bundle.format import certified_files
from pipeline.bundle.formats import Packed
from pipeline.bundle.read import verify_bundle
from pipeline.config.post import KeyRankConfig, PostConfig
from pipeline.errors import UserError
from pipeline.io.storage import MANIFEST, manifest_of, render_json, sha256_json
from pipeline.post.extract import extract_g
from pipeline.post.package.measured_formats import pack_measured
from pipeline.post.package.measured_keys import measure_keys
from pldr_model.model import PLDRModel

OLD = Path(__file__).resolve().parents[1] / "data" / "bundle-160ea30.tar.xz"


def reseal(bundle: Path) -> None:
    """Write a manifest that fits the folder as it is now: random damage cannot do this, an edit by hand can."""
    manifest = json.loads((bundle / MANIFEST).read_bytes())
    manifest.pop("bundle_sha256")
    manifest["files"] = manifest_of(bundle)
    (bundle / MANIFEST).write_bytes(render_json({**manifest, "bundle_sha256": sha256_json(manifest)}))


def edit(path: Path, **changes: Any) -> None:
    """Replace top-level keys of a JSON file."""
    path.write_bytes(render_json({**json.loads(path.read_bytes()), **changes}))


def refused(bundle: Path) -> str:
    """The message that the bundle is refused with; one line."""
    with pytest.raises(UserError) as caught:
        verify_bundle(bundle)
    message = str(caught.value)
    assert "\n" not in message
    return message


def measured(model: PLDRModel, text: torch.Tensor, weight_format: Any, *, allowed: float = 0.1) -> Packed:
    """The model's weights in a smaller format, their cost measured over this text."""
    g_lm = extract_g(model, text[:, :-1], "mean").g_lm
    return pack_measured(model, g_lm, text, weight_format, max_loss_difference=allowed, max_prompts=16)


def measured_keys(
    model: PLDRModel, text: torch.Tensor, ranks: list[list[int]], *, allowed: float = 0.1
) -> dict[str, Any]:
    """The certificate's section of low-rank keys, measured over this text with fp32 weights."""
    g_lm = extract_g(model, text[:, :-1], "mean").g_lm
    config = PostConfig(
        key_rank=KeyRankConfig(ranks=ranks), max_key_loss=allowed, generate_prompts=4, generate_tokens=12
    )
    sha256 = certified_files(model, g_lm)["model.safetensors"]
    return measure_keys(model, g_lm, torch.tensor(ranks), text[:16], config, sha256=sha256)


@pytest.fixture
def old_files(tmp_path: Path) -> Path:
    """What commit 160ea30 wrote, with certificates of schema 3: a small certified run's `bundle/` and `certificate/`, and the
    certificate of a model that failed, `failed/`."""
    with tarfile.open(OLD) as archive:
        archive.extractall(tmp_path / "old", filter="data")
    return tmp_path / "old"
