"""The tiny bundle that most tests here use. Whoever damages it takes a copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.tracking.sqlite_store import make_store
from pldr_model.model import PLDRModel
from tests.helpers.exports import write_bundle


@pytest.fixture(scope="session")
def bundle_folder(
    tmp_path_factory: pytest.TempPathFactory,
    invariant: PLDRModel,
    text: torch.Tensor,
    certificate: dict[str, Any],
    tokenizer_path: Path,
) -> Path:
    return write_bundle(tmp_path_factory.mktemp("tiny") / "tiny", invariant, text, certificate, tokenizer_path)


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store without experiments, to be copied: MLflow takes seconds to make one."""
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    make_store(file)
    return file
