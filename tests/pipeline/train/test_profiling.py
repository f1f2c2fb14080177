"""A rank that is out of memory reports what was in it (pipeline/train/profiling.py)."""

import pytest
import torch
from torch import nn

from pipeline.train.profiling import is_out_of_memory, out_of_memory, tensor_lines


def test_an_allocation_that_fails_is_reported_with_what_was_alive(tmp_path):
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(1000, 1003))

    model = Small()
    model.table.sum().backward()
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**47, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    line = out_of_memory(caught.value, tmp_path / "memory", 3, "step 7 (compute)")
    assert line.startswith("rank 3 is out of memory in step 7 (compute)") and "\n" not in line
    assert "train.micro_batch" in line and str(tmp_path / "memory" / "rank-3.txt") in line
    text = (tmp_path / "memory" / "rank-3.txt").read_text()
    assert "Small.table (1000, 1003) float32 cpu" in text and "gradient of Small.table (1000, 1003)" in text
    assert "GB resident" in text


@pytest.mark.parametrize("error", [RuntimeError("connection closed by peer"), ValueError("DefaultCPUAllocator")])
def test_other_errors_are_not_out_of_memory(error):
    assert not is_out_of_memory(error)


def test_a_storage_counts_once_and_the_largest_comes_first():
    big = torch.zeros(1000, dtype=torch.float64)
    lines = tensor_lines([("view", big[:10]), ("again", big), ("", torch.zeros(4)), ("", torch.ones(4))])
    assert lines[0].endswith("in 3 tensors")
    assert "view (10,) float64" in lines[1] and "2 x  tensor (4,) float32" in lines[2] and len(lines) == 3


def test_fake_tensors_hold_nothing():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.zeros(1000)
    assert tensor_lines([("fake", fake), ("", torch.zeros(4))])[0].endswith("in 1 tensors")
