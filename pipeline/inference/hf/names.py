"""Our state dict <-> the one of modeling_pldr.py, bit for bit. int8 matrices go with the scales of their rows, NAME.scale.

Two things differ. Matrices that read the same input are one tensor here and several there. And rotary pairs are half-split
there, so for an `interleaved` model the dimensions of each head are put in another order: the rows of W_q and W_k, both axes of
G_LM, and everything of the metric learner that has such an axis. W, P and a act on rows and columns of the density matrix, so
both of their axes move together. A permutation moves numbers and changes none.

Shapes: D width, H heads, K head dim, F hidden size of the metric learner's GLUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.bundle.format import state_shapes
from pipeline.bundle.formats import SCALE
from pipeline.errors import UserError
from pldr_model.config import ModelConfig


class Part(NamedTuple):
    """One of their tensors. axes: which are of size K in the order of rotary pairs; heads: the first axis is H*K, not K."""

    name: str
    axes: tuple[int, ...] = ()
    heads: bool = False


def to_hf(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our state dict, with `g_lm` [L,H,K,K] for a constant G, under their names."""
    order = _order(config)
    theirs: dict[str, Tensor] = {}
    for ours, parts in _table(config).items():
        for kind in ("", SCALE) if ours + SCALE in state else ("",):
            for part, tensor in zip(parts, state[ours + kind].chunk(len(parts)), strict=True):
                theirs[part.name + kind] = _permute(tensor, part, order).contiguous().clone()
    if config.g_source != "learned":
        for i, g_HKK in enumerate(state["g_lm"]):
            part = _g_part(i)
            theirs[part.name] = _permute(g_HKK, part, order).contiguous().clone()
    return theirs


def from_hf(theirs: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """`to_hf` inverted. Raises UserError naming a missing, foreign or misshapen tensor."""
    check_shapes({name: tuple(tensor.shape) for name, tensor in theirs.items()}, config)
    order = _order(config).argsort()
    state = {
        ours: torch.cat([_permute(theirs[part.name], part, order) for part in parts])
        for ours, parts in _table(config).items()
    }
    if config.g_source != "learned":
        g_parts = [_g_part(i) for i in range(config.num_layers)]
        state["g_lm"] = torch.stack([_permute(theirs[part.name], part, order) for part in g_parts])
    return state


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of their state dict."""
    ours = state_shapes(config)
    shapes = {
        part.name: (ours[name][0] // len(parts), *ours[name][1:])
        for name, parts in _table(config).items()
        for part in parts
    }
    if config.g_source != "learned":
        shapes |= {_g_part(i).name: ours["g_lm"][1:] for i in range(config.num_layers)}
    return shapes


def check_shapes(found: Mapping[str, tuple[int, ...]], config: ModelConfig) -> None:
    """Raises UserError for a tensor that is missing, foreign, or of another shape."""
    expected = hf_shapes(config)
    for name, shape in expected.items():
        if name not in found:
            raise UserError(f"{name}: missing from the weights, which config.json's model needs; export it again")
        if found[name] != shape:
            raise UserError(f"{name}: shape {list(found[name])}, config.json's model needs {list(shape)}")
    for name in sorted(set(found) - set(expected)):
        raise UserError(f"{name}: not a tensor of config.json's model; the weights are of another one")


def _order(config: ModelConfig) -> Tensor:
    """Which of our dimensions of a head is each of theirs: even ones first if ours are interleaved pairs."""
    order = torch.arange(config.head_dim)
    return torch.cat((order[0::2], order[1::2])) if config.rope_style == "interleaved" else order


def _permute(tensor: Tensor, part: Part, order: Tensor) -> Tensor:
    if part.heads:
        by_head = tensor.reshape(-1, len(order), *tensor.shape[1:])
        return by_head.index_select(1, order).flatten(0, 1)
    for axis in part.axes:
        tensor = tensor.index_select(axis, order)
    return tensor


def _g_part(layer: int) -> Part:
    return Part(f"model.layers.{layer}.self_attn.g_lm", (1, 2))


def _table(config: ModelConfig) -> dict[str, list[Part]]:
    """Our name -> their tensors, whose rows are stacked in ours."""
    table = {"embedding.weight": [Part("model.embed_tokens.weight")]}

    def add(ours: str, *theirs: str, rows: tuple[int, ...] = (), heads: int = 0) -> None:
        """rows: their axis 0 is K; heads: the first so many parts' is H*K."""
        for kind in ("weight", "bias"):
            table[f"{ours}.{kind}"] = [Part(f"{name}.{kind}", rows, i < heads) for i, name in enumerate(theirs)]

    add("embedding_norm", "model.embed_norm")
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        attention = f"{theirs}.self_attn"
        add(f"{ours}.attention.qkv", *(f"{attention}.{x}_proj" for x in "qkv"), heads=2)
        add(f"{ours}.attention.output", f"{attention}.o_proj")
        add(f"{ours}.attention_norm", f"{theirs}.attention_norm")
        add(f"{ours}.feed_forward.w12", f"{theirs}.mlp.gate_proj", f"{theirs}.mlp.up_proj")
        add(f"{ours}.feed_forward.w3", f"{theirs}.mlp.down_proj")
        add(f"{ours}.feed_forward_norm", f"{theirs}.mlp_norm")
        if config.g_source != "learned":
            continue
        plga, their_plga = f"{ours}.attention.plga", f"{attention}.plga"
        add(f"{plga}.density_norm", f"{their_plga}.density_norm", rows=(0,))
        for name in ("W", "b", "P", "a", "b_a"):
            table[f"{plga}.{name}"] = [Part(f"{their_plga}.{name}", (1, 2))]
        for r in range(config.num_reslayerA):
            unit = f"metric_learner.{r}"
            for j in range(config.num_denseA):
                glu, their_glu = f"{plga}.{unit}.glus.{j}", f"{their_plga}.{unit}.glus.{j}"
                gate_up = [f"{their_glu}.gate_proj", f"{their_glu}.up_proj"]
                table[f"{glu}.w12.weight"] = [Part(f"{name}.weight", (1,)) for name in gate_up]
                table[f"{glu}.w12.bias"] = [Part(f"{name}.bias") for name in gate_up]
                add(f"{glu}.w3", f"{their_glu}.down_proj", rows=(0,))
            add(f"{plga}.{unit}.norm", f"{their_plga}.{unit}.norm", rows=(0,))
    add("output", "lm_head")
    return table
