"""The weights of cached decoding: matrices as they are stored, in floating point, bf16, int8 or int4.

Decision. A stored matrix says what its numbers are: it gives rows (an embedding), permutes them, and multiplies by unpacking,
in any floating dtype and on any device (on a CPU a block of rows at a time; on a GPU all, which torch.compile may fuse).
`kernels.prepare` turns it into one that is multiplied packed, where this machine has a kernel for that.
int8: a scale for each row. int4: a bf16 scale for each 32 columns of a row, and two numbers a byte (low half: even column).

Shapes: R rows of the weight (out_features), C its columns (in_features), G groups of columns, N ids of any shape.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 32  # columns of int4 that share a scale
BLOCK = 1 << 17  # numbers that are unpacked at once: in fp32 they stay in a cache


class Product(ABC):
    """`y = x W^T + b` with a weight [R,C] and an optional bias [R]; unchanged after it is made, so threads share it."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """[...,C] -> [...,R], in x's dtype."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that it holds."""

    @property
    def tensors(self) -> list[Tensor]:
        """Those that hold them, as far as they can be reached."""
        return [tensor for tensor in vars(self).values() if isinstance(tensor, Tensor)]


class Matrix(Product):
    """A stored weight. Its `rows` and `dense` have the dtype it was made for; it multiplies in the dtype of x."""

    bias: Tensor | None

    @staticmethod
    def fp(weight_RC: Tensor, bias_R: Tensor | None = None) -> Matrix:
        """Floating point, in the dtype that x has; keeps the tensors themselves, no copy."""
        return Floating(weight_RC, bias_R)

    @staticmethod
    def bf16(weight_RC: Tensor, bias_R: Tensor | None = None, *, dtype: torch.dtype = torch.float32) -> Matrix:
        """bf16 numbers, to be computed with in `dtype`."""
        return Rounded(weight_RC, bias_R, dtype)

    @staticmethod
    def int8(
        values_RC: Tensor, scale_R: Tensor, bias_R: Tensor | None = None, *, dtype: torch.dtype = torch.float32
    ) -> Matrix:
        """`values * scale`, values int8 in -127..127."""
        return Int8(values_RC, scale_R, bias_R, dtype)

    @staticmethod
    def int4(
        values_RP: Tensor,
        scale_RG: Tensor,
        in_features: int,
        bias_R: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Matrix:
        """`(nibble - 8) * scale`: uint8 [R, 16 G] with bf16 scales [R,G], G = in_features / 32 rounded up."""
        return Int4(values_RP, scale_RG, in_features, bias_R, dtype)

    @abstractmethod
    def rows(self, ids_N: Tensor) -> Tensor:
        """Rows of the weight, without bias: [N] -> [N,C]. An embedding."""

    @abstractmethod
    def permuted(self, order_R: Tensor) -> Matrix:
        """Row i of the result is row `order_R[i]` of this one (with its bias)."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The weight [R,C], unpacked."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True, eq=False)
class Floating(Matrix):
    """`Matrix.fp`."""

    weight_RC: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_RC, self.bias)

    def rows(self, ids_N: Tensor) -> Tensor:
        return F.embedding(ids_N, self.weight_RC)

    def permuted(self, order_R: Tensor) -> Matrix:
        return replace(self, weight_RC=self.weight_RC[order_R], bias=_permuted(self.bias, order_R))

    def dense(self) -> Tensor:
        return self.weight_RC

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight_RC.shape[0], self.weight_RC.shape[1]


class Stored(Matrix):
    """Numbers that are unpacked when they are used."""

    bias: Tensor | None
    dtype: torch.dtype

    @abstractmethod
    def unpacked(self, rows: Tensor | slice, dtype: torch.dtype) -> Tensor:
        """These rows of the weight."""

    def __call__(self, x: Tensor) -> Tensor:
        parts = [F.linear(x, self.unpacked(rows, x.dtype)) for rows in self._blocks()]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def rows(self, ids_N: Tensor) -> Tensor:
        return self.unpacked(ids_N, self.dtype)

    def dense(self) -> Tensor:
        return torch.cat([self.unpacked(rows, self.dtype) for rows in self._blocks()])

    @property
    def device(self) -> torch.device:
        """Where its numbers are."""
        return next(tensor.device for tensor in vars(self).values() if isinstance(tensor, Tensor))

    def _blocks(self) -> Iterator[slice]:
        R, C = self.shape
        size = max(1, BLOCK // C) if self.device.type == "cpu" else R
        return (slice(start, start + size) for start in range(0, R, size))


@dataclass(frozen=True, eq=False)
class Rounded(Stored):
    """`Matrix.bf16`."""

    values_RC: Tensor
    bias: Tensor | None
    dtype: torch.dtype

    def unpacked(self, rows: Tensor | slice, dtype: torch.dtype) -> Tensor:
        return self.values_RC[rows].to(dtype)

    def permuted(self, order_R: Tensor) -> Matrix:
        return replace(self, values_RC=self.values_RC[order_R], bias=_permuted(self.bias, order_R))

    @property
    def shape(self) -> tuple[int, int]:
        return self.values_RC.shape[0], self.values_RC.shape[1]


@dataclass(frozen=True, eq=False)
class Int8(Stored):
    """`Matrix.int8`."""

    values_RC: Tensor
    scale_R: Tensor
    bias: Tensor | None
    dtype: torch.dtype

    def unpacked(self, rows: Tensor | slice, dtype: torch.dtype) -> Tensor:
        return self.values_RC[rows].to(dtype).mul_(self.scale_R[rows].to(dtype).unsqueeze(-1))

    def permuted(self, order_R: Tensor) -> Matrix:
        values_RC, scale_R = self.values_RC[order_R], self.scale_R[order_R]
        return replace(self, values_RC=values_RC, scale_R=scale_R, bias=_permuted(self.bias, order_R))

    @property
    def shape(self) -> tuple[int, int]:
        return self.values_RC.shape[0], self.values_RC.shape[1]


@dataclass(frozen=True, eq=False)
class Int4(Stored):
    """`Matrix.int4`."""

    values_RP: Tensor
    scale_RG: Tensor
    in_features: int
    bias: Tensor | None
    dtype: torch.dtype

    def unpacked(self, rows: Tensor | slice, dtype: torch.dtype) -> Tensor:
        values = self.integers(rows).to(dtype).sub_(8)
        scale = self.scale_RG[rows].to(dtype).repeat_interleave(GROUP, dim=-1)
        return values.mul_(scale)[..., : self.in_features]

    def integers(self, rows: Tensor | slice) -> Tensor:
        """0..15, uint8 [..., 32 G]; those beyond in_features are padding."""
        pairs = self.values_RP[rows]
        return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)

    def permuted(self, order_R: Tensor) -> Matrix:
        values_RP, scale_RG = self.values_RP[order_R], self.scale_RG[order_R]
        return replace(self, values_RP=values_RP, scale_RG=scale_RG, bias=_permuted(self.bias, order_R))

    @property
    def shape(self) -> tuple[int, int]:
        return self.values_RP.shape[0], self.in_features


def _permuted(bias_R: Tensor | None, order_R: Tensor) -> Tensor | None:
    return None if bias_R is None else bias_R[order_R]
