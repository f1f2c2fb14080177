"""Huge pages: numbers and addresses stay, and the kernel says that the memory is on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pldr_model.decode import huge_pages
from pldr_model.decode.kernels import prepare
from pldr_model.decode.linear import Matrix


def _kilobytes(tensor: Tensor) -> int:
    """Of the mapping that the middle of this tensor lies in, those on huge pages."""
    inside, address = False, tensor.data_ptr() + tensor.nbytes // 2
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "AnonHugePages:":
            return int(line.split()[1])
    return 0


@pytest.fixture(scope="module")
def offered() -> None:
    """Skips where the kernel has no MADV_COLLAPSE."""
    if not huge_pages.collapse([torch.ones(4 << 20)]):
        pytest.skip("this kernel moves nothing to huge pages")


def test_weights_move_and_stay_what_they_are(offered: None) -> None:
    weight_RC = torch.randn(3000, 1000)
    copy_RC, address = weight_RC.clone(), weight_RC.data_ptr()
    moved = huge_pages.collapse([weight_RC])
    assert moved >= weight_RC.nbytes  # with what else lies on its first and last page
    assert weight_RC.data_ptr() == address and torch.equal(weight_RC, copy_RC)
    assert _kilobytes(weight_RC) * 1024 >= weight_RC.nbytes - 2 * huge_pages.HUGE


@pytest.mark.parametrize("pack", [Matrix.fp, lambda w: Matrix.int8(w.mul(40).to(torch.int8), torch.ones(len(w)))])
def test_products_give_the_same_after_it(offered: None, pack: Callable[[Tensor], Matrix]) -> None:
    product, x_NC = prepare(pack(torch.rand(4096, 1024))), torch.randn(3, 1024)
    before = product(x_NC)
    assert huge_pages.collapse(product.tensors) > 0
    assert torch.equal(product(x_NC), before)


def test_zeros_are_zero_and_on_huge_pages_from_the_start(offered: None) -> None:
    zeros = huge_pages.zeros(3, 4 << 20, dtype=torch.float32, device=torch.device("cpu"))  # so much is new memory
    assert not zeros.any()
    assert _kilobytes(zeros) >= 44 << 10  # of 48 MB, whose ends share pages with others


def test_small_and_empty_tensors_are_left_alone() -> None:
    assert huge_pages.collapse([]) == 0
    assert huge_pages.collapse([torch.ones(100), torch.empty(0)]) == 0


def test_neighbors_share_a_page() -> None:
    assert huge_pages._joined([(0x9000, 0xA000), (0, 0x8000), (0x20000, 0x30000)]) == [(0, 0xA000), (0x20000, 0x30000)]
