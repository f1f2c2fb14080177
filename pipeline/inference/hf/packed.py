"""int8 weights of an export: torchao's format, which stock transformers and vLLM read and keep packed in memory.

Decisions. torchao's `Int8WeightOnlyConfig` per row is the only format that both compute with packed: transformers unpacks
compressed-tensors on the first pass, and vLLM's kernels for it on a CPU take int4 only. Values and scales are those of an int8
bundle (`pipeline.bundle.formats.pack`), bit for bit.
- Gated linear units are filled up with zeros to a multiple of 64: `torch.compile` multiplies int8 with a kernel that reads
  outside of the memory, or ends the process, where the columns are no multiple of 16 (torch 2.13); 64, so that four ranks may
  share them. The width of a model cannot be filled up, so another one is refused.
- torchao would unpack a whole embedding for every token, and vLLM packs none. So it is a module of modeling_pldr.py.
- vLLM packs no output layer. It stays fp32, unless it is asked for and vLLM is given up.

Shapes: R rows of a matrix, C its columns, F hidden size of the gated linear units.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from pipeline.bundle.formats import SCALE
from pipeline.errors import UserError
from pldr_model.config import ModelConfig

MULTIPLE = 16  # of the columns of a matrix
SHARED = 4 * MULTIPLE  # of F
EMBEDDING, EMBEDDING_SCALES, OUTPUT = "model.embed_tokens.weight", "model.embed_tokens.scale", "lm_head.weight"
VALUES, SCALES, ZEROS = "._weight_qdata", "._weight_scale", "._weight_zero_point"
GLU = re.compile(r"\.mlp\.(?:(gate|up)|down)_proj\.(weight|bias)")
NO_VLLM = "its output layer is int8, and vLLM reads it as fp32 only; export the model without --pack-output"


def to_packed(theirs: Mapping[str, Tensor], *, pack_output: bool) -> dict[str, Tensor]:
    """int8 matrices [R,C] with `NAME.scale` [R], under the names of modeling_pldr.py -> the tensors of the file."""
    packed: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        if name.endswith(SCALE):
            continue
        tensor = _filled(tensor, name)
        scale = theirs.get(name + SCALE)
        if scale is None:
            packed[name] = tensor
        elif name == EMBEDDING:
            packed |= {name: tensor, EMBEDDING_SCALES: scale[:, None]}
        elif name == OUTPUT and not pack_output:
            packed[name] = tensor * scale[:, None]
        else:
            module = name.removesuffix(".weight")
            scale = functional.pad(scale, (0, len(tensor) - len(scale)))
            packed |= {
                module + VALUES: tensor,
                module + SCALES: scale[:, None].contiguous(),
                module + ZEROS: torch.zeros(len(tensor), 1, dtype=torch.int8),
            }
    return packed


def from_packed(packed: Mapping[str, Tensor], config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """`to_packed` inverted and unpacked: a state dict of modeling_pldr.py in `dtype` (exact in fp64)."""
    theirs: dict[str, Tensor] = {}
    for name, tensor in packed.items():
        if name == EMBEDDING and tensor.dtype == torch.int8:
            theirs[name] = tensor.to(dtype) * packed[EMBEDDING_SCALES].to(dtype)
        elif name.endswith(VALUES):
            module = name.removesuffix(VALUES)
            steps = tensor.to(dtype) - packed[module + ZEROS].to(dtype)
            theirs[f"{module}.weight"] = steps * packed[module + SCALES].to(dtype)
        elif not name.endswith((SCALES, ZEROS)) and name != EMBEDDING_SCALES:
            theirs[name] = tensor.to(dtype)
    return {name: _cut(tensor, name, config.feed_forward_size) for name, tensor in theirs.items()}


def is_packed(names: Mapping[str, Any]) -> bool:
    """Whether tensors of these names are in torchao's format."""
    return any(name.endswith(VALUES) for name in names)


def holds_integers(name: str) -> bool:
    """Whether this tensor of a packed export may be int8."""
    return name.endswith((VALUES, ZEROS)) or name == EMBEDDING


def unpacked_shapes(
    shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, filled: int
) -> dict[str, tuple[int, ...]]:
    """Shapes after `from_packed`. filled: intermediate_size of config.json. Raises UserError for parts that do not fit."""
    F, found = config.feed_forward_size, dict(shapes)
    for name, shape in shapes.items():
        if name.endswith(VALUES):
            module = name.removesuffix(VALUES)
            for part in (module + SCALES, module + ZEROS):
                if found.pop(part, None) != (*shape[:1], 1):
                    raise UserError(f"{part}: missing, or not a number for each row of {name}; export the model again")
            found[f"{module}.weight"] = found.pop(name)
    if EMBEDDING_SCALES in found and found.pop(EMBEDDING_SCALES) != (*found.get(EMBEDDING, ())[:1], 1):
        raise UserError(f"{EMBEDDING_SCALES}: not a number for each token; export the model again")
    for name, shape in found.items():
        axis = _axis(name)
        if axis >= 0 and axis < len(shape) and shape[axis] == filled:
            found[name] = (*shape[:axis], F, *shape[axis + 1 :])
    return found


def check_sizes(config: ModelConfig) -> None:
    """Raises UserError for a model that cannot be packed."""
    if config.d_model % MULTIPLE:
        raise UserError(
            f"--dtype int8: the model's width {config.d_model} is no multiple of {MULTIPLE}, which int8 kernels need; "
            "export it as bf16"
        )


def filled_size(config: ModelConfig) -> int:
    """F, filled up."""
    return -(-config.feed_forward_size // SHARED) * SHARED


def config_keys(config: ModelConfig, *, pack_output: bool) -> dict[str, Any]:
    """What config.json says of a packed export."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    kept = None if pack_output else [OUTPUT.removesuffix(".weight")]
    quantization = TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False), modules_to_not_convert=kept)
    return {
        "quantization_config": quantization.to_dict(),
        "intermediate_size": filled_size(config),
        "source_intermediate_size": config.feed_forward_size,
        "packed_embedding": True,
        "transformers_only": NO_VLLM if pack_output else None,
    }


def metadata_of(packed: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata of every safetensors file, by which torchao makes tensors of its own again."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import Int8Tensor

    modules = [name.removesuffix(VALUES) for name in packed if name.endswith(VALUES)]
    parts = {module + part for module in modules for part in (VALUES, SCALES, ZEROS)}
    state = {name: tensor for name, tensor in packed.items() if name not in parts}
    for module in modules:
        values = packed[module + VALUES]
        state[f"{module}.weight"] = Int8Tensor(
            values, packed[module + SCALES], [1, values.shape[1]], torch.float32, zero_point=packed[module + ZEROS]
        )
    flat, metadata = flatten_tensor_state_dict(state)
    assert flat.keys() == packed.keys(), "torchao names the parts of a tensor otherwise"
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}


def _axis(name: str) -> int:
    """Which axis of a gated linear unit's tensor is F; -1: none."""
    found = GLU.search(name)
    if found is None:
        return -1
    return 0 if found[1] else (1 if found[2] == "weight" else -1)


def _filled(tensor: Tensor, name: str) -> Tensor:
    axis = _axis(name)
    if axis < 0:
        return tensor
    more = -tensor.shape[axis] % SHARED
    return functional.pad(tensor, (0, more) if axis == tensor.ndim - 1 else (0, 0, 0, more))


def _cut(tensor: Tensor, name: str, size: int) -> Tensor:
    axis = _axis(name)
    return tensor if axis < 0 else tensor.narrow(axis, 0, size)
