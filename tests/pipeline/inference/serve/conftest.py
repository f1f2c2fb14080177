"""A tiny bundle, opened once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.inference.opened import OpenModel
from pipeline.inference.runtime import Bundle
from pipeline.inference.source import open_model
from pldr_model.model import PLDRModel
from tests.helpers.exports import write_bundle


@pytest.fixture(scope="session")
def bundle_path(
    tmp_path_factory: pytest.TempPathFactory,
    invariant: PLDRModel,
    text: torch.Tensor,
    certificate: dict[str, Any],
    tokenizer_path: Path,
) -> Path:
    return write_bundle(tmp_path_factory.mktemp("served") / "tiny", invariant, text, certificate, tokenizer_path)


@pytest.fixture(scope="session")
def opened(bundle_path: Path) -> OpenModel:
    return open_model(bundle_path)


@pytest.fixture(scope="session")
def bundle(bundle_path: Path) -> Bundle:
    return Bundle.load(bundle_path)
