"""A safetensors file whose int8 matrices begin at multiples of 16 bytes.

Background: readers map the file, and tensors are views of it. torch's kernel for int8 weights (`_weight_int8pack_mm`, which
torch.compile takes) loads 16 bytes at once and ends the process at any other address. safetensors' own writer aligns to 8.
The format allows any order of tensors and spaces after the header, so the file is a usual one; equal tensors give equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

ALIGNMENT = 16
NAMES = {torch.float32: "F32", torch.int8: "I8"}


def save_aligned(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write them: first those that end at a multiple of 16 bytes, so that the next one begins at one."""
    order = sorted(tensors, key=lambda name: (tensors[name].nbytes % ALIGNMENT != 0, -tensors[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": NAMES[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            stream.write(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
