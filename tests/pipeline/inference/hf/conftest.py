"""The tiny bundle and its export, written and checked once. Whoever damages them takes a copy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.inference.hf import export as export_module
from pipeline.inference.opened import OpenModel
from pipeline.inference.source import open_model
from tests.helpers.exports import write_export


@pytest.fixture(scope="session")
def bundle(bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of its own: tests here aim at it."""
    return Path(shutil.copytree(bundle_folder, tmp_path_factory.mktemp("export") / "bundle"))


@pytest.fixture(scope="session")
def opened(bundle: Path) -> OpenModel:
    return open_model(bundle)


@pytest.fixture(scope="session")
def written(bundle: Path) -> Path:
    return write_export(bundle, bundle.parent / "written")


@pytest.fixture
def export(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(written, tmp_path / "export")


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of this test take the numbers of an earlier self-check: what it does is tested elsewhere."""
    monkeypatch.setattr(export_module, "checked_texts", lambda _: (["a"], "one text"))
    found = {
        "logits": {"difference": 0.0, "largest": 1.0, "top1": 1.0, "finite": True},
        "exact": 0.0,
        "rounding": 0.0,
        "greedy": {"prompts": 20, "equal": 20, "tokens": 640, "gap": 0.0},
        "tokenizer": {"texts": 1, "other_ids": 0, "other_text": 0, "first": None},
        "versions": {"transformers": "0"},
    }
    native = {"native": found["logits"]}
    monkeypatch.setattr(
        export_module,
        "check_export",
        lambda *_, rounded, **__: json.loads(json.dumps({**found, **(native if rounded else {})})),
    )
