"""Weights of an export: one safetensors file, or several with an index, as transformers names them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.errors import ConfigError, UserError
from pipeline.inference.hf.aligned import save_aligned
from pipeline.io.storage import publish_json, read_json
from pipeline.io.tensors import read_header, usual_mode

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
MAX_INDEX = 64 << 20  # bytes


def parse_size(text: str) -> int:
    """`5GB`, `200 MB` or `1GiB` in bytes. Raises ConfigError."""
    match = re.fullmatch(r"(\d{1,6}) ?([KMG]i?B)", text, flags=re.IGNORECASE)
    if match is None or int(match[1]) == 0:
        raise ConfigError(f"--shard-size: {text!r} is no size; write 5GB, 200MB or 1GiB")
    return int(match[1]) * UNITS[match[2].upper()]


def write_shards(
    tensors: Mapping[str, Tensor], folder: Path, *, shard_bytes: int, metadata: Mapping[str, str] | None = None
) -> None:
    """Write the tensors in their order; a file that would become larger than `shard_bytes` is ended (one tensor may be).
    metadata: of every file of an int8 export."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names if len(shards) > 1 else [WEIGHTS], shards, strict=True):
        try:
            if metadata:
                save_aligned(shard, folder / name, {"format": "pt", **metadata})
            else:
                save_file(shard, folder / name, metadata={"format": "pt"})
        except (SafetensorError, OSError) as error:  # a full disk
            raise UserError(f"{folder / name}: cannot be written ({error})") from None
        usual_mode(folder / name)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        publish_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


class Found(NamedTuple):
    """Where a tensor is, and its shape by the file's header."""

    file: Path
    shape: tuple[int, ...]


def find_tensors(folder: Path) -> dict[str, Found]:
    """The tensors of a directory by name, from the files' headers, compared with the index where there is one.

    Raises UserError for files that are missing or damaged, and for an index that names files elsewhere or other tensors.
    """
    index = folder / INDEX
    if not index.is_file():
        if not (folder / WEIGHTS).is_file():
            raise UserError(
                f"{folder}: has neither {WEIGHTS} nor {INDEX}; weights as safetensors are needed (no pickle)"
            )
        return {name: Found(folder / WEIGHTS, shape) for name, (_, shape) in read_header(folder / WEIGHTS).items()}
    if index.stat().st_size > MAX_INDEX:
        raise UserError(f"{index}: {index.stat().st_size} bytes, too large: damaged; download or export it again")
    value = read_json(index)
    where = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise UserError(f"{index}: holds no weight_map of names to files; download or export it again")
    files = sorted(set(where.values()))
    for file in files:
        if file != Path(file).name or not file.endswith(".safetensors"):
            raise UserError(f"{index}: {file!r} is no safetensors file in the same folder; download or export it again")
        if not (folder / file).is_file():
            raise UserError(f"{folder / file}: missing, but {INDEX} lists it; download or export it again")
    found: dict[str, Found] = {}
    for file in files:
        for name, (_, shape) in read_header(folder / file).items():
            if where.get(name) != file:
                raise UserError(f"{index}: does not list {name} of {file}; download or export it again")
            found[name] = Found(folder / file, shape)
    for name in sorted(where.keys() - found.keys()):
        raise UserError(f"{index}: lists {name}, which {where[name]} does not hold; download or export it again")
    return found


def weight_files(found: Mapping[str, Found]) -> list[Path]:
    """The files, in the order of their names."""
    return sorted({each.file for each in found.values()})


def read_tensors(
    found: Mapping[str, Found], *, may_be_int8: Callable[[str], bool] = lambda _: False
) -> dict[str, Tensor]:
    """All of them, finite, and in fp32 at least, or int8 where that may be."""
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    for file in weight_files(found):
        try:
            with safe_open(file, framework="pt") as stream:
                for name in stream.keys():  # noqa: SIM118 - not a dictionary
                    tensor = stream.get_tensor(name)
                    if tensor.dtype == torch.int8 and may_be_int8(name):
                        tensors[name] = tensor
                        continue
                    if not tensor.is_floating_point():
                        raise UserError(f"{file}: {name} is {tensor.dtype}, and weights are floating-point numbers")
                    tensors[name] = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        except SafetensorError as error:  # stricter than `read_header` about the header's JSON
            raise UserError(f"{file}: its safetensors header is damaged ({error}); make the file again") from None
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{found[name].file}: {name} holds NaN or infinity; it is damaged, or training diverged")
    return tensors
