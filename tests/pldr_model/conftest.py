"""Shared by the tests of the mathematics: small configurations and the golden folder."""

from pathlib import Path

import pytest
import torch

from pldr_model.config import ModelConfig


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed():
    """Small matrices are fastest on one thread; every test draws the same weights wherever it runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny() -> ModelConfig:
    """Two layers, two heads of 8, vocabulary 61, context 48: everything in milliseconds."""
    return ModelConfig(
        vocab_size=61, num_layers=2, num_heads=2, head_dim=8, context_length=48, A_dff=12, num_reslayerA=2
    )


@pytest.fixture(scope="session")
def golden() -> Path:
    return Path(__file__).parents[1] / "golden"
