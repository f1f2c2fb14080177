"""How much PLGA costs: training steps and cached decoding against the model's own SDPA twin.

The twin has the same sizes with G = identity and no metric learner. Both run in one process, step by step in
turn, so that a busy machine slows both alike; a ratio is the median of each round's. At a ratio of 1 PLGA costs
nothing. Known at 110M sizes, S 1024, one CPU thread: 0.90 to 0.92 for training, 0.97 to 1 for decoding (G
cached). Where they decode, both read the same weights: of two copies, which lie on other pages of memory, one was a
quarter slower (2026-11-28).
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from pldr_model.config import ModelConfig
from pldr_model.decode.decoder import Decoder
from pldr_model.loss import total_loss
from pldr_model.model import PLDRModel, g_shape


def bench(
    config: ModelConfig,
    *,
    batch_size: int = 4,
    steps: int = 5,
    decode_tokens: int = 64,
    prompt_length: int = 16,
    seed: int = 0,
) -> dict[str, Any]:
    """Time `steps` training steps (forward, backward, AdamW) on full contexts and `decode_tokens` decoding
    steps of one row with KV- and G-cache, after one warm-up of each, in fp32 on the GPU if there is one, else
    the CPU.

    Returns tokens per second of model and twin (medians), the ratios of their speed (model / twin), and memory;
    `train_ratio_to_sdpa_frozen` is of the model with a constant G, as training continues after `train.freeze_g`.
    `peak_rss_mb` is the process's peak resident memory (Python and libraries included) after the model's
    first complete training step, before the twin exists; `peak_rss_with_twin_mb` at the end. `peak_cuda_mb`
    (only on a GPU) is allocator memory.
    Errors: ValueError where prompt and decoded tokens do not fit the context.
    """
    if prompt_length + decode_tokens > config.context_length:
        raise ValueError(
            f"decode_tokens: {prompt_length} + {decode_tokens} tokens are over the context_length of "
            f"{config.context_length}; decode fewer"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    first_id = min(4, config.vocab_size - 1)  # past the special ids: no padding among the random tokens
    size = (batch_size, config.context_length + 1)
    ids_BS = torch.randint(first_id, config.vocab_size, size, device=device)
    model = PLDRModel(config).to(device)
    train_model = _training_step(model, ids_BS)
    train_model()
    _wait(device)
    peak_rss_mb = _peak_rss_mb()
    twin = PLDRModel(config.sdpa_twin()).to(device)
    train_twin = _training_step(twin, ids_BS)
    train_twin()
    model_seconds, twin_seconds, ratio = in_turn(train_model, train_twin, steps, device)
    tokens = batch_size * config.context_length
    result: dict[str, Any] = {
        "train_tokens_per_second": tokens / model_seconds,
        "train_tokens_per_second_sdpa": tokens / twin_seconds,
        "train_ratio_to_sdpa": 1 / ratio,
    }
    del model_seconds, twin_seconds, train_model
    g_lm_LHKK = torch.randn(g_shape(config))
    frozen = PLDRModel(config.with_constant_g(), g_lm_LHKK=g_lm_LHKK).to(device)
    train_frozen = _training_step(frozen, ids_BS)
    train_frozen()
    result["train_ratio_to_sdpa_frozen"] = 1 / in_turn(train_frozen, train_twin, steps, device)[2]
    prompt_1S = ids_BS[:1, :prompt_length]
    decode_model = _decoding_step(Decoder.of(model), prompt_1S, decode_tokens)
    decode_twin = _decoding_step(Decoder(config.sdpa_twin(), model.state_dict()), prompt_1S, decode_tokens)
    model_seconds, twin_seconds, ratio = in_turn(decode_model, decode_twin, decode_tokens, device)
    result |= {
        "decode_tokens_per_second": 1 / model_seconds,
        "decode_tokens_per_second_sdpa": 1 / twin_seconds,
        "decode_ratio_to_sdpa": 1 / ratio,
        "peak_rss_mb": peak_rss_mb,
        "peak_rss_with_twin_mb": _peak_rss_mb(),
        "parameters": config.num_parameters()["total"],
        "threads": torch.get_num_threads(),
        "device": str(device),
        "batch_size": batch_size,
        "context_length": config.context_length,
        "steps": steps,
    }
    if device.type == "cuda":
        result["peak_cuda_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return result


def training_flops_per_second(config: ModelConfig, *, batch_size: int = 1, tokens: int = 128, steps: int = 3) -> float:
    """FLOP/s that forward and backward passes of this model reach on this machine, on sequences cut to `tokens`, in fp32: the
    median of `steps` after one warm-up. Without the optimizer, whose work does not grow with the tokens."""
    source = "constant" if config.g_source == "file" else config.g_source
    cut = replace(config, context_length=min(tokens, config.context_length), g_source=source, g_file=None)
    model = PLDRModel(cut)
    ids_BS = torch.randint(min(4, cut.vocab_size - 1), cut.vocab_size, (batch_size, cut.context_length + 1))
    seconds = []
    for _ in range(1 + steps):
        started = time.perf_counter()
        torch.autograd.backward(model(ids_BS[:, :-1], targets=ids_BS[:, 1:], padded=False).loss)
        seconds.append(time.perf_counter() - started)
        model.zero_grad()
    return batch_size * cut.context_length * cut.flops_per_token(training=True) / statistics.median(seconds[1:])


def _training_step(model: PLDRModel, ids_BS: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1)
    regularized = any(model.config.dag_coefficients)

    def step() -> None:
        result = model(ids_BS[:, :-1], targets=ids_BS[:, 1:], padded=False, return_outputs=regularized)
        tokens, outputs = result if regularized else (result, None)
        losses = total_loss(tokens, model.config, outputs=outputs)
        optimizer.zero_grad()
        torch.autograd.backward(losses.total)
        optimizer.step()

    return step


def _decoding_step(decoder: Decoder, prompt_1S: torch.Tensor, num_tokens: int) -> Callable[[], None]:
    """Prefill (not timed), then each call decodes one greedy token."""
    cache, logits_1V = decoder.prefill(prompt_1S[0], capacity=prompt_1S.shape[1] + num_tokens)
    last_1 = logits_1V.argmax(dim=-1)

    def step() -> None:
        nonlocal last_1
        last_1 = decoder.step(last_1, cache).argmax(dim=-1)

    return step


def in_turn(
    one: Callable[[], None], other: Callable[[], None], rounds: int, device: torch.device
) -> tuple[float, float, float]:
    """Median seconds of each, run alternately (the first of a round alternates too), and the median over rounds of one / other,
    which is not affected by what slows both in a round."""
    seconds: dict[Callable[[], None], list[float]] = {one: [], other: []}
    for index in range(rounds):
        for run in (one, other) if index % 2 == 0 else (other, one):
            started = time.perf_counter()
            run()
            _wait(device)
            seconds[run].append(time.perf_counter() - started)
    ratio = statistics.median(ours / theirs for ours, theirs in zip(seconds[one], seconds[other], strict=True))
    return statistics.median(seconds[one]), statistics.median(seconds[other]), ratio


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_rss_mb() -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
