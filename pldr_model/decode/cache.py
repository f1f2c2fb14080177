"""KV-cache: what decoding keeps of the tokens it has read.

Background (2502.13502): with G_LM held constant a PLDR-LLM decodes like any SDPA decoder; the keys and values of past
tokens are kept (KV-cache) and the metric learner never runs again (G-cache).
Decisions. The memory is allocated once and never moves, and where the next token goes is a tensor, so that a step can be
captured. Each length is known twice: on the device, and on the host without asking the device (nothing that the device computes
changes a length). From the host's come the assertions and `bound`, the keys that a step attends over: rounded up, so that it
rarely changes; a mask hides what lies between. A head's keys lie together [T,K], as attention reads them; the 2 H vectors of a
token are written by one `index_copy_`. No key is padding here: prompts come unpadded, and an id equal to pad_id that a model
generates is a token like any other (so does the reference).

Shapes: L layers, B rows, H heads, T capacity in tokens, K head dim, r width of a group's keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pldr_model.decode import huge_pages

BOUND_STEP = 64  # `bound` is a multiple of it, so views (and captured graphs) are made anew only every 64 tokens


@dataclass(frozen=True)
class KeyGroup:
    """Heads of a layer whose keys have one width: K, or fewer numbers where G_LM is cut to a lower rank."""

    num_heads: int
    width: int


@dataclass(frozen=True)
class LayerShape:
    """What a layer keeps of a token: keys of each group, and the values of all heads."""

    keys: tuple[KeyGroup, ...]
    num_heads: int
    head_dim: int

    @property
    def fused(self) -> bool:
        """Keys are as wide as values: both are stored as one tensor, and written by one operation."""
        return self.keys == (KeyGroup(self.num_heads, self.head_dim),)

    @property
    def stores(self) -> tuple[KeyGroup, ...]:
        """Heads and width of the tensors that hold it."""
        if self.fused:
            return (KeyGroup(2 * self.num_heads, self.head_dim),)
        # Keys of few numbers stand as [width,T], each number a vector of its own.
        few = (KeyGroup(group.num_heads * group.width, 1) for group in self.keys)
        return (*few, KeyGroup(self.num_heads, self.head_dim))


class LayerMemory:
    """Keys and values of one layer: `stores` [B,heads,T,width] are the memory, `keys` (one a group) and `values` views."""

    def __init__(
        self, shape: LayerShape, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.stores = [
            huge_pages.zeros(batch_size, store.num_heads, capacity, store.width, dtype=dtype, device=device)
            for store in shape.stores
        ]
        self.flat = [store.view(-1, store.shape[-1]) for store in self.stores]  # [B*heads*T,width], to write to
        if shape.fused:
            keys, self.values = self.stores[0].chunk(2, dim=1)
            self.keys = [keys]
        else:
            *stores, self.values = self.stores
            self.keys = [
                store.view(batch_size, group.num_heads, group.width, capacity).mT
                for store, group in zip(stores, shape.keys, strict=True)
            ]

    def until(self, end: int) -> tuple[list[Tensor], Tensor]:
        """Keys and values of the first `end` tokens."""
        return [keys.narrow(2, 0, end) for keys in self.keys], self.values.narrow(2, 0, end)


class KVCache:
    """Rows of tokens that a `Decoder` has read; made by `Decoder.new_cache`.

    g: G of each layer where it is not the decoder's own: [H,K,K], or [B,H,K,K] where each row has one.
    lengths: tokens of each row; `length_B` the same on the device. bound: keys that a step attends over, host-known. scratch:
    the layers take turns in one memory, for a single pass that nothing follows.
    """

    @torch.inference_mode(False)  # a step that was compiled takes no tensors made in that mode
    def __init__(
        self,
        shapes: Sequence[LayerShape],
        *,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        g: list[Tensor] | None = None,
        scratch: bool = False,
    ) -> None:
        self.shapes, self.capacity, self.dtype, self.device, self.g = shapes, capacity, dtype, device, g
        kinds = {shape: LayerMemory(shape, batch_size, capacity, dtype, device) for shape in shapes} if scratch else {}
        self.layers = [kinds.get(shape) or LayerMemory(shape, batch_size, capacity, dtype, device) for shape in shapes]
        self.lengths = [0] * batch_size
        self.length_B = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.key_T = torch.arange(capacity, device=device)
        row_B1 = torch.arange(batch_size, device=device).unsqueeze(1)
        heads = {store.num_heads for shape in shapes for store in shape.stores}
        # Where in `flat` the vectors of a row's first token go, [B,heads], for each number of heads.
        self.first = {n: (row_B1 * n + torch.arange(n, device=device)) * capacity for n in heads}
        self._look(min(BOUND_STEP, capacity))

    @property
    def batch_size(self) -> int:
        """Number of rows, B."""
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(store.nbytes for layer in self.layers for store in layer.stores)

    def grow(self, num_new: int | Sequence[int], *, width: int | None = None) -> None:
        """Count `num_new` tokens more on the host, before they are read: one number for all rows, or one for each. width: where
        rows differ, the tokens that a pass writes to every row; those beyond a row's own number are padding, which its next
        tokens overwrite."""
        new = [num_new] * self.batch_size if isinstance(num_new, int) else num_new
        written = max(self.lengths) + (max(new) if width is None else width)
        assert written <= self.capacity, "more tokens than the cache was allocated for"
        self._set([length + more for length, more in zip(self.lengths, new, strict=True)])

    def rollback(self, lengths: Sequence[int]) -> None:
        """Forget each row's last tokens, so that so many stay."""
        assert all(keep <= length for keep, length in zip(lengths, self.lengths, strict=True)), "only shorter"
        self._set(list(lengths))
        self.length_B.copy_(torch.tensor(self.lengths))

    def reset(self, row: int) -> None:
        """Forget a row."""
        self.rollback([0 if index == row else length for index, length in enumerate(self.lengths)])

    def write_row(self, row: int, other: KVCache) -> None:
        """Put the only row of `other` (a prefilled prompt, with its G if it has its own) in the place of a row. All that was
        there is erased: a mask hides it, but NaN times zero is NaN."""
        (length,) = other.lengths
        for ours, theirs in zip(self.layers, other.layers, strict=True):
            for store, new in zip(ours.stores, theirs.stores, strict=True):
                store[row, :, :length] = new[0, :, :length]
                store[row, :, length:] = 0
        if self.g is not None and other.g is not None and self.g[0].ndim == 4:
            for mine, its in zip(self.g, other.g, strict=True):
                mine[row] = its[0]
        self.length_B[row] = other.length_B[0]
        self._set([length if index == row else old for index, old in enumerate(self.lengths)])

    def fork(self, rows: Sequence[int], *, room: int) -> KVCache:
        """A cache with a copy of these rows (one may come several times), and room for so many more tokens in each."""
        index, held = torch.tensor(rows, device=self.device), max(self.lengths[row] for row in rows)
        other = KVCache(
            self.shapes,
            batch_size=len(rows),
            capacity=held + room,
            dtype=self.dtype,
            device=self.device,
            g=[g[index] if g.ndim == 4 else g for g in self.g] if self.g is not None else None,
        )
        for theirs, ours in zip(other.layers, self.layers, strict=True):
            for copy, store in zip(theirs.stores, ours.stores, strict=True):
                copy[:, :, :held] = store[:, :, :held][index]
        other.length_B.copy_(self.length_B[index])
        other._set([self.lengths[row] for row in rows])
        return other

    def _set(self, lengths: list[int]) -> None:
        self.lengths = lengths
        bound = min(-(-max(lengths) // BOUND_STEP) * BOUND_STEP or BOUND_STEP, self.capacity)
        if bound != self.bound:
            self._look(bound)

    def _look(self, bound: int) -> None:
        """Views of the keys and values that a step attends over, of each layer."""
        self.bound = bound
        self.bounded = [layer.until(bound) for layer in self.layers]
