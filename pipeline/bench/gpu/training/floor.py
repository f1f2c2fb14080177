"""What no training step can be faster than: its FLOPs over the rate of a large bf16 product, its bytes over the bandwidth of a
copy, both measured here. The larger of the two is the floor.

Bytes: the optimizer's of every parameter, and of every token the activations that the backward pass reads, written once and
read once, with logits in bf16. A fused kernel or a chunked loss moves fewer, and then this is no floor for it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import torch

from pipeline.bench.gpu.training.setting import TrainSetting
from pipeline.bench.rounds import Memory, in_rounds
from pldr_model.config import ModelConfig

# bf16 weights read twice, their gradients written and read, fp32 copies, two moments, all read and written, weights written
BYTES_OF_PARAMETER = 2 * 2 + 2 * 2 + 3 * (4 + 4) + 2
PASSES = 3


def floor(setting: TrainSetting) -> Iterator[dict[str, Any]]:
    """The two ceilings, and the floor of a step at several micro batches."""
    copy = Memory(setting.buffer_bytes, setting.device).copy_bandwidth()
    rate = matrix_rate(setting.matrix, setting.device)
    yield {"what": "ceilings", "copy_gb_per_second": copy / 1e9, "bf16_tflops": rate / 1e12, "matrix": setting.matrix}
    for name, config in setting.models.items():
        for micro_batch in (setting.small, setting.usual, 4 * setting.usual):
            yield {"what": "floor", "model": name, "micro_batch": micro_batch} | step_floor(
                config, micro_batch, rate=rate, bandwidth=copy
            )


def matrix_rate(size: int, device: torch.device) -> float:
    """FLOP/s of a square bf16 product of random numbers."""
    one, other = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def work() -> None:
        for _ in range(PASSES):
            torch.mm(one, other)

    work()
    seconds = statistics.median(in_rounds({"mm": work}, PASSES, device)["mm"].seconds) / PASSES
    return 2 * size**3 / seconds


def step_floor(config: ModelConfig, micro_batch: int, *, rate: float, bandwidth: float) -> dict[str, float]:
    """Seconds of the FLOPs and of the bytes of a step, and tokens a second at the larger of the two."""
    tokens = micro_batch * config.context_length
    flops = tokens * config.flops_per_token(training=True)
    nbytes = config.num_parameters()["total"] * BYTES_OF_PARAMETER + tokens * activation_bytes(config)
    slower = max(flops / rate, nbytes / bandwidth)
    return {
        "flops": flops,
        "bytes": nbytes,
        "seconds_of_flops": flops / rate,
        "seconds_of_bytes": nbytes / bandwidth,
        "tokens_per_second": tokens / slower,
    }


def activation_bytes(config: ModelConfig) -> float:
    """Of a token, in bf16, each written and read: of a layer its input, q, k, v, the rotated q and k, q G, the heads, two sums
    before norms and one between, the GLU's two inputs and its product; the metric learner's H*K rows of a sequence; logits."""
    D, F = config.d_model, config.feed_forward_size
    layer = 11 * D + 3 * F
    learner = 0.0
    if config.g_source == "learned":
        units = config.num_reslayerA * (2 * config.head_dim + config.num_denseA * 3 * config.A_dff)
        learner = D * units / config.context_length
    return 2 * 2 * (config.num_layers * (layer + learner) + config.vocab_size)
