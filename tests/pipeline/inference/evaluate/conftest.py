"""A tiny model opened, invariant or not, and small files of documents in the forms of the stock tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.inference.evaluate.small import open_tiny, write_documents


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `--data` takes it."""
    return write_documents(tmp_path_factory.mktemp("data"))


@pytest.fixture
def opened(tokenizer_path: Path) -> Callable[..., Any]:
    """`opened(gain=...)`: at 0 the model is invariant."""
    return lambda **settings: open_tiny(tokenizer_path, **settings)
