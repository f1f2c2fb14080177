"""The weights of cached decoding: a matrix in the storage it is multiplied in.

Shapes: O out_features, I in_features, N ids of any shape.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor


class Matrix(ABC):
    """A weight [O,I] with an optional bias [O], unchanged after it is made: `y = x W^T + b`."""

    bias: Tensor | None

    @staticmethod
    def fp(weight_OI: Tensor, bias_O: Tensor | None = None) -> Matrix:
        """Floating point, in the dtype that x has; keeps the tensors themselves, no copy."""
        return Floating(weight_OI, bias_O)

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """[...,I] -> [...,O], in x's dtype."""

    @abstractmethod
    def rows(self, ids_N: Tensor) -> Tensor:
        """Rows of the weight, without bias: [N] -> [N,I]. An embedding."""

    @abstractmethod
    def permuted(self, rows_O: Tensor) -> Matrix:
        """Row i of the result is row `rows_O[i]` of this one (with its bias)."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in vars(self).values() if isinstance(tensor, Tensor))


@dataclass(frozen=True, eq=False)
class Floating(Matrix):
    """`Matrix.fp`."""

    weight_OI: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_OI, self.bias)

    def rows(self, ids_N: Tensor) -> Tensor:
        return F.embedding(ids_N, self.weight_OI)

    def permuted(self, rows_O: Tensor) -> Matrix:
        return replace(self, weight_OI=self.weight_OI[rows_O], bias=None if self.bias is None else self.bias[rows_O])

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight_OI.shape[0], self.weight_OI.shape[1]
