"""KV-cache and G-cache: what decoding stores of the tokens it has read.

Background (2502.13502): with G_LM held constant a PLDR-LLM decodes like any SDPA decoder; the K/V of past
tokens are kept (KV-cache) and the metric learner never runs again (G-cache). Decision: the K/V memory is
static, allocated once for a batch and a capacity. Rows may hold different numbers of tokens (prompts of
different lengths decode together); when all agree, which includes every batch of one, keys are sliced and no
mask is built. No key is padding here: prompts come unpadded, and an id equal to pad_id that a model generates
is a token like any other (so does the reference).

Shapes: L layers, B rows, H heads, T capacity in tokens, S new tokens, K head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pldr_model.config import ModelConfig
from pldr_model.layers import RopeTables, rope_tables


class CacheStep(NamedTuple):
    """What one pass of new tokens needs to know about the tokens before it; made by `KVCache.begin`."""

    start: int | Tensor  # position of the first new token, the same in all rows; or that of each new token, [B,S]
    end: int  # keys to attend over, the longest row's
    rope: RopeTables
    mask: Tensor | None  # True = attend, [B,1,S,T_end]; None: causal


class KVCache:
    """Keys and values of every layer, [L,B,H,T,K] each, and the G the rows decode with.

    `g_lm` is None until known; a prefill of a model that learns its G leaves the prompt's own G there,
    [L,B,H,K,K]. A given or constant G is [L,H,K,K] (or None for identity). `lengths` are the tokens each row
    holds.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        g_lm: Tensor | None = None,
    ) -> None:
        shape = (config.num_layers, batch_size, config.num_heads, capacity, config.head_dim)
        self.config = config
        self.k_LBHTK = torch.zeros(shape, dtype=dtype, device=device)
        self.v_LBHTK = torch.zeros(shape, dtype=dtype, device=device)
        self.g_lm = g_lm
        self.lengths = [0] * batch_size
        self.rope = rope_tables(config, capacity, dtype=dtype, device=device)

    @property
    def capacity(self) -> int:
        """Capacity of a row, in tokens."""
        return self.k_LBHTK.shape[3]

    def begin(self, num_new: int) -> CacheStep:
        """Lay out a pass: `num_new` tokens a row, each row's behind those it holds."""
        assert max(self.lengths) + num_new <= self.capacity, "more tokens than the cache was allocated for"
        start, end = self.lengths[0], max(self.lengths) + num_new
        if all(length == start for length in self.lengths) and (num_new == 1 or start == 0):
            return CacheStep(start, end, RopeTables(*(t[start:end].unsqueeze(1) for t in self.rope)), None)
        start_B = torch.tensor(self.lengths, device=self.k_LBHTK.device)
        position_BS = start_B.unsqueeze(1) + torch.arange(num_new, device=start_B.device)
        rope = RopeTables(*(t[position_BS].unsqueeze(2) for t in self.rope))
        return CacheStep(position_BS, end, rope, attention_mask(position_BS, end))

    def append(self, layer: int, step: CacheStep, k_BHSK: Tensor, v_BHSK: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values; returns all that are attended over, [B,H,T_end,K]."""
        for memory, new in ((self.k_LBHTK[layer], k_BHSK), (self.v_LBHTK[layer], v_BHSK)):
            if isinstance(step.start, int):
                memory[:, :, step.start : step.end] = new
            else:
                row_B1 = torch.arange(len(self.lengths), device=memory.device).unsqueeze(1)
                memory[row_B1, :, step.start] = new.transpose(1, 2)
        return self.k_LBHTK[layer, :, :, : step.end], self.v_LBHTK[layer, :, :, : step.end]

    def advance(self, num_new: int | Sequence[int]) -> None:
        """Every layer has stored its keys: the rows now hold `num_new` tokens more, each the same or its own number. What a
        row was given beyond its own number was padding: the next tokens take its place, and until then no query sees it."""
        new = [num_new] * len(self.lengths) if isinstance(num_new, int) else num_new
        self.lengths = [length + more for length, more in zip(self.lengths, new, strict=True)]

    def fork(self, rows: Sequence[int], *, room: int) -> KVCache:
        """A cache with a copy of these rows (one may come several times), and room for so many more tokens in each."""
        assert self.g_lm is None or self.g_lm.ndim == 4, "rows with a G of their own are continued in their own cache"
        lengths = [self.lengths[row] for row in rows]
        held = max(lengths)
        other = KVCache(
            self.config,
            batch_size=len(rows),
            capacity=held + room,
            dtype=self.k_LBHTK.dtype,
            device=self.k_LBHTK.device,
            g_lm=self.g_lm,
        )
        index = torch.tensor(rows, device=self.k_LBHTK.device)
        for layer in range(len(self.k_LBHTK)):
            other.k_LBHTK[layer, :, :, :held] = self.k_LBHTK[layer, index, :, :held]
            other.v_LBHTK[layer, :, :, :held] = self.v_LBHTK[layer, index, :, :held]
        other.lengths = lengths
        return other

    def stack_row(self, row: int, other: KVCache) -> None:
        """Copy the only row of `other` (a prefilled prompt, with its own G if it has one) into an empty row."""
        length = other.lengths[0]
        self.k_LBHTK[:, row, :, :length] = other.k_LBHTK[:, 0, :, :length]
        self.v_LBHTK[:, row, :, :length] = other.v_LBHTK[:, 0, :, :length]
        self.lengths[row] = length
        if other.g_lm is not None and other.g_lm.ndim == 5:
            if self.g_lm is None:
                L, _, H, K, _ = other.g_lm.shape
                self.g_lm = other.g_lm.new_empty(L, len(self.lengths), H, K, K)
            self.g_lm[:, row] = other.g_lm[:, 0]

    def keep(self, rows: list[int]) -> None:
        """Drop the rows that have ended; `rows` are the ones that continue."""
        index = torch.tensor(rows, device=self.k_LBHTK.device)
        self.k_LBHTK, self.v_LBHTK = self.k_LBHTK[:, index], self.v_LBHTK[:, index]
        self.lengths = [self.lengths[row] for row in rows]
        if self.g_lm is not None and self.g_lm.ndim == 5:
            self.g_lm = self.g_lm[:, index]


def attention_mask(position_BS: Tensor, num_keys: int, *, padding_BT: Tensor | None = None) -> Tensor:
    """Which query attends to which key, True = yes: [B,1,S,T]. Keys up to the query's own position that are not padding.

    A query with nothing but padding before it attends to itself, so that its softmax is finite (the reference
    averages over the whole sequence there, future included; such a query is padding itself and reaches no
    loss).
    """
    key_T = torch.arange(num_keys, device=position_BS.device)
    allowed_BST = key_T <= position_BS.unsqueeze(-1)
    if padding_BT is not None:
        allowed_BST = allowed_BST & ~padding_BT[:, None, :]
        own_BST = key_T == position_BS.unsqueeze(-1)
        allowed_BST = allowed_BST | (own_BST & ~allowed_BST.any(dim=-1, keepdim=True))
    return allowed_BST.unsqueeze(1)
