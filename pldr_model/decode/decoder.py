"""Decoder: a model's weights, prepared for reading tokens on top of a KV cache.

At small sizes a step is bound by Python and launches, at large ones by reading weights; so a layer here is a row of plain
tensor functions on weights that may stay packed (`Matrix`), and G costs one of them.
Decisions. RoPE turns pairs of numbers, so queries and keys are seen as complex numbers and multiplied once, in place; for
`half`, whose pairs are K/2 apart, the rows of W_q and W_k (and G) are permuted at preparation so that pairs lie together. G is
applied to the query, one [K,K] product a head; for G = identity it is left out. sqrt(D) of the embedding is folded into the
epsilon of its LayerNorm. A step can be compiled, and is not: on one CPU thread, 4 layers x 128, that made 0.83 of the tokens
(2026-11-28, RoPE in real numbers for it). A decoder does not change after it is made, and all that a pass changes is in its
cache: any number of threads can use one, each with caches of its own.

Shapes: B rows, S new tokens of a row, N = B*S tokens, D model width, H heads, K head dim, T keys, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pldr_model.config import ModelConfig
from pldr_model.decode import huge_pages
from pldr_model.decode.cache import KeyGroup, KVCache, LayerMemory, LayerShape
from pldr_model.decode.kernels import prepare
from pldr_model.decode.linear import Matrix, Product, Stored
from pldr_model.decode.low_rank_keys import LowRankKeys
from pldr_model.layers import rope_tables
from pldr_model.model import PLDRModel, g_shape

CACHED = 1 << 19  # numbers of a packed matrix that is unpacked
CHUNK = 512  # tokens of a prompt that are read at once: scores need CHUNK x T numbers a head at most

Weights = Mapping[str, Matrix | Tensor]


class Norm(NamedTuple):
    """LayerNorm over D."""

    shape: tuple[int]
    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class Layer:
    """The weights of a decoder layer; `g` [H,K,K] is its constant G, None for the identity (or one that prompts bring).
    low_rank: how it attends over low-rank keys, None for full ones; qkv then gives the heads in the order that it wants."""

    qkv: Product
    output: Product
    attention_norm: Norm
    gate_value: Product
    down: Product
    feed_forward_norm: Norm
    g: Tensor | None
    low_rank: LowRankKeys | None

    @property
    def products(self) -> tuple[Product, ...]:
        """All matrices."""
        return self.qkv, self.output, self.gate_value, self.down


@dataclass(frozen=True)
class Pass:
    """Where the tokens of one pass stand: what all layers share."""

    rows: int  # B
    tokens: int  # S
    rotation_ND: Tensor  # complex, of all pairs of queries and keys
    place: dict[int, Tensor]  # number of heads n -> where in a store of n heads the vectors go, [N*n]
    mask: Tensor | None  # added to the scores, [B,1,S,T]
    causal: bool
    end: int | None  # keys that are attended over; None: the cache's `bound`


class Decoder:
    """Reads tokens on top of those in a cache.

    weights: a model's state dict; a `Matrix` in the place of NAME.weight brings its bias along. g_lm: the constant G [L,H,K,K];
    None: identity, or, with `deduce` (ids [1,S] -> [L,1,H,K,K]), the G of each prompt. key_ranks [L,H]: how many numbers of a
    key its cache holds; G is then of these ranks (low_rank.py).
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        g_lm: Tensor | None = None,
        key_ranks: Tensor | None = None,
        *,
        deduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.config, self.deduce = config, deduce
        norm = _tensor(weights, "embedding_norm.weight")
        self.device, self.dtype = norm.device, norm.dtype
        H, K = config.num_heads, config.head_dim
        self._pairs_K = torch.arange(K, device=self.device)
        if config.rope_style == "half":
            self._pairs_K = self._pairs_K.view(2, K // 2).T.flatten()
        self._embedding = _matrix(weights, "embedding")
        self._embedding_norm = _norm(weights, "embedding_norm", config.layer_norm_eps / config.d_model)
        self._output = self._product(_matrix(weights, "output"), exact=True)
        g = [None] * config.num_layers if g_lm is None else self.prepare_g(g_lm)
        low_rank: list[LowRankKeys | None] = [None] * config.num_layers
        if key_ranks is not None:
            assert g_lm is not None, "the identity has no low rank"
            low_rank = [LowRankKeys.of(own, r) for own, r in zip(self.prepare_g(g_lm), key_ranks.cpu(), strict=True)]
        self._layers = [
            self._layer(weights, f"layers.{index}", g[index], low_rank[index]) for index in range(config.num_layers)
        ]
        full = (KeyGroup(H, K),)
        self._shapes = [LayerShape(keys.groups if keys else full, H, K) for keys in low_rank]
        cos, sin = rope_tables(config, config.context_length, dtype=self.dtype, device=self.device)
        self._rotation_TP = torch.complex(cos, sin)
        self._wide = cos.dtype == self.dtype
        self._seen, self._hidden = torch.tensor([0.0, -torch.inf], dtype=self.dtype, device=self.device)
        products = [product for layer in self._layers for product in layer.products]
        huge_pages.collapse(tensor for product in (self._output, *products) for tensor in product.tensors)

    @classmethod
    @torch.no_grad()
    def of(cls, model: PLDRModel, *, key_ranks: Tensor | None = None) -> Decoder:
        """A model's decoder, with its own tensors where nothing is permuted. A later change of them may or may not be seen."""
        source = model.config.g_source
        weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        if source == "learned":
            return cls(model.config, weights, deduce=lambda ids_1S: model.compute_g(ids_1S, padded=False))
        return cls(model.config, weights, None if source == "identity" else model.constant_g().detach(), key_ranks)

    @torch.no_grad()
    def prepare_g(self, g_lm: Tensor) -> list[Tensor]:
        """[L,...,K,K] -> of each layer, with rows and columns as queries and keys have them here."""
        own = g_lm.to(device=self.device, dtype=self.dtype)
        if self.config.rope_style == "half":
            own = own[..., self._pairs_K, :][..., self._pairs_K]
        return list(own.unbind(0))

    @torch.inference_mode(False)  # whoever changes it need not be in that mode
    def new_cache(
        self, *, batch_size: int, capacity: int, g_lm: Tensor | None = None, scratch: bool = False
    ) -> KVCache:
        """An empty cache. `g_lm` [L,H,K,K] or [L,B,H,K,K] is the G to decode with, in place of the decoder's own. One that each
        prompt brings comes with `KVCache.write_row`. scratch: for a single pass."""
        g = None
        if g_lm is not None:
            if any(layer.low_rank for layer in self._layers):
                raise ValueError("g_lm: this decoder's keys have few numbers, by the ranks of its own G")
            L, *rest = g_shape(self.config)
            if tuple(g_lm.shape) not in ((L, *rest), (L, batch_size, *rest)):
                raise ValueError(
                    f"g_lm: shape {tuple(g_lm.shape)} is neither [L,H,K,K] = {(L, *rest)} nor [L,B,H,K,K] of {batch_size} rows"
                )
            g = self.prepare_g(g_lm)
        elif self.deduce is not None:
            L, *rest = g_shape(self.config)
            g = [torch.zeros(batch_size, *rest, dtype=self.dtype, device=self.device) for _ in range(L)]
        return KVCache(
            self._shapes,
            batch_size=batch_size,
            capacity=capacity,
            dtype=self.dtype,
            device=self.device,
            g=g,
            scratch=scratch,
        )

    def hidden(self, ids_BS: Tensor, *, g_lm: Tensor | None = None) -> Tensor:
        """What `logits` takes, [B,S,D], of whole sequences; nothing is kept. `g_lm` as in `new_cache`."""
        B, S = ids_BS.shape
        return self.read(ids_BS, self.new_cache(batch_size=B, capacity=S, g_lm=g_lm, scratch=True))

    @torch.inference_mode()
    def prefill(
        self,
        ids: Sequence[int] | Tensor,
        *,
        capacity: int | None = None,
        g_lm: Tensor | None = None,
        chunk: int = CHUNK,
    ) -> tuple[KVCache, Tensor]:
        """Read a prompt alone, `chunk` tokens at a time; returns its cache (one row) and the logits after it, [1,V]. A model
        that learns its G computes it from the prompt first, and decodes with it."""
        ids_1S = torch.as_tensor(ids, device=self.device).view(1, -1)
        if g_lm is None and self.deduce is not None:
            g_lm = self.deduce(ids_1S)
        cache = self.new_cache(batch_size=1, capacity=capacity or ids_1S.shape[1], g_lm=g_lm)
        for piece_1S in torch.split(ids_1S, chunk, dim=1):
            hidden_1SD = self.read(piece_1S, cache)
        return cache, self.logits(hidden_1SD[:, -1])

    @torch.inference_mode()
    def read(self, ids_BS: Tensor, cache: KVCache, *, lengths: Sequence[int] | None = None) -> Tensor:
        """Read new tokens on top of those in `cache`; returns what `logits` takes, [B,S,D]. lengths: how many of a row's tokens
        count, where rows differ; the others, at its end, are read and forgotten."""
        B, S = ids_BS.shape
        start, end = cache.length_B.unsqueeze(1), max(cache.lengths) + S
        causal = not any(cache.lengths)
        cache.grow(S if lengths is None else lengths, width=S)
        position_BS = start + torch.arange(S, device=self.device)
        place = {n: (first.unsqueeze(1) + position_BS.unsqueeze(2)).view(-1) for n, first in cache.first.items()}
        mask = None if causal else self._mask(position_BS, cache.key_T[:end])
        known_N = position_BS.clamp(max=self.config.context_length - 1).view(-1)  # padding may stand beyond
        where = Pass(B, S, self._rotation(known_N), place, mask, causal, end)
        x_ND = self._run(ids_BS.reshape(-1), cache, where)
        cache.length_B.add_(S if lengths is None else torch.tensor(lengths, device=self.device))
        return x_ND.view(B, S, -1)

    def logits(self, hidden_D: Tensor) -> Tensor:
        """[...,D] -> [...,V]."""
        return self._output(hidden_D)

    def step(self, ids_B: Tensor, cache: KVCache) -> Tensor:
        """Read one token a row; returns the logits after it, [B,V]. Waits for no device, and can be compiled as one graph."""
        cache.grow(1)
        with torch.inference_mode(not torch.compiler.is_compiling()):  # an eighth faster; the compiler does not know it
            return self.step_kernels(ids_B, cache)

    def step_kernels(self, ids_B: Tensor, cache: KVCache) -> Tensor:
        """What of a step runs on the device, after `cache.grow(1)`: the part that is captured, for each `cache.bound` anew."""
        length_B1 = cache.length_B.unsqueeze(1)
        place = {n: (first + length_B1).view(-1) for n, first in cache.first.items()}
        mask = self._mask(length_B1, cache.key_T[: cache.bound])
        where = Pass(len(ids_B), 1, self._rotation(cache.length_B), place, mask, False, None)
        x_ND = self._run(ids_B, cache, where)
        cache.length_B.add_(1)
        return self._output(x_ND)

    def _mask(self, position_BS: Tensor, key_T: Tensor) -> Tensor:
        """0 for the keys up to a query's own position, else -inf: [B,1,S,T]."""
        return torch.where(key_T > position_BS.view(len(position_BS), 1, -1, 1), self._hidden, self._seen)

    def _rotation(self, position_N: Tensor) -> Tensor:
        rotation_N1P = self._rotation_TP.index_select(0, position_N).unsqueeze(1)
        return rotation_N1P.expand(-1, 2 * self.config.num_heads, -1).flatten(1)

    def _run(self, ids_N: Tensor, cache: KVCache, where: Pass) -> Tensor:
        x_ND = self._embedding_norm(self._embedding.rows(ids_N).to(self.dtype))
        for index, layer in enumerate(self._layers):
            memory = cache.layers[index]
            attended = cache.bounded[index] if where.end is None else memory.until(where.end)
            heads_ND = self._attention(
                layer, x_ND, memory, attended, layer.g if cache.g is None else cache.g[index], where
            )
            h_ND = layer.attention_norm(layer.output(heads_ND).add_(x_ND))
            gate_NF, value_NF = layer.gate_value(h_ND).chunk(2, dim=-1)
            x_ND = layer.feed_forward_norm(layer.down(F.silu(gate_NF).mul_(value_NF)).add_(h_ND))
        return x_ND

    def _attention(
        self,
        layer: Layer,
        x_ND: Tensor,
        memory: LayerMemory,
        attended: tuple[list[Tensor], Tensor],
        g: Tensor | None,
        where: Pass,
    ) -> Tensor:
        """The heads' values, side by side: [N,D] -> [N,D]."""
        B, S, N, H, K = where.rows, where.tokens, len(x_ND), self.config.num_heads, self.config.head_dim
        qkv_NW = self._rotate(layer.qkv(x_ND), where)
        if layer.low_rank is not None:
            return layer.low_rank.attend(qkv_NW, memory, attended, where)
        D, W = H * K, qkv_NW.stride(0)
        memory.flat[0].index_copy_(0, where.place[2 * H], qkv_NW.narrow(1, D, 2 * D).reshape(-1, K))
        # One view instead of a split, a view and a transposition of it: a twentieth of a small step.
        if g is None or (g.ndim == 4 and B > 1):
            q_BHSK = qkv_NW.as_strided((B, H, S, K), (S * W, K, W, 1))
            q_BHSK = q_BHSK if g is None else q_BHSK @ g
        else:
            q_HNK = torch.bmm(qkv_NW.as_strided((H, N, K), (K, W, 1)), g if g.ndim == 3 else g[0])
            q_BHSK = q_HNK.as_strided((B, H, S, K), (S * K, N * K, K, 1))
        (keys,), values = attended
        heads_BHSK = F.scaled_dot_product_attention(q_BHSK, keys, values, attn_mask=where.mask, is_causal=where.causal)
        heads_NHK = heads_BHSK if S == 1 else heads_BHSK.transpose(1, 2)
        return heads_NHK.reshape(N, D)

    def _rotate(self, qkv_NW: Tensor, where: Pass) -> Tensor:
        """Turn queries and keys by their positions, in place."""
        qk_NW = qkv_NW.narrow(1, 0, 2 * self.config.d_model)
        complex_dtype = where.rotation_ND.dtype
        if self._wide:
            qk_NW.view(complex_dtype).mul_(where.rotation_ND)
        else:  # half precision has no complex numbers
            qk_NW.copy_(qk_NW.float().view(complex_dtype).mul_(where.rotation_ND).view(torch.float32))
        return qkv_NW

    def _product(self, matrix: Matrix, *, exact: bool = False) -> Product:
        """The matrix as a step multiplies with it. One that a CPU's cache holds in fp32 is unpacked: packed
        kernels gain where weights come from memory, and a call of them costs more."""
        if isinstance(matrix, Stored) and self.device.type == "cpu" and math.prod(matrix.shape) <= CACHED:
            return Matrix.fp(matrix.dense(), matrix.bias)
        return prepare(matrix, self.dtype, exact=exact)

    def _layer(self, weights: Weights, name: str, g: Tensor | None, low_rank: LowRankKeys | None) -> Layer:
        config = self.config
        qkv = _matrix(weights, f"{name}.attention.qkv")
        if config.rope_style == "half" or low_rank is not None:
            H, K = config.num_heads, config.head_dim
            heads_3H = torch.arange(3 * H, device=self.device) if low_rank is None else low_rank.heads_3H
            rows_3HK = heads_3H.unsqueeze(1) * K + torch.arange(K, device=self.device)
            rows_3HK[: 2 * H] = rows_3HK[: 2 * H, self._pairs_K]
            qkv = qkv.permuted(rows_3HK.flatten())
        eps = config.layer_norm_eps
        return Layer(
            self._product(qkv),
            self._product(_matrix(weights, f"{name}.attention.output")),
            _norm(weights, f"{name}.attention_norm", eps),
            self._product(_matrix(weights, f"{name}.feed_forward.w12")),
            self._product(_matrix(weights, f"{name}.feed_forward.w3")),
            _norm(weights, f"{name}.feed_forward_norm", eps),
            g,
            low_rank,
        )


def _tensor(weights: Weights, name: str) -> Tensor:
    tensor = weights[name]
    assert isinstance(tensor, Tensor), f"{name}: only products are packed"
    return tensor


def _matrix(weights: Weights, name: str) -> Matrix:
    weight = weights[f"{name}.weight"]
    if isinstance(weight, Matrix):
        return weight
    bias = f"{name}.bias"
    return Matrix.fp(weight, _tensor(weights, bias) if bias in weights else None)


def _norm(weights: Weights, name: str, eps: float) -> Norm:
    weight = _tensor(weights, f"{name}.weight")
    return Norm((len(weight),), weight, _tensor(weights, f"{name}.bias"), eps)
