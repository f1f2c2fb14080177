"""A tiny bundle, opened once."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.inference.opened import OpenModel
from pipeline.inference.runtime import Bundle
from pipeline.inference.source import open_model


@pytest.fixture(scope="session")
def opened(bundle_folder: Path) -> OpenModel:
    return open_model(bundle_folder)


@pytest.fixture(scope="session")
def bundle(bundle_folder: Path) -> Bundle:
    return Bundle.load(bundle_folder)
