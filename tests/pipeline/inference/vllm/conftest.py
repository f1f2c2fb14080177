"""An export, and what its bundle says: of the tiny model, or of the bundle that PLDR_VLLM_BUNDLE names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.inference.runtime import Bundle
from tests.helpers.expected import Case, cases_of
from tests.helpers.exports import write_export

LONGEST = 12  # tokens of a prompt


@pytest.fixture(scope="session")
def bundle_folder(bundle_folder: Path) -> Path:
    named = os.environ.get("PLDR_VLLM_BUNDLE")
    return Path(named) if named else bundle_folder


@pytest.fixture(scope="session")
def bundle(bundle_folder: Path) -> Bundle:
    return Bundle.load(bundle_folder)


@pytest.fixture(scope="session")
def export(bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(bundle_folder, tmp_path_factory.mktemp("vllm") / "export")


@pytest.fixture(scope="session")
def cases(bundle: Bundle) -> list[Case]:
    """20 prompts with up to 40 tokens each."""
    return cases_of(bundle, new=min(40, bundle.config.context_length - LONGEST), longest=LONGEST)
