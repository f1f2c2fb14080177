"""How fast cached decoding is, against plain attention: `pldr bench decode CONFIG`.

Everything runs in one process, on one thread unless told otherwise, in turn (`rounds.py`). A contender's turn is a block of
steps, each of which gives every row its next token, greedily; then its cache is set back, so that all blocks are alike. The
yardstick is the model's own SDPA twin: the same runtime, sizes and weights in fp32 with G = identity.

Decision: weights and cached keys are random; speed does not depend on their values. Contenders share the tensors that are the
same in all of them, and the memory of caches of one size, so that addresses differ in nothing but what is compared.

The floor of a step is the bytes that it has to read (weights without the embedding's other rows, G, cached keys and values)
over the measured bandwidth; `share_of_floor` is how much of that speed is reached. A model that fits the processor's caches
has a bandwidth measured there, too: the buffers are as large as its fp32 weights.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pipeline.bench.decode_contenders import TWIN, Contender, Shared, make_contenders
from pipeline.bench.decode_loop import measure_loop
from pipeline.bench.decode_table import table
from pipeline.bench.rounds import Timed, bandwidth, in_rounds, machine, speed_ratio
from pldr_model.config import ModelConfig

BATCH, PROMPT, CACHED, ROUNDS = (1, 8, 32), (16, 512), (4096, 16384), 9
BLOCK_S, MAX_BLOCK = 0.03, 32  # a block of steps takes about so many seconds of the twin, and has at most so many steps

Report = Callable[[str], None]


def bench(
    config: ModelConfig,
    *,
    batch: Sequence[int] = BATCH,
    prompt: Sequence[int] = PROMPT,
    cached: Sequence[int] = CACHED,
    tokens: int | None = None,
    rounds: int = ROUNDS,
    threads: int = 1,
    key_rank: int | None = None,
    report: Report = lambda _: None,
) -> dict[str, Any]:
    """Measure all contenders at every batch and number of cached tokens, in tokens a second and against the twin.

    prompt: cached tokens before a block of steps; those that leave no room in the context are left out and named in
    `left_out`. cached: more of them, whatever the context is, at batch 1: full keys against low-rank ones. tokens: steps of a
    block; None: so many that one takes `BLOCK_S`. key_rank: numbers of a key that low-rank keys keep; None: a quarter.
    Errors: ValueError when the context is too short for every prompt, or key_rank is over the head size.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            return _bench(config, batch, prompt, cached, tokens, rounds, key_rank, report)
    finally:
        torch.set_num_threads(before)


def _bench(
    config: ModelConfig,
    batches: Sequence[int],
    prompts: Sequence[int],
    long: Sequence[int],
    tokens: int | None,
    rounds: int,
    key_rank: int | None,
    report: Report,
) -> dict[str, Any]:
    device = torch.device("cpu")
    fits = [length for length in prompts if length + (tokens or 1) <= config.context_length]
    if not fits:
        raise ValueError(
            f"prompt: {min(prompts)} cached tokens and {tokens or 1} new ones are over the context_length of "
            f"{config.context_length}; give smaller numbers"
        )
    rank = max(1, config.head_dim // 4) if key_rank is None else key_rank
    if rank > config.head_dim:
        raise ValueError(f"key_rank: {rank} is over the head size of {config.head_dim}; give at most that")
    started = time.perf_counter()
    found = make_contenders(config, rank)
    result: dict[str, Any] = {
        "machine": machine(device),
        "parameters": config.num_parameters()["total"],
        "rounds": rounds,
        "key_rank": rank,
        "bandwidth": bandwidth(found[TWIN].weight_bytes, device),
        "weights_mb": {name: one.weight_bytes / 2**20 for name, one in found.items()},
        "left_out": [f"prompt {length}: the context is {config.context_length}" for length in prompts if length not in fits],
        "by_batch": {},
    }
    for size in batches:
        cells = result["by_batch"][str(size)] = {}
        for length in fits:
            room = config.context_length - length
            cells[str(length)] = _cell(found, size, length, room, tokens, rounds, result["bandwidth"]["read"])
    result["cached"] = {}
    for length in long:
        pair = {name: one.with_context(length + MAX_BLOCK) for name, one in found.items() if name in ("bundle", "low_rank")}
        cell = _cell(pair, 1, length, MAX_BLOCK, tokens, rounds, result["bandwidth"]["read"], against="bundle")
        result["cached"][str(length)] = cell
    result |= measure_loop(config, rounds=rounds)
    result |= _headline(result, str(fits[0]))
    result["seconds"] = time.perf_counter() - started
    for line in table(result):
        report(line)
    return result


def _cell(
    found: Mapping[str, Contender],
    size: int,
    length: int,
    room: int,
    tokens: int | None,
    rounds: int,
    read: float,
    *,
    against: str = TWIN,
) -> dict[str, Any]:
    """All contenders with `size` rows of `length` cached tokens each."""
    steps = min(room, tokens or MAX_BLOCK)
    shared = Shared()
    blocks = {name: one.block(size, length, steps, shared) for name, one in found.items()}
    for block in blocks.values():
        block(1)
    if tokens is None:
        seconds = min(in_rounds({"one": lambda: blocks[against](1)}, 3, torch.device("cpu"))["one"].seconds)
        steps = max(1, min(steps, round(BLOCK_S / seconds)))
    times = in_rounds(
        {name: (lambda block=block: block(steps)) for name, block in blocks.items()}, rounds, torch.device("cpu")
    )
    cell: dict[str, Any] = {"steps": steps}
    for name, one in found.items():
        floor = one.bytes_of_step(size, length) / read
        cell[name] = _numbers(times[name], times[against], steps, size, floor)
    return cell
