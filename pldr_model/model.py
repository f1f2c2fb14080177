"""PLDRModel: token ids -> logits or losses, with a learned, a constant or a given energy-curvature tensor G_LM.

Background: arXiv 2410.16703 (architecture, post-norm), 2502.13502 (G_LM as a constant). A PLDR-LLM layer is a
decoder layer whose scores are `(q G_LM) k^T / sqrt(K)`; with G_LM = identity it is scaled dot-product
attention.
Decision: G is folded into the query (`q' = q G`), so that the fused attention kernel does the rest and no
S x S tensor exists unless there is padding to hide. G cannot be folded into W_q or W_k: RoPE is applied between them.

Shapes: B batch, S sequence, D = H*K model width, H heads, K head dim, V vocabulary, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pldr_model.config import ActivationCheckpointing, DecayOn, GFrom, ModelConfig
from pldr_model.constant_g import ConstantG
from pldr_model.layers import GLU, Linear, RopeTables, apply_rope, rope_tables
from pldr_model.loss import OutputLayer, TokenLosses
from pldr_model.mask import attention_mask, document_starts
from pldr_model.plga import PLGA, DeductiveOutputs


class Attention(nn.Module):
    """Power-law graph attention of one layer: [B,S,D] -> [B,S,D] and, when asked, its deductive outputs."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.rope_style = config.rope_style
        self.qkv = Linear(config.d_model, config.d_model, num_fused=3)
        self.plga: PLGA | ConstantG | None = None
        if config.g_source in ("learned", "constant"):
            self.plga = PLGA(config) if config.g_source == "learned" else ConstantG(config)
        self.output = Linear(config.d_model, config.d_model)

    def forward(
        self,
        x_BSD: Tensor,
        rope: RopeTables,
        *,
        g: Tensor | None = None,
        g_from: GFrom = "own",
        mask: Tensor | None = None,
        return_outputs: bool = False,
    ) -> tuple[Tensor, DeductiveOutputs | None]:
        """`g` [H,K,K] or [B,H,K,K] replaces the metric learner; `mask` (True = attend) replaces causal attention. `g_from`:
        as in `PLDRModel.forward`; the deductive outputs are what was deduced, of every sequence or (batch) of the first."""
        q_BHSK, k_BHSK, v_BHSK = self.project(x_BSD, rope)
        outputs: DeductiveOutputs | None = None
        if g is None and isinstance(self.plga, ConstantG):
            q_BHSK = self.plga(q_BHSK)
        elif g is None and self.plga is not None:
            outputs = self.plga(q_BHSK[:1] if g_from == "batch" else q_BHSK)
            g = outputs.G_LM.roll(-1, 0) if g_from == "neighbor" else outputs.G_LM
        if g is not None:
            q_BHSK = q_BHSK @ g.to(q_BHSK.dtype)
        heads_BHSK = F.scaled_dot_product_attention(q_BHSK, k_BHSK, v_BHSK, attn_mask=mask, is_causal=mask is None)
        y_BSD = self.output(heads_BHSK.transpose(1, 2).flatten(2))
        return y_BSD, outputs if return_outputs else None

    def project(self, x_BSD: Tensor, rope: RopeTables) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, each [B,H,S,K]."""
        qkv_BSNK = self.qkv(x_BSD).unflatten(-1, (3 * self.num_heads, self.head_dim))
        qk_BSNK, v_BSHK = qkv_BSNK.split((2 * self.num_heads, self.num_heads), dim=2)
        q_BHSK, k_BHSK = apply_rope(qk_BSNK, rope, style=self.rope_style).transpose(1, 2).chunk(2, dim=1)
        if self.plga is not None:  # each product of q would make a copy of its own and keep it for the backward pass
            q_BHSK, k_BHSK = q_BHSK.contiguous(), k_BHSK.contiguous()
        # A copy: as a view the values would keep all of qkv for the backward pass, three times as much.
        return q_BHSK, k_BHSK, v_BSHK.transpose(1, 2).contiguous()

    def energy_curvature(self, x_BSD: Tensor, rope: RopeTables) -> Tensor:
        """G_LM [B,H,K,K] of this layer's input, without attending."""
        assert isinstance(self.plga, PLGA), "a constant G is not computed"
        outputs: DeductiveOutputs = self.plga(self.project(x_BSD, rope)[0])
        return outputs.G_LM


class DecoderLayer(nn.Module):
    """Post-norm: `h = LN(attention(x) + x)`, `out = LN(GLU(h) + h)`. Compile this unit, not the whole model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.attention_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.feed_forward = GLU(config.d_model, config.feed_forward_size)
        self.feed_forward_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)

    def forward(
        self,
        x_BSD: Tensor,
        rope: RopeTables,
        *,
        g: Tensor | None = None,
        g_from: GFrom = "own",
        mask: Tensor | None = None,
        return_outputs: bool = False,
    ) -> tuple[Tensor, DeductiveOutputs | None]:
        """Arguments as in `Attention.forward`; the deductive outputs are None unless `return_outputs`."""
        y_BSD, outputs = self.attention(x_BSD, rope, g=g, g_from=g_from, mask=mask, return_outputs=return_outputs)
        h_BSD = self.attention_norm(y_BSD + x_BSD)
        return self.feed_forward_norm(self.feed_forward(h_BSD) + h_BSD), outputs


class PLDRModel(nn.Module):
    """Decoder-only PLDR-LLM. Weights are drawn from torch's global generator; `config` names the variant.

    A trained constant G (g_source `constant`) is a parameter of each layer. A model of a fixed G holds it as the buffer
    `g_lm` [L,H,K,K] (part of the state dict for `random` and `file`; for `identity` it is there to be read, but the product
    with it is left out). `g_lm_LHKK` hands over the G of g_source `file` when the configuration names no `g_file`.
    """

    g_lm: Tensor | None

    def __init__(self, config: ModelConfig, *, g_lm_LHKK: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        self.recompute_layers = False  # in the backward pass (set_activation_checkpointing)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)  # N(0, 1), torch's default
        self.embedding_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.output = OutputLayer(config.d_model, config.vocab_size)
        g_lm = _constant_g(config, g_lm_LHKK)
        self.register_buffer("g_lm", g_lm, persistent=config.g_source != "identity")

    def forward(
        self,
        ids_BS: Tensor,
        *,
        targets: Tensor | None = None,
        z_loss: float = 0.0,
        g_lm: Tensor | None = None,
        g_from: GFrom = "own",
        documents: Tensor | None = None,
        padded: bool | None = None,
        return_outputs: bool = False,
        last_only: bool = False,
    ) -> Tensor | TokenLosses | tuple[Tensor | TokenLosses, list[DeductiveOutputs]]:
        """Logits [B,S,V], or with `targets` their losses; with `return_outputs` also each layer's A, A_LM, A_P, G_LM [B,H,K,K].

        ids_BS: token ids, S <= context length. Ids equal to `pad_id` are padding: no query attends to them,
            while they still enter the density matrix (so does the reference).
        targets: [B,S], the id that follows each; `pad_id` where there is none. No logits of the whole batch are made then.
        z_loss: coefficient of the mean squared logsumexp of the logits in the loss.
        g_lm: [L,H,K,K] or [L,B,H,K,K]; replaces the model's own G. The metric learner is then not run.
        g_from: whose G a sequence gets: its `own`; that of the first sequence (`batch`: nothing else is deduced, and each
            layer returns outputs [1,H,K,K]); or that of the next one, the last that of the first (`neighbor`).
        documents: [B,S], which document each token of a packed sequence is of: each is then read as if it stood alone
            (mask.py). A learned G_LM still sums over the whole sequence, and so over all of its documents.
        padded: None: look for padding (on a GPU that waits for the device). False: the caller knows that
            there is none: causal kernel, no mask, no check; training passes this. True: build the mask without a
            look.
        last_only: logits after the last token only, [B,1,V]: what generation without a cache needs.
        Errors: ValueError for a sequence over the context, a g_lm of another shape, deductive outputs that do
        not exist; a g_from without a metric learner, or without a neighbor.
        """
        if return_outputs and (g_lm is not None or self.config.g_source != "learned"):
            raise ValueError("return_outputs: no metric learner runs with a constant or given G, so nothing is deduced")
        if g_from != "own" and (g_lm is not None or self.config.g_source != "learned"):
            raise ValueError(
                f"g_from {g_from!r}: no metric learner runs with a constant or given G, so there is no other"
            )
        if g_from == "neighbor" and len(ids_BS) == 1:
            raise ValueError("g_from 'neighbor': a batch of one sequence has no other whose G it could use")
        x_BSD, deduced = self._run_layers(
            ids_BS, g_lm=g_lm, g_from=g_from, documents=documents, padded=padded, return_outputs=return_outputs
        )
        result: Tensor | TokenLosses
        if targets is None:
            result = self.output(x_BSD[:, -1:] if last_only else x_BSD)
        else:
            result = self.output(x_BSD, targets, pad_id=self.config.pad_id, z_loss=z_loss)
        return (result, deduced) if return_outputs else result

    def hidden(self, ids_BS: Tensor, *, g_lm: Tensor | None = None, padded: bool | None = None) -> Tensor:
        """What `output` makes logits of, [B,S,D]: for whoever needs those of some tokens only. Arguments as in `forward`."""
        return self._run_layers(ids_BS, g_lm=g_lm, padded=padded, return_outputs=False)[0]

    def _run_layers(
        self,
        ids_BS: Tensor,
        *,
        g_lm: Tensor | None,
        padded: bool | None,
        return_outputs: bool,
        g_from: GFrom = "own",
        documents: Tensor | None = None,
    ) -> tuple[Tensor, list[DeductiveOutputs]]:
        """The decoder layers, one after the other."""
        x_BSD, rope, mask = self._enter(ids_BS, padded, documents)
        g_lm = self._g_in_force(g_lm, ids_BS.shape[0])
        deduced: list[DeductiveOutputs] = []
        for index, layer in enumerate(self.layers):
            g = None if g_lm is None else g_lm[index]
            run: Callable[..., tuple[Tensor, DeductiveOutputs | None]] = layer
            if self.recompute_layers and torch.is_grad_enabled():
                run = functools.partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False)
            x_BSD, outputs = run(x_BSD, rope, g=g, g_from=g_from, mask=mask, return_outputs=return_outputs)
            if outputs is not None:
                deduced.append(outputs)
        return x_BSD, deduced

    def compute_g(self, ids_BS: Tensor, *, padded: bool | None = None) -> Tensor:
        """G_LM of these sequences, [L,B,H,K,K]: the pass stops at the last layer's G, and keeps nothing else.

        A constant G is returned as it is, expanded over the batch (a view).
        """
        if self.config.g_source != "learned":
            return self.constant_g().unsqueeze(1).expand(-1, ids_BS.shape[0], -1, -1, -1)
        x_BSD, rope, mask = self._enter(ids_BS, padded)
        per_layer = []
        for layer in self.layers[:-1]:
            x_BSD, outputs = layer(x_BSD, rope, mask=mask, return_outputs=True)
            per_layer.append(outputs.G_LM)
        per_layer.append(cast(DecoderLayer, self.layers[-1]).attention.energy_curvature(x_BSD, rope))
        return torch.stack(per_layer)

    def constant_g(self) -> Tensor:
        """G_LM [L,H,K,K] of a model that deduces none: its buffer, or what its layers' parameters compose."""
        assert self.config.g_source != "learned", "a learned G needs an input"
        if self.g_lm is not None:
            return self.g_lm
        modules = [cast(DecoderLayer, layer).attention.plga for layer in self.layers]
        return torch.stack([module.composed() for module in modules if isinstance(module, ConstantG)])

    def _embed(self, ids_BS: Tensor) -> Tensor:
        x_BSD: Tensor = self.embedding_norm(self.embedding(ids_BS) * self.config.d_model**0.5)
        return x_BSD

    def _enter(
        self, ids_BS: Tensor, padded: bool | None, documents_BS: Tensor | None = None
    ) -> tuple[Tensor, RopeTables, Tensor | None]:
        """What every full pass starts with: embedded tokens, rotary tables, a mask if there is padding or several documents."""
        config, num_positions = self.config, ids_BS.shape[1]
        if num_positions > config.context_length:
            raise ValueError(f"sequence of {num_positions} tokens: over the context_length of {config.context_length}")
        if documents_BS is not None and documents_BS.shape != ids_BS.shape:
            raise ValueError(
                f"documents: shape {tuple(documents_BS.shape)} is not that of the ids, {tuple(ids_BS.shape)}"
            )
        padding_BS = ids_BS == config.pad_id
        is_padded = padded or (padded is None and bool(padding_BS.any()))
        x_BSD = self._embed(ids_BS)
        rope = rope_tables(config, num_positions, dtype=x_BSD.dtype, device=x_BSD.device)
        starts_BS, mask = None, None
        if documents_BS is not None:
            starts_BS = document_starts(documents_BS)
            positions_BS = torch.arange(num_positions, device=ids_BS.device) - starts_BS
            rope = RopeTables(rope.cos[positions_BS], rope.sin[positions_BS])
        if is_padded or starts_BS is not None:
            mask = attention_mask(padding_BS if is_padded else None, starts_BS)
        return x_BSD, RopeTables(rope.cos.unsqueeze(-2), rope.sin.unsqueeze(-2)), mask

    def _g_in_force(self, given: Tensor | None, batch_size: int) -> Tensor | None:
        """The given G (shape checked), else the fixed one; None where layers have their own or G is the identity."""
        if given is None:
            return None if self.config.g_source == "identity" else self.g_lm
        shape = g_shape(self.config)
        if tuple(given.shape) not in (shape, (shape[0], batch_size, *shape[1:])):
            raise ValueError(
                f"g_lm: shape {tuple(given.shape)} is neither [L,H,K,K] = {shape} nor [L,B,H,K,K] of {batch_size} rows"
            )
        return given


def set_activation_checkpointing(model: PLDRModel, what: ActivationCheckpointing) -> None:
    """What the backward pass recomputes instead of storing it: complete decoder layers (only the input of each is kept), or
    the metric learners alone, whose units keep 2 * num_denseA tensors of H*K x A_dff a sequence. The numbers are the same."""
    model.recompute_layers = what == "layer"
    for module in model.modules():
        if isinstance(module, PLGA):
            module.recompute = what == "metric_learner"


def is_metric_parameter(name: str) -> bool:
    """Is this parameter in a residual unit of a metric learner (and not W, b, P, a, b_a)?

    Their weight decay is what makes A, and with it G_LM, constant (the invariance budget), so they can have
    their own.
    """
    return ".metric_learner." in name


def optimizer_group(name: str, ndim: int, *, muon: bool, decay_on: DecayOn = "units") -> int:
    """Which of the optimizer's parameter groups this parameter is in: 1 what of the metric learner has its own weight decay
    (decay_on: its units, or their norms or GLUs alone), 2 with Muon the matrices of attention and feed-forward, 0 all else.
    Within a group parameters are in the module's order; DeepSpeed's checkpoints number them so."""
    if is_metric_parameter(name):
        return int(decay_on == "units" or (".glus." in name) == (decay_on == "glus"))
    return 2 if muon and ndim == 2 and name.startswith("layers.") else 0


def g_shape(config: ModelConfig) -> tuple[int, int, int, int]:
    """[L, H, K, K]: the shape of a constant G_LM of this model."""
    return (config.num_layers, config.num_heads, config.head_dim, config.head_dim)


def to_constant_g(model: PLDRModel, g_lm_LHKK: Tensor) -> PLDRModel:
    """v510 -> v510Gi: a copy of the model without its metric learner and with this G."""
    constant = PLDRModel(model.config.with_constant_g(), g_lm_LHKK=g_lm_LHKK)
    weight = model.embedding.weight
    constant.to(device=weight.device, dtype=weight.dtype)
    state = {name: value for name, value in model.state_dict().items() if ".plga." not in name and name != "g_lm"}
    missing, unexpected = constant.load_state_dict(state, strict=False)
    assert missing == ["g_lm"] and not unexpected
    return constant.train(model.training)


def load_g_file(path: str | Path, config: ModelConfig) -> Tensor:
    """Read G_LM [L,H,K,K], the only tensor of a safetensors file. Errors: ValueError (file, shape)."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if len(names) != 1:
                raise ValueError(f"{path}: holds {len(names)} tensors; a G file holds one, [L,H,K,K]")
            g_lm: Tensor = file.get_tensor(names[0])
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors ({error}); give a file with one G_LM tensor") from None
    if tuple(g_lm.shape) != g_shape(config):
        raise ValueError(f"{path}: {names[0]} has shape {tuple(g_lm.shape)}, the model needs {g_shape(config)}")
    return g_lm


def _constant_g(config: ModelConfig, given: Tensor | None) -> Tensor | None:
    """The buffer `g_lm` [L,H,K,K] of a model that trains no G."""
    if given is not None and (config.g_source != "file" or config.g_file is not None):
        raise ValueError("g_lm_LHKK: only for a model with g_source 'file' and no g_file")
    if config.g_source in ("learned", "constant"):
        return None
    if config.g_source == "identity":
        return torch.eye(config.head_dim).expand(g_shape(config)).clone()
    if config.g_source == "random":
        # Standard normal entries; an own CPU generator, so that every rank and device draws the same G.
        generator = torch.Generator().manual_seed(config.g_seed)
        return torch.randn(g_shape(config), generator=generator, device="cpu").to(torch.get_default_device())
    if config.g_file is not None:
        g_lm = load_g_file(config.g_file, config)
    elif given is None:
        raise ValueError("g_file: missing; g_source 'file' needs a g_file, or the G handed to the model")
    else:
        g_lm = given.detach().clone()
    if tuple(g_lm.shape) != g_shape(config):
        raise ValueError(f"g_lm_LHKK: shape {tuple(g_lm.shape)}, the model needs {g_shape(config)}")
    if not g_lm.isfinite().all():
        raise ValueError(f"{config.g_file or 'g_lm_LHKK'}: G_LM holds inf or NaN")
    return g_lm
