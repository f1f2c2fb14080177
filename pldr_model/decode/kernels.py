"""Products on a CPU, with weights as they are stored.

Decision. What a step costs at batch 1 is the bytes of its weights, so they are multiplied packed, by one kernel for any number
of rows, and from memory that can be moved to huge pages (huge_pages.py). What attention rounds by its batch grows to a step of
the roundings below; int8's product itself gives a row the same numbers in any batch.

| stored | kernel | activations |
|---|---|---|
| fp32 | `linear`; from 3 to 32 rows in blocks of weights, which a cache keeps: 8 rows in two thirds of the time | fp32 |
| bf16 | oneDNN's, `mkldnn._linear_pointwise`; the output layer is unpacked in blocks, for logits | bf16, so is the result |
| int8 | oneDNN's VNNI and AMX, `onednn.qlinear_pointwise`, with exact sums | 16 bits, as two rows of bytes |
| int4 (layers) | `aten::_weight_int4pack_mm_for_cpu` | bf16, so is the result |

Not taken: `aten::_weight_int8pack_mm` (no faster at one row, three times slower at 32, result in bf16, reads out of bounds
where in_features is no multiple of 16); fbgemm's fp16 for bf16 weights (fp32 activations, but its memory cannot be reached: on
pages of 4 KB it took up to five times as long as fp32 on huge ones). torchao 0.18 has none of these in eager mode
(docs/compatibility.md). Speeds: docs/speed.md, `pldr bench decode`. Where the machine lacks a kernel, or it fails a trial of a
few numbers, the weight is unpacked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pldr_model.decode.linear import GROUP, Floating, Int4, Int8, Matrix, Product, Rounded

CHUNK = 256  # rows of x at a time: int8's sums take twice the result
STEPS = 32512  # 127 * 256: a row's largest activation becomes this integer, so both of its bytes are in -128..127
OFFSET = 32896.5  # 128 * 257, which makes both bytes positive, and a half, which makes truncation rounding
WEIGHT_ROWS = 256  # of fp32, which stay in a cache while they meet all rows of x
BLOCKED = range(3, 33)  # rows of x
LARGE = 1 << 19  # numbers of fp32 that no cache keeps
ROWS = 16  # int4's kernel takes a multiple of them


def prepare(matrix: Matrix, dtype: torch.dtype = torch.float32, *, exact: bool = False) -> Product:
    """The product to decode with in this dtype: packed if this machine has a kernel for it, else the matrix itself or (fp32 on
    a CPU without the kernel) its unpacked numbers. The matrix may be dropped then. exact: activations stay fp32."""
    if isinstance(matrix, Rounded) and exact:
        return matrix
    if isinstance(matrix, Rounded | Int8 | Int4) and dtype == torch.float32 and matrix.device.type == "cpu":
        return KERNELS[type(matrix)](matrix) if _works(type(matrix)) else Matrix.fp(matrix.dense(), matrix.bias)
    if (
        isinstance(matrix, Floating)
        and matrix.weight_RC.dtype == torch.float32
        and matrix.weight_RC.device.type == "cpu"
    ):
        return BlockedProduct(matrix) if matrix.weight_RC.numel() >= LARGE else matrix
    return matrix


class BlockedProduct(Product):
    """fp32 weights, in blocks of rows where that is faster. Shares the tensors."""

    def __init__(self, matrix: Floating) -> None:
        self._whole = matrix
        rows = [slice(start, start + WEIGHT_ROWS) for start in range(0, matrix.shape[0], WEIGHT_ROWS)]
        self._blocks = [(matrix.weight_RC[each], None if matrix.bias is None else matrix.bias[each]) for each in rows]

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() // x.shape[-1] not in BLOCKED:
            return self._whole(x)
        return torch.cat([F.linear(x, weight, bias) for weight, bias in self._blocks], dim=-1)

    @property
    def shape(self) -> tuple[int, int]:
        return self._whole.shape

    @property
    def nbytes(self) -> int:
        return self._whole.nbytes

    @property
    def tensors(self) -> list[Tensor]:
        return self._whole.tensors


class Bf16Product(Product):
    """bf16 weights, as oneDNN packs them."""

    def __init__(self, matrix: Rounded) -> None:
        self._shape = matrix.shape
        self._packed = torch.ops.mkldnn._reorder_linear_weight(matrix.values_RC, 1)
        self._bias_R = torch.zeros(self._shape[0]) if matrix.bias is None else matrix.bias

    def __call__(self, x: Tensor) -> Tensor:
        x_NC = x.reshape(-1, x.shape[-1]).bfloat16()
        y_NR = torch.ops.mkldnn._linear_pointwise(x_NC, self._packed, None, "none", [], "")
        return torch.add(y_NR, self._bias_R).view(*x.shape[:-1], self._shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    @property
    def nbytes(self) -> int:
        return 2 * self._shape[0] * self._shape[1] + self._bias_R.nbytes


class Int8Product(Product):
    """int8 weights.

    A row x of activations is `m / STEPS * (256 h + l)` with m its largest and h, l in -128..127: h and l are two rows of bytes
    for the kernel. A row of zeros gives garbage bytes, times m = 0; one with NaN or infinity gives no finite number.
    """

    def __init__(self, matrix: Int8) -> None:
        self._shape = matrix.shape
        self._packed = torch.ops.onednn.qlinear_prepack(matrix.values_RC, None)
        self._scale_R = matrix.scale_R.float()
        self._zero_R = torch.zeros(self._shape[0], dtype=torch.int64)
        self._bias_R = torch.zeros(self._shape[0]) if matrix.bias is None else matrix.bias
        self._offset = torch.tensor(OFFSET)

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim == 2 and len(x) <= CHUNK:
            return self._product(x)
        R, C = self._shape
        x_NC = x.reshape(-1, C)
        parts = (x_NC[start : start + CHUNK] for start in range(0, len(x_NC), CHUNK))
        return torch.cat([self._product(part) for part in parts]).view(*x.shape[:-1], R)

    def _product(self, x_NC: Tensor) -> Tensor:
        N, C = x_NC.shape
        largest_N1 = x_NC.abs().amax(dim=-1, keepdim=True)
        whole_M = torch.addcdiv(self._offset, x_NC, largest_N1, value=STEPS).int().flatten()
        halves_2NC = whole_M.view(torch.uint8).as_strided((2, N, C), (1, 4 * C, 4))  # the lower two of each four bytes
        bytes_2NC = halves_2NC.reshape(2 * N, C)
        y_2NR = torch.ops.onednn.qlinear_pointwise.default(
            bytes_2NC,
            1.0,
            128,
            self._packed,
            self._scale_R,
            self._zero_R,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        y_NR = y_2NR[:N].add_(y_2NR[N:], alpha=256)
        return torch.addcmul(self._bias_R, y_NR, largest_N1, value=1 / STEPS)

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    @property
    def nbytes(self) -> int:
        return self._shape[0] * (self._shape[1] + 16)


class Int4Product(Product):
    """int4 weights. The kernel reads a multiple of 16 rows and whole groups of columns: zeros fill both up."""

    def __init__(self, matrix: Int4) -> None:
        self._shape = matrix.shape
        integers_RC = F.pad(matrix.integers(slice(None)).int(), (0, 0, 0, -self._shape[0] % ROWS))
        scale_RG = F.pad(matrix.scale_RG, (0, 0, 0, -self._shape[0] % ROWS))
        self._missing = integers_RC.shape[1] - self._shape[1]
        self._packed = torch._convert_weight_to_int4pack_for_cpu(integers_RC, 1)
        self._scale_GR2 = torch.stack((scale_RG, torch.zeros_like(scale_RG)), dim=-1).transpose(0, 1).contiguous()
        self._bias_R = torch.zeros(self._shape[0]) if matrix.bias is None else matrix.bias

    def __call__(self, x: Tensor) -> Tensor:
        R, C = self._shape
        x_NC = x.reshape(-1, C).bfloat16().contiguous()
        if self._missing:
            x_NC = F.pad(x_NC, (0, self._missing))
        y_NR = torch._weight_int4pack_mm_for_cpu(x_NC, self._packed, GROUP, self._scale_GR2)
        return torch.add(y_NR[:, :R], self._bias_R).view(*x.shape[:-1], R)

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    @property
    def nbytes(self) -> int:
        return self._packed.nbytes + self._scale_GR2.nbytes + self._bias_R.nbytes


KERNELS: dict[type[Matrix], Callable[..., Product]] = {Rounded: Bf16Product, Int8: Int8Product, Int4: Int4Product}


@functools.cache
def _works(kind: type[Matrix]) -> bool:
    """Whether this machine has the kernel, and it multiplies the largest numbers right: without VNNI the sums of int8 may
    saturate."""
    generator = torch.Generator().manual_seed(0)
    x_NC = torch.ones(3, 72).index_fill_(0, torch.tensor([1]), -1.0)
    x_NC[2] = torch.randn(72, generator=generator)
    bias_R = torch.randn(20, generator=generator)
    matrix: Matrix
    if kind is Int8:
        matrix = Matrix.int8(torch.full((20, 72), 127, dtype=torch.int8), torch.rand(20, generator=generator), bias_R)
    elif kind is Int4:
        values_RP = torch.randint(256, (20, 48), generator=generator, dtype=torch.uint8)
        matrix = Matrix.int4(values_RP, torch.rand(20, 3, generator=generator).bfloat16(), 72, bias_R)
    else:
        matrix = Matrix.bf16(torch.randn(20, 72, generator=generator).bfloat16(), bias_R)
    if kind is Rounded and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False  # it would be emulated
    try:
        y_NR = KERNELS[kind](matrix)(x_NC)
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    expected_NR = matrix(x_NC.double())
    tolerance = 1e-4 if kind is Int8 else 2e-2
    return bool((y_NR - expected_NR).abs().max() <= tolerance * expected_NR.abs().max())
