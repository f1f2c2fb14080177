"""The metric learner on a GPU: two Triton kernels that keep a tile of rows on chip through all GLUs of all units.

**These kernels have never run on a GPU**: nobody knows yet that they compile there, nor what they gain. They are checked
against fp64 in Triton's interpreter, on a CPU (tests/pldr_model/test_triton_metric_learner.py). So a model uses them only with
PLDR_METRIC_LEARNER=triton in the environment, on CUDA.

Forward: keeps nothing but what each GLU reads. Backward: walks the GLUs from the last to the first, computes what is hidden
again, and writes what the weights' gradients are products of; these products, over all rows, are cuBLAS's, so that no sum
depends on the order of tiles. Products are in the weights' dtype (fp32: without TF32) with fp32 sums; norms, gates and the
gradient that is passed on stay in fp32 on chip.

Shapes: R rows, K their length, F hidden size of a GLU, E = 2F, G GLUs, N units. A tile is [TR,TK]; F is walked in steps of TF.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, HIDDEN = 64, 64  # of a tile, and of a step through F: tl.dot takes 16 or more


@triton.jit
def _hidden(x, w12, b12, k, f, in_K, in_F, K: tl.constexpr, F: tl.constexpr, PRECISION: tl.constexpr):
    """Gates and values [TR,TF] of a step, in fp32."""
    weight = w12 + f[None, :] * K + k[:, None]
    mask = in_K[:, None] & in_F[None, :]
    gate = tl.dot(x, tl.load(weight, mask, 0.0), input_precision=PRECISION)
    value = tl.dot(x, tl.load(weight + F * K, mask, 0.0), input_precision=PRECISION)
    gate += tl.load(b12 + f, in_F, 0.0)[None, :].to(tl.float32)
    value += tl.load(b12 + F + f, in_F, 0.0)[None, :].to(tl.float32)
    return gate, value


@triton.jit
def _glu(x, w12, b12, w3, b3, k, in_K, K: tl.constexpr, F: tl.constexpr, TF: tl.constexpr, PRECISION: tl.constexpr):
    """W3(silu(W1 x) * W2 x) of a tile, in fp32."""
    y = tl.zeros(x.shape, tl.float32) + tl.load(b3 + k, in_K, 0.0)[None, :].to(tl.float32)
    for start in range(0, F, TF):
        f = start + tl.arange(0, TF)
        in_F = f < F
        gate, value = _hidden(x, w12, b12, k, f, in_K, in_F, K, F, PRECISION)
        activated = (gate * tl.sigmoid(gate) * value).to(x.dtype)
        weight = tl.load(w3 + k[None, :] * F + f[:, None], in_F[:, None] & in_K[None, :], 0.0)
        y += tl.dot(activated, weight, input_precision=PRECISION)
    return y


@triton.jit
def _normalized(x, in_K, eps, K: tl.constexpr):
    """Rows with mean 0 and variance 1, and 1 / their standard deviation."""
    centered = tl.where(in_K[None, :], x - tl.sum(x, 1)[:, None] / K, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, 1) / K + eps)
    return centered * rstd[:, None], rstd


@triton.jit
def _forward(
    rows, out, inputs, w12, b12, w3, b3, gamma, beta, R, eps,
    K: tl.constexpr, F: tl.constexpr, G: tl.constexpr, PER_UNIT: tl.constexpr,
    TR: tl.constexpr, TK: tl.constexpr, TF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * TR + tl.arange(0, TR)
    k = tl.arange(0, TK)
    in_K = k < K
    mask = (r < R)[:, None] & in_K[None, :]
    at = r[:, None] * K + k[None, :]
    x = tl.load(rows + at, mask, 0.0)
    y = x
    for glu in range(G):
        tl.store(inputs + glu * R * K + at, y, mask)
        here = _glu(
            y, w12 + glu * 2 * F * K, b12 + glu * 2 * F, w3 + glu * F * K, b3 + glu * K, k, in_K, K, F, TF, PRECISION
        )
        if (glu + 1) % PER_UNIT == 0:
            unit = glu // PER_UNIT
            normal, _ = _normalized(here + x.to(tl.float32), in_K, eps, K)
            scale = tl.load(gamma + unit * K + k, in_K, 0.0)[None, :].to(tl.float32)
            here = normal * scale + tl.load(beta + unit * K + k, in_K, 0.0)[None, :].to(tl.float32)
            x = here.to(x.dtype)
        y = here.to(x.dtype)
    tl.store(out + at, y, mask)


@triton.jit
def _backward(
    grad, d_rows, inputs, w12, b12, w3, b3, gamma, d_hidden, activated, d_out, d_norm, d_scaled, R, eps,
    K: tl.constexpr, F: tl.constexpr, G: tl.constexpr, PER_UNIT: tl.constexpr,
    TR: tl.constexpr, TK: tl.constexpr, TF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * TR + tl.arange(0, TR)
    k = tl.arange(0, TK)
    in_R, in_K = r < R, k < K
    mask = in_R[:, None] & in_K[None, :]
    at = r[:, None] * K + k[None, :]
    d = tl.load(grad + at, mask, 0.0).to(tl.float32)
    residual = d
    for step in range(G):
        glu = G - 1 - step
        unit = glu // PER_UNIT
        x = tl.load(inputs + glu * R * K + at, mask, 0.0)
        w12_g, b12_g, w3_g = w12 + glu * 2 * F * K, b12 + glu * 2 * F, w3 + glu * F * K
        if (glu + 1) % PER_UNIT == 0:  # through the unit's norm
            first = tl.load(inputs + unit * PER_UNIT * R * K + at, mask, 0.0).to(tl.float32)
            y = _glu(x, w12_g, b12_g, w3_g, b3 + glu * K, k, in_K, K, F, TF, PRECISION)
            normal, rstd = _normalized(y + first, in_K, eps, K)
            tl.store(d_norm + unit * R * K + at, d, mask)
            tl.store(d_scaled + unit * R * K + at, d * normal, mask)
            scaled = d * tl.load(gamma + unit * K + k, in_K, 0.0)[None, :].to(tl.float32)
            along = tl.sum(scaled * normal, 1)[:, None] / K
            d = tl.where(in_K[None, :], scaled - tl.sum(scaled, 1)[:, None] / K - normal * along, 0.0) * rstd[:, None]
            residual = d
        dy = d.to(x.dtype)
        tl.store(d_out + glu * R * K + at, dy, mask)
        d = tl.zeros(x.shape, tl.float32)
        for start in range(0, F, TF):
            f = start + tl.arange(0, TF)
            in_F = f < F
            inside = in_R[:, None] & in_F[None, :]
            gate, value = _hidden(x, w12_g, b12_g, k, f, in_K, in_F, K, F, PRECISION)
            sigmoid = tl.sigmoid(gate)
            weight = tl.load(w3_g + k[:, None] * F + f[None, :], in_K[:, None] & in_F[None, :], 0.0)
            d_activated = tl.dot(dy, weight, input_precision=PRECISION)
            d_value = (d_activated * gate * sigmoid).to(x.dtype)
            d_gate = (d_activated * value * sigmoid * (1.0 + gate * (1.0 - sigmoid))).to(x.dtype)
            at_f = glu * R * F + r[:, None] * F + f[None, :]
            at_e = glu * R * 2 * F + r[:, None] * 2 * F + f[None, :]
            tl.store(activated + at_f, (gate * sigmoid * value).to(x.dtype), inside)
            tl.store(d_hidden + at_e, d_gate, inside)
            tl.store(d_hidden + at_e + F, d_value, inside)
            weight = w12_g + f[:, None] * K + k[None, :]
            in_weight = in_F[:, None] & in_K[None, :]
            d += tl.dot(d_gate, tl.load(weight, in_weight, 0.0), input_precision=PRECISION)
            d += tl.dot(d_value, tl.load(weight + F * K, in_weight, 0.0), input_precision=PRECISION)
        if glu % PER_UNIT == 0:
            d += residual
    tl.store(d_rows + at, d.to(d_rows.dtype.element_ty), mask)


def learn(rows_RK: Tensor, glus: Sequence[Tensor], norms: Sequence[Tensor], eps: float) -> list[Tensor]:
    """As pldr_model/metric_learner.py's: the result [R,K], and what is kept, here what each GLU reads, [G,R,K]."""
    rows_RK = rows_RK.contiguous()
    stacked = _stacked(glus, norms)
    out_RK, inputs_GRK = torch.empty_like(rows_RK), rows_RK.new_empty(len(glus) // 4, *rows_RK.shape)
    _forward[_grid(rows_RK)](rows_RK, out_RK, inputs_GRK, *stacked, len(rows_RK), eps, **_sizes(stacked, rows_RK.dtype))
    return [out_RK, inputs_GRK]


def learn_backward(
    grad_RK: Tensor,
    kept: Sequence[Tensor],
    glus: Sequence[Tensor],
    norms: Sequence[Tensor],
    eps: float,
    with_weights: bool,
) -> list[Tensor | None]:
    """As pldr_model/metric_learner.py's."""
    (inputs_GRK,) = kept
    G, R, K = inputs_GRK.shape
    stacked = _stacked(glus, norms)
    E, N = stacked[0].shape[1], len(stacked[4])
    d_rows_RK, d_out_GRK = torch.empty_like(inputs_GRK[0]), torch.empty_like(inputs_GRK)
    d_hidden_GRE, activated_GRF = inputs_GRK.new_empty(G, R, E), inputs_GRK.new_empty(G, R, E // 2)
    d_norm_NRK = torch.empty(N, R, K, dtype=torch.float32, device=grad_RK.device)
    d_scaled_NRK = torch.empty_like(d_norm_NRK)
    written = (d_hidden_GRE, activated_GRF, d_out_GRK, d_norm_NRK, d_scaled_NRK)
    _backward[_grid(grad_RK)](
        grad_RK.contiguous(), d_rows_RK, inputs_GRK, *stacked[:5], *written, R, eps, **_sizes(stacked, grad_RK.dtype)
    )
    if not with_weights:
        return [d_rows_RK, *(None for _ in (*glus, *norms))]
    d_w12, d_w3 = torch.bmm(d_hidden_GRE.mT, inputs_GRK), torch.bmm(d_out_GRK.mT, activated_GRF)
    d_glus = zip(d_w12, d_hidden_GRE.sum(1), d_w3, d_out_GRK.sum(1), strict=True)
    d_norms = zip(d_scaled_NRK.sum(1).to(norms[0].dtype), d_norm_NRK.sum(1).to(norms[0].dtype), strict=True)
    return [d_rows_RK, *(d for ds in (*d_glus, *d_norms) for d in ds)]


def _stacked(glus: Sequence[Tensor], norms: Sequence[Tensor]) -> list[Tensor]:
    """w12 [G,E,K], b12 [G,E], w3 [G,K,F], b3 [G,K], gamma [N,K], beta [N,K]."""
    return [torch.stack(list(glus[part::4])) for part in range(4)] + [
        torch.stack(list(norms[part::2])) for part in range(2)
    ]


def _grid(rows_RK: Tensor) -> tuple[int]:
    return (triton.cdiv(len(rows_RK), ROWS),)


def _sizes(stacked: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Any]:
    (G, E, K), N = stacked[0].shape, len(stacked[4])
    return {
        "K": K,
        "F": E // 2,
        "G": G,
        "PER_UNIT": G // N,
        "TR": ROWS,
        "TK": max(16, triton.next_power_of_2(K)),
        "TF": HIDDEN,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",  # of half precision it says nothing
    }
