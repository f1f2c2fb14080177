"""Checkpoints of the reference implementation and of the transformers port, to and from ours.

Background: both publish one key scheme (`decoder.dec_layers.{i}.mha1.wq.weight`, …), as `.pth`
(`{'model_state_dict': …}` or the bare dictionary) or safetensors. Ours fuses matrices that read the same
input.
Decision: one table from our keys to theirs serves both directions; fusing is concatenation along the outputs,
so a round trip is bit-equal. `.pth` files are read with `weights_only=True`: nothing in them is executed.

A v52 checkpoint has the same keys; only `rope_style='half'` differs, which no file records: it has to be
in the configuration.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pldr_model.config import ModelConfig, RopeStyle
from pldr_model.model import PLDRModel

_UNIT = re.compile(r"decoder\.dec_layers\.(\d+)\.mha1\.reslayerAs\.(\d+)\.denseAs\.(\d+)\.gluw1\.weight")
_POWER_LAW = {"W": "Wlst", "b": "blst", "P": "pwlst", "a": "alst", "b_a": "balst"}


def load_checkpoint_file(path: str | Path) -> dict[str, Tensor]:
    """Read a `.pth`/`.pt` or `.safetensors` checkpoint: {reference key: tensor} on the CPU, in the file's
    dtypes.

    Errors: ValueError naming the file, and the key where one is to blame; FileNotFoundError.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
    try:
        _require_checksums(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle fails in any way: OSError, IndexError, struct.error, … were seen
        kind = type(error).__name__  # torch's text advises to load it with code execution on
        raise ValueError(f"{path}: not a checkpoint of plain tensors ({kind}); nothing of it was executed") from None
    state = content.get("model_state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{path}: holds a {type(state).__name__}, not a state dictionary of tensors")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{path}: {key!r} is a {type(value).__name__}, not a tensor; is this a model's state dict?"
            )
    return dict(state)


def _require_checksums(path: Path) -> None:
    """A `.pth` is a zip file, whose checksums torch does not compare. Errors: zipfile.BadZipFile."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(damaged)


def save_checkpoint_file(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Write a state dict as `.safetensors`, or as the reference's `.pth` = `{'model_state_dict': …}`."""
    path = Path(path)
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    elif path.suffix in (".pth", ".pt"):
        torch.save({"model_state_dict": dict(state)}, path)
    else:
        raise ValueError(f"{path}: unknown suffix {path.suffix!r}; use .pth or .safetensors")


def infer_config(
    state: Mapping[str, Tensor], *, context_length: int, rope_style: RopeStyle = "interleaved"
) -> ModelConfig:
    """The configuration that the shapes of a learned-G reference checkpoint (v51, v52) imply.

    Context length and rotary style leave no trace in the weights; the caller has to know them.
    Errors: ValueError naming the first key that is missing.
    """
    prefix = "decoder.dec_layers.0."
    needed = ["decoder.embedding.weight", f"{prefix}mha1.plgatt_layer.Wlst", f"{prefix}ffn.gluw1.weight"]
    needed.append(f"{prefix}mha1.reslayerAs.0.denseAs.0.gluw1.weight")
    for key in needed:
        if key not in state:
            raise ValueError(f"{key}: missing; this is no PLDR-LLM checkpoint with a metric learner")
    units = [tuple(map(int, match.groups())) for match in map(_UNIT.fullmatch, state) if match]
    num_heads, head_dim, _ = state[needed[1]].shape
    return ModelConfig(
        vocab_size=state[needed[0]].shape[0],
        num_layers=1 + max(unit[0] for unit in units),
        num_heads=num_heads,
        head_dim=head_dim,
        context_length=context_length,
        d_ff=state[needed[2]].shape[0],
        A_dff=state[needed[3]].shape[0],
        num_reslayerA=1 + max(unit[1] for unit in units),
        num_denseA=1 + max(unit[2] for unit in units),
        rope_style=rope_style,
    )


def from_reference(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Reference keys -> our state dict. Errors: ValueError naming a missing, foreign or misshapen key."""
    table, shapes = _key_table(config), _our_shapes(config)
    foreign = sorted(set(state) - {key for keys in table.values() for key in keys})
    ours = {}
    for name, keys in table.items():
        rows, *rest = shapes[name]
        expected = (rows // len(keys), *rest)
        for key in keys:
            if key not in state:
                hint = f"; the file has {foreign[0]!r}, which this model does not know" if foreign else ""
                raise ValueError(f"{key}: missing from the checkpoint{hint}")
            if tuple(state[key].shape) != expected:
                raise ValueError(f"{key}: shape {tuple(state[key].shape)}, but the configuration needs {expected}")
        ours[name] = torch.cat([state[key] for key in keys]) if len(keys) > 1 else state[keys[0]].clone()
    if foreign:
        raise ValueError(f"{foreign[0]}: not a key of this model ({len(foreign)} unknown keys in all)")
    return ours


def to_reference(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our state dict -> reference keys, `from_reference` inverted bit for bit. A buffer `g_lm` is left out.

    Errors: ValueError naming a missing, foreign or misshapen key: a weight that is left out would change the model.
    """
    table, shapes = _key_table(config), _our_shapes(config)
    foreign = sorted(name for name in state if name not in table and name != "g_lm")
    theirs = {}
    for name, keys in table.items():
        if name not in state:
            hint = f"; there is {foreign[0]!r}, which this model does not know" if foreign else ""
            raise ValueError(f"{name}: missing from the state dict{hint}")
        if tuple(state[name].shape) != shapes[name]:
            raise ValueError(f"{name}: shape {tuple(state[name].shape)}, but the configuration needs {shapes[name]}")
        for key, part in zip(keys, state[name].chunk(len(keys)), strict=True):
            theirs[key] = part.clone()
    if foreign:
        raise ValueError(
            f"{foreign[0]}: not a weight of this model ({len(foreign)} unknown in all); remove or merge it first"
        )
    return theirs


def _our_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    weights = config if config.g_source == "learned" else config.sdpa_twin()
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in PLDRModel(weights).named_parameters()}


def _key_table(config: ModelConfig) -> dict[str, list[str]]:
    """Our key -> the reference keys whose tensors are stacked in it. Errors: ValueError for what the reference lacks."""
    if config.g_source == "constant":
        raise ValueError(
            "g_source: the reference has no trained constant G; its weights would be exported without it. Extract G_LM and "
            "hand it to the reference as an external G"
        )
    if config.g_source == "learned" and not config.num_denseA:
        raise ValueError(
            "num_denseA: 0, but every residual unit of the reference has GLUs; only one with GLUs can be imported or exported"
        )
    if config.rope_scaling is not None:
        raise ValueError("rope_scaling: the reference has none; its model would have other positions")
    table: dict[str, list[str]] = {"embedding.weight": ["decoder.embedding.weight"]}

    def add(ours: str, *theirs: str) -> None:
        for kind in ("weight", "bias"):
            table[f"{ours}.{kind}"] = [f"{their}.{kind}" for their in theirs]

    def add_glu(ours: str, theirs: str) -> None:
        add(f"{ours}.w12", f"{theirs}.gluw1", f"{theirs}.gluw2")
        add(f"{ours}.w3", f"{theirs}.gluw3")

    add("embedding_norm", "decoder.layernorm1")
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"decoder.dec_layers.{i}"
        mha = f"{theirs}.mha1"
        add(f"{ours}.attention.qkv", f"{mha}.wq", f"{mha}.wk", f"{mha}.wv")
        add(f"{ours}.attention.output", f"{mha}.dense")
        add(f"{ours}.attention_norm", f"{theirs}.layernorm1")
        add_glu(f"{ours}.feed_forward", f"{theirs}.ffn")
        add(f"{ours}.feed_forward_norm", f"{theirs}.layernorm2")
        if config.g_source != "learned":
            continue
        plga = f"{ours}.attention.plga"
        add(f"{plga}.density_norm", f"{mha}.layernorm1")
        for name, their_name in _POWER_LAW.items():
            table[f"{plga}.{name}"] = [f"{mha}.plgatt_layer.{their_name}"]
        for r in range(config.num_reslayerA):
            for j in range(config.num_denseA):
                add_glu(f"{plga}.metric_learner.{r}.glus.{j}", f"{mha}.reslayerAs.{r}.denseAs.{j}")
            add(f"{plga}.metric_learner.{r}.norm", f"{mha}.reslayerAs.{r}.layernormA")
    add("output", "final_layer")
    return table
