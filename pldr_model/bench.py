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

from pldr_model.config import GFrom, ModelConfig
from pldr_model.decode.decoder import Decoder
from pldr_model.loss import losses_of_logits, total_loss
from pldr_model.metric_learner import run_as_modules
from pldr_model.model import PLDRModel, g_shape


def bench(
    config: ModelConfig,
    *,
    batch_size: int = 4,
    steps: int = 5,
    decode_tokens: int = 64,
    prompt_length: int = 16,
    seed: int = 0,
    compiled: bool = False,
) -> dict[str, Any]:
    """Time `steps` training steps (forward, backward, AdamW) on full contexts and `decode_tokens` decoding
    steps of one row with KV- and G-cache, after one warm-up of each, in fp32 on the GPU if there is one, else
    the CPU.

    Returns tokens per second of model and twin (medians), the ratios of their speed (model / twin), and memory;
    `train_ratio_to_sdpa_modules` is of the model whose metric learner runs module by module (pldr_model/metric_learner.py),
    `train_ratio_to_sdpa_shared` of one G for all sequences (`train.g_from` batch; only with a learned G and several sequences),
    `train_ratio_to_sdpa_compiled` and `..._shared_compiled` (only with `compiled`) of compiled layers against the twin's, and
    `train_ratio_to_sdpa_frozen` is of the model with a constant G, as training continues after `train.freeze_g`.
    `loss_ratio_to_whole_logits`: speed of the output layer and its loss, both passes, over that of the same with the logits of
    all tokens in memory (`losses_of_logits`).
    `peak_rss_mb` is the process's peak resident memory (Python and libraries included) after the model's
    first complete training step, before the twin exists: in its passes there are no Adam moments yet. `peak_rss_steady_mb` is
    that after three steps, `peak_rss_with_twin_mb` that at the end. `peak_cuda_mb` (only on a GPU) is allocator memory.
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
    for _ in range(2):
        train_model()
    peak_rss_steady_mb = _peak_rss_mb()
    twin = PLDRModel(config.sdpa_twin()).to(device)
    train_twin = _training_step(twin, ids_BS)
    train_twin()
    model_seconds, twin_seconds, ratio = in_turn(train_model, train_twin, steps, device)
    tokens = batch_size * config.context_length
    result: dict[str, Any] = {
        "train_tokens_per_second": tokens / model_seconds,
        "train_tokens_per_second_sdpa": tokens / twin_seconds,
        "train_ratio_to_sdpa": 1 / ratio,
        "loss_ratio_to_whole_logits": _loss_ratio(model, ids_BS, steps),
    }
    del model_seconds, twin_seconds, train_model
    shares = config.g_source == "learned" and batch_size > 1
    if shares:
        train_shared = _training_step(model, ids_BS, g_from="batch")
        result["train_ratio_to_sdpa_shared"] = _ratio(train_shared, train_twin, steps, device)
        del train_shared
    by_modules = PLDRModel(config).to(device)
    run_as_modules(by_modules)
    result["train_ratio_to_sdpa_modules"] = _ratio(_training_step(by_modules, ids_BS), train_twin, steps, device)
    del by_modules
    if compiled:
        models = [PLDRModel(sizes).to(device) for sizes in (config, config.sdpa_twin())]
        of_model, of_twin = (_training_step(one, ids_BS, compiled=True) for one in models)
        result["train_ratio_to_sdpa_compiled"] = _ratio(of_model, of_twin, steps, device)
        if shares:
            of_model = _training_step(models[0], ids_BS, g_from="batch")
            result["train_ratio_to_sdpa_shared_compiled"] = _ratio(of_model, of_twin, steps, device)
        del models, of_model, of_twin
    g_lm_LHKK = torch.randn(g_shape(config))
    frozen = PLDRModel(config.with_constant_g(), g_lm_LHKK=g_lm_LHKK).to(device)
    result["train_ratio_to_sdpa_frozen"] = _ratio(_training_step(frozen, ids_BS), train_twin, steps, device)
    prompt_1S = ids_BS[:1, :prompt_length]
    decode_model = _decoding_step(Decoder.of(model), prompt_1S, decode_tokens)
    decode_twin = _decoding_step(Decoder(config.sdpa_twin(), model.state_dict()), prompt_1S, decode_tokens)
    model_seconds, twin_seconds, ratio = in_turn(decode_model, decode_twin, decode_tokens, device)
    result |= {
        "decode_tokens_per_second": 1 / model_seconds,
        "decode_tokens_per_second_sdpa": 1 / twin_seconds,
        "decode_ratio_to_sdpa": 1 / ratio,
        "peak_rss_mb": peak_rss_mb,
        "peak_rss_steady_mb": peak_rss_steady_mb,
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


def training_flops_per_second(
    config: ModelConfig, *, batch_size: int = 1, tokens: int = 128, steps: int = 3, shared: bool = False
) -> float:
    """FLOP/s that forward and backward passes of this model reach on this machine, on sequences cut to `tokens`, in fp32: the
    median of `steps` after one warm-up. Without the optimizer, whose work does not grow with the tokens. shared: one G for
    all sequences."""
    source = "constant" if config.g_source == "file" else config.g_source
    cut = replace(config, context_length=min(tokens, config.context_length), g_source=source, g_file=None)
    model = PLDRModel(cut)
    ids_BS = torch.randint(min(4, cut.vocab_size - 1), cut.vocab_size, (batch_size, cut.context_length + 1))
    seconds = []
    for _ in range(1 + steps):
        started = time.perf_counter()
        losses = model(ids_BS[:, :-1], targets=ids_BS[:, 1:], g_from="batch" if shared else "own", padded=False)
        torch.autograd.backward(losses.loss)
        seconds.append(time.perf_counter() - started)
        model.zero_grad()
    flops = cut.flops_per_token(training=True, sequences_per_g=batch_size if shared else 1)
    return batch_size * cut.context_length * flops / statistics.median(seconds[1:])


def _ratio(train: Callable[[], None], train_twin: Callable[[], None], steps: int, device: torch.device) -> float:
    """Speed of a training step beside the twin's, after one warm-up of each."""
    train()
    train_twin()
    return 1 / in_turn(train, train_twin, steps, device)[2]


def _training_step(
    model: PLDRModel, ids_BS: torch.Tensor, *, compiled: bool = False, g_from: GFrom = "own"
) -> Callable[[], None]:
    """With the trainer's optimizer: AdamW in one kernel."""
    if compiled:
        for layer in model.layers:
            layer.compile()
    weights = model.parameters()
    optimizer = torch.optim.AdamW(weights, lr=1e-4, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, fused=True)
    regularized = any(model.config.dag_coefficients)

    def step() -> None:
        result = model(ids_BS[:, :-1], targets=ids_BS[:, 1:], g_from=g_from, padded=False, return_outputs=regularized)
        tokens, outputs = result if regularized else (result, None)
        losses = total_loss(tokens, model.config, outputs=outputs)
        torch.autograd.backward(losses.total)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _loss_ratio(model: PLDRModel, ids_BS: torch.Tensor, rounds: int) -> float:
    """How many times as fast losses of random hidden states are without the logits of all tokens as with them."""
    targets_BS, pad_id = ids_BS[:, 1:], model.config.pad_id
    x_BSD = torch.randn(*targets_BS.shape, model.config.d_model, device=ids_BS.device, requires_grad=True)

    def clear() -> None:
        x_BSD.grad = None
        model.zero_grad()

    def chunked() -> None:
        torch.autograd.backward(model.output(x_BSD, targets_BS, pad_id=pad_id).loss)
        clear()

    def whole() -> None:
        torch.autograd.backward(losses_of_logits(model.output(x_BSD), targets_BS, pad_id=pad_id).loss)
        clear()

    chunked()
    whole()
    return 1 / in_turn(chunked, whole, rounds, ids_BS.device)[2]


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
