"""safetensors: byte-identical writes, bounded reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline.errors import UserError
from pipeline.io.tensors import load_tensors, read_header, serialize, sha256_tensors


def write(path: Path, header: dict[str, object] | bytes, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def test_round_trip_and_equal_bytes_whatever_the_order(tmp_path: Path) -> None:
    a, b = torch.randn(2, 3), torch.randn(4)
    assert serialize({"a": a, "b": b}, note="n") == serialize({"b": b, "a": a.mT.contiguous().mT}, note="n")
    assert sha256_tensors({"a": a}) != sha256_tensors({"a": a + 1})
    (tmp_path / "x.safetensors").write_bytes(serialize({"a": a, "b": b}))
    loaded = load_tensors(tmp_path / "x.safetensors", {"a": (2, 3), "b": (4,)})
    assert torch.equal(loaded["a"], a) and torch.equal(loaded["b"], b)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [50000, 50000], "data_offsets": [0, 10_000_000_000]}},  # claims 10 GB
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}},  # offsets that do not fit the shape
        {"a": {"dtype": "F32", "shape": [-1, -4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [True, 4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "P32", "shape": [4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},  # 8 bytes without a tensor
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "b": 7},
        {"a": {"dtype": "F32"}},
        b"[1, 2]",
        b"{",
        b"[" * 100_000,
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(tmp_path: Path, header: dict[str, object] | bytes) -> None:
    path = write(tmp_path / "x.safetensors", header, b"\0" * 16)
    with pytest.raises(UserError, match=r"x\.safetensors: its safetensors header is damaged"):
        read_header(path)


def test_a_truncated_file_and_a_header_longer_than_the_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    whole = serialize({"a": torch.ones(8)})
    for data in (b"", b"\x01", whole[:20], whole[:-1], whole + b"\0", (1 << 62).to_bytes(8, "little") + b"{}"):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"x\.safetensors: "):
            read_header(path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"b": torch.ones(4)}, "a is missing"),
        ({"a": torch.ones(4), "b": torch.ones(1)}, "b is not part of this model"),
        ({"a": torch.ones(5)}, r"a is F32 \[5\], the model needs F32 \[4\]"),
        ({"a": torch.ones(4, dtype=torch.float64)}, "a is F64"),
        ({"a": torch.tensor([1.0, float("nan"), 1.0, 1.0])}, "a holds NaN or infinity"),
    ],
)
def test_tensors_of_another_model_are_named(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(serialize(tensors))
    with pytest.raises(UserError, match=message):
        load_tensors(path, {"a": (4,)})
