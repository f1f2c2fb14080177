"""Stored weights and their products: against fp64 products of the unpacked numbers, over odd sizes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pldr_model.config import ModelConfig
from pldr_model.decode import decoder, kernels
from pldr_model.decode.decoder import Decoder
from pldr_model.decode.kernels import prepare
from pldr_model.decode.linear import GROUP, Matrix
from pldr_model.model import PLDRModel

SIZES = [(1, 1), (3, 5), (17, 40), (5, 2392), (100, 63), (31, 129), (48, 64), (340, 72)]
ROWS = [1, 2, 7, 33]
FORMATS = ["bf16", "int8", "int4"]


def make(kind: str, rows: int, columns: int, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> Matrix:
    """A random matrix; the second row's numbers are all zero."""
    own = torch.randn(rows) if bias else None
    if kind == "bf16":
        weight = torch.randn(rows, columns).bfloat16()
        weight[1:2] = 0
        return Matrix.bf16(weight, own, dtype=dtype)
    if kind == "int8":
        values = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
        scale = torch.rand(rows).index_fill_(0, torch.arange(rows)[1:2], 0.0)
        return Matrix.int8(values, scale, own, dtype=dtype)
    groups = -(-columns // GROUP)
    values = torch.randint(256, (rows, groups * GROUP // 2), dtype=torch.uint8)
    return Matrix.int4(values, torch.rand(rows, groups).bfloat16(), columns, own, dtype=dtype)


def packed(kind: str, weight: Tensor, bias: Tensor | None) -> Matrix:
    """This weight in a format, for fp64."""
    if kind == "bf16":
        return Matrix.bf16(weight.bfloat16(), bias, dtype=weight.dtype)
    if kind == "int8":
        scale = weight.abs().amax(1) / 127
        return Matrix.int8((weight / scale[:, None]).round().to(torch.int8), scale, bias, dtype=weight.dtype)
    padded = F.pad(weight, (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    scale = (padded.abs().amax(-1) / 7).bfloat16()
    integers = ((padded / scale.unsqueeze(-1)).round() + 8).clamp(0, 15).to(torch.uint8).flatten(1)
    return Matrix.int4(integers[:, ::2] | integers[:, 1::2] << 4, scale, weight.shape[1], bias, dtype=weight.dtype)


def error(y: Tensor, matrix: Matrix, x: Tensor) -> float:
    """Largest error beside what a product of these sizes rounds to: sums of |x| |w|."""
    bias = None if matrix.bias is None else matrix.bias.double()
    weight = dataclasses.replace(matrix, dtype=torch.float64).dense()  # type: ignore[type-var, call-arg]
    exact = F.linear(x.double(), weight, bias)
    scale = F.linear(x.double().abs(), weight.abs(), None if bias is None else bias.abs())
    return float(((y - exact).abs() / (scale + 1e-30)).max())


def check_all_sizes() -> None:
    """What a kernel that reads out of bounds may crash: run in a process of its own."""
    torch.manual_seed(0)
    for kind, allowed in (("bf16", 1e-2), ("int8", 2e-4), ("int4", 1e-2)):
        for rows, columns in SIZES:
            matrix = make(kind, rows, columns, bias=columns % 2 == 0)
            product = prepare(matrix)
            assert product.shape == matrix.shape == (rows, columns)
            for number in ROWS:
                x = torch.randn(number, columns) if number != 7 else torch.randn(columns, number).T
                y = product(x)
                assert y.dtype == x.dtype and y.shape == (number, rows)
                assert error(y, matrix, x) <= allowed, (kind, rows, columns, number)
                if kind != "int4":
                    alone = torch.cat([product(row) for row in x.split(1)])
                    assert error(alone, matrix, x) <= allowed
                    assert kind != "int8" or torch.equal(alone, y), "a row's numbers depend on its batch"


def test_packed_products_of_odd_sizes() -> None:
    """The property itself fails loudly: a crash of the kernel is an error of that process."""
    code = "import tests.pldr_model.decode.test_linear as t; t.check_all_sizes()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3]
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", FORMATS)
def test_stored_products_are_exact_in_fp64(kind: str) -> None:
    torch.manual_seed(1)
    matrix = make(kind, 33, 40, dtype=torch.float64)
    x = torch.randn(2, 3, 40, dtype=torch.float64)
    assert prepare(matrix, torch.float64) is matrix
    assert error(matrix(x), matrix, x) <= 1e-15
    assert matrix(x).dtype == torch.float64 and matrix(x).shape == (2, 3, 33)


@pytest.mark.parametrize("kind", [*FORMATS, "fp"])
def test_rows_permuted_and_dense(kind: str) -> None:
    torch.manual_seed(2)
    matrix = make(kind, 9, 40) if kind != "fp" else Matrix.fp(torch.randn(9, 40), torch.randn(9))
    order = torch.tensor([8, 0, 3, 3, 1])
    assert torch.equal(matrix.rows(order), matrix.dense()[order])
    other = matrix.permuted(order)
    assert torch.equal(other.dense(), matrix.dense()[order]) and torch.equal(other.bias, matrix.bias[order])  # type: ignore[arg-type, index]


@pytest.mark.parametrize("kind", FORMATS)
def test_packed_products_keep_their_bytes(kind: str) -> None:
    """In fp32 a number is 4 bytes; norm and bias aside, these are a half, a quarter and (scales included) 4.5 bits."""
    matrix = make(kind, 512, 256)
    share = {"bf16": 0.5, "int8": 0.25, "int4": 4.5 / 32}[kind]
    for product in (matrix, prepare(matrix)):
        assert product.nbytes <= (share + 0.03) * 4 * 512 * 256


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_that_are_not_finite_stay_so_and_zeros_give_the_bias(kind: str) -> None:
    """Generation finds failed rows by their logits."""
    product = prepare(make(kind, 64, 64))
    x = torch.randn(4, 64)
    x[1], x[2, 5], x[3] = 0.0, torch.nan, torch.inf
    y = product(x)
    assert y[0].isfinite().all() and not y[2].isfinite().all() and not y[3].isfinite().all()
    assert torch.equal(y[1], product(torch.zeros(1, 64))[0]) and y[1].isfinite().all()


def test_without_a_kernel_the_weight_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(matrix: Matrix) -> Matrix:
        raise RuntimeError("no such engine")

    monkeypatch.setitem(kernels.KERNELS, type(make("int8", 2, 2)), broken)
    kernels._works.cache_clear()
    try:
        matrix = make("int8", 30, 40)
        x = torch.randn(2, 40)
        assert error(prepare(matrix)(x), matrix, x) <= 1e-6
    finally:
        kernels._works.cache_clear()


def test_exact_products_of_bf16_round_nothing_but_the_weights() -> None:
    torch.manual_seed(4)
    matrix, x = make("bf16", 500, 600), torch.randn(3, 600)
    assert error(prepare(matrix, exact=True)(x), matrix, x) <= 1e-6 < error(prepare(matrix)(x), matrix, x)


def test_blocks_of_fp32_weights_are_the_product_and_no_copy() -> None:
    torch.manual_seed(3)
    for bias in (torch.randn(900), None):
        matrix = Matrix.fp(torch.randn(900, 600), bias)
        product = prepare(matrix)
        assert product is not matrix and product.shape == matrix.shape and product.nbytes == matrix.nbytes
        for shape in ((1, 600), (3, 600), (2, 4, 600), (33, 600)):
            x = torch.randn(shape)
            torch.testing.assert_close(product(x), matrix(x), rtol=1e-5, atol=1e-4)
        matrix.dense().zero_()  # seen by the blocks: they are views
        assert torch.equal(product(torch.ones(4, 600)), torch.zeros(4, 900) if bias is None else bias.expand(4, -1))
    assert isinstance(prepare(Matrix.fp(torch.randn(900, 600).double()), torch.float64), Matrix)


@pytest.mark.parametrize("rope_style", ["interleaved", "half"])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_packed_decoder_is_the_model_of_its_unpacked_weights(
    kind: str, rope_style: Literal["interleaved", "half"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp64 exactly, whatever the batch and the cache; in fp32 as near as the kernels round, or, unpacked, as fp32 does."""
    torch.manual_seed(4)
    config = ModelConfig(
        vocab_size=40, context_length=16, num_layers=2, num_heads=2, head_dim=8, d_ff=20, g_source="random"
    )
    config = dataclasses.replace(config, rope_style=rope_style)
    model = PLDRModel(config).double().eval().requires_grad_(False)
    weights: dict[str, Matrix | Tensor] = {}
    for name, tensor in model.state_dict().items():
        weights[name] = tensor
        if tensor.ndim == 2:
            matrix = packed(kind, tensor, model.state_dict().get(name.removesuffix("weight") + "bias"))
            weights[name] = matrix
            tensor.copy_(matrix.dense())
    ids = torch.randint(40, (3, 9))
    expected = model(ids, padded=False)
    exact = Decoder(config, weights, model.constant_g())
    cache = exact.new_cache(batch_size=3, capacity=9)
    exact.read(ids[:, :5], cache)
    steps = torch.stack([exact.step(ids[:, index], cache) for index in range(5, 9)], dim=1)
    torch.testing.assert_close(steps, expected[:, 5:], rtol=0, atol=1e-12)
    alone = exact.prefill(ids[1])[1][0]
    torch.testing.assert_close(alone, expected[1, -1], rtol=0, atol=1e-12)

    narrow = {
        name: dataclasses.replace(
            weight, bias=None if weight.bias is None else weight.bias.float(), dtype=torch.float32
        )  # type: ignore[type-var, call-arg]
        if isinstance(weight, Matrix)
        else weight.float()
        for name, weight in weights.items()
    }
    scale = expected.abs().max()
    small = Decoder(config, narrow, model.constant_g()).prefill(ids[1])[1][0]
    assert (small - expected[1, -1]).abs().max() <= 1e-5 * scale
    monkeypatch.setattr(decoder, "CACHED", 0)
    logits = Decoder(config, narrow, model.constant_g()).prefill(ids[1])[1][0]
    assert (logits - expected[1, -1]).abs().max() <= {"bf16": 0.02, "int8": 2e-4, "int4": 0.1}[kind] * scale
