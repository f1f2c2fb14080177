"""The device of the tests marked `gpu` (`make test-gpu`). PLDR_GPU_TESTS=cpu rehearses them on a CPU."""

import os

import pytest
import torch


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    if os.environ.get("PLDR_GPU_TESTS") == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is seen; `make test-gpu` shows the first one to the tests")
    return torch.device("cuda")
