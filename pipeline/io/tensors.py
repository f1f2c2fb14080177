"""safetensors files that are byte-identical on every write and bounded on every read.

Background: a safetensors file is `<8-byte header length><JSON header><data>`. Two things need care. Its writer stores
metadata in a hash map, so two metadata keys come out in any order: here there is at most one key. Its readers trust the
header's shapes: here the header is checked against the file's size and against the expected shapes before anything is
allocated, so that a header that claims 10 GB is an error and not a crash.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pipeline.errors import UserError

MAX_HEADER = 64 << 20  # bytes; a million tensors
ITEM_SIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1}


def serialize(tensors: Mapping[str, Tensor], *, note: str | None = None) -> bytes:
    """The bytes of a safetensors file: equal tensors (and note) give equal bytes. `note` becomes the metadata key `pldr`."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(plain, {"pldr": note} if note is not None else None)


def sha256_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hex sha256 of `serialize(tensors)`: the hash of that file in a bundle."""
    return hashlib.sha256(serialize(tensors)).hexdigest()


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """`name -> (dtype, shape)`, with every offset inside the file and every byte accounted for.

    Raises UserError naming the file for a file that is truncated, that claims more data, or that is not safetensors.
    """
    size = path.stat().st_size
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise UserError(f"{path}: header of {length} bytes in a file of {size}: not a safetensors file, or damaged")
        try:
            header = json.loads(stream.read(length))
            if not isinstance(header, dict):
                raise TypeError
            header.pop("__metadata__", None)
            return _check_header(header, data_bytes=size - 8 - length)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            detail = f" ({error})" if isinstance(error, ValueError) else ""
            raise UserError(f"{path}: its safetensors header is damaged{detail}; make the file again") from None


def _check_header(header: dict[str, Any], *, data_bytes: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape = tuple(entry["shape"])
        if not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
            raise ValueError(f"{name}: shape {shape}")
        begin, stop = entry["data_offsets"]
        if begin != end or stop - begin != math.prod(shape) * ITEM_SIZE[entry["dtype"]]:
            raise ValueError(f"{name}: {entry['dtype']} {shape} does not fill bytes {begin}..{stop}")
        found[name], end = (entry["dtype"], shape), stop
    if end != data_bytes:
        raise ValueError(f"claims {end} bytes of tensors, the file has {data_bytes}")
    return found


def load_tensors(
    path: Path, expected: Mapping[str, tuple[int, ...]], *, dtypes: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """Tensors with exactly these names and shapes, all finite; fp32 unless `dtypes` says otherwise.

    dtypes: name -> safetensors' name of a dtype; these tensors are copies, each with memory that ends with it, while the others
    are views of the file. Raises UserError naming the file and the tensor; nothing is allocated before
    names, dtypes and shapes match.
    """
    header = read_header(path)
    for name, shape in expected.items():
        if name not in header:
            raise UserError(f"{path}: {name} is missing; the file belongs to another model")
        needed = (dtypes or {}).get(name, "F32")
        if header[name] != (needed, tuple(shape)):
            dtype, found = header[name]
            raise UserError(f"{path}: {name} is {dtype} {list(found)}, the model needs {needed} {list(shape)}")
    for name in header:
        if name not in expected:
            raise UserError(f"{path}: {name} is not part of this model; the file belongs to another model")
    try:
        with safe_open(path, framework="pt") as stream:
            tensors: dict[str, Tensor] = {
                name: _copied(path, name) if dtypes and name in dtypes else stream.get_tensor(name) for name in expected
            }
    except SafetensorError as error:  # stricter than we are about the header's JSON
        raise UserError(f"{path}: its safetensors header is damaged ({error}); make the file again") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} holds NaN or infinity; training diverged: take an earlier checkpoint")
    return tensors


def _copied(path: Path, name: str) -> Tensor:
    """A tensor whose memory is its own: those read from one opening of a file keep all of it mapped."""
    with safe_open(path, framework="pt") as stream:
        tensor: Tensor = stream.get_tensor(name)
        return tensor.clone()


def usual_mode(file: Path) -> None:
    """Give a file the mode that `open` gives; safetensors' `save_file` writes for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)
