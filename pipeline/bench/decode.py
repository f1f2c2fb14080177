"""How fast cached decoding is, against plain attention: `pldr bench decode CONFIG`.

Everything runs in one process, on one thread unless told otherwise, in turn (`rounds.py`). A contender's turn is a block of
steps, each of which gives every row its next token, greedily; then its cache is set back, so that all blocks are alike. The
yardstick is the model's own SDPA twin: the same runtime, sizes and weights in fp32 with G = identity.

Decision: weights and cached keys are random; speed does not depend on their values. Contenders share the tensors that are the
same in all of them, and the memory of caches of one size, so that addresses differ in nothing but what is compared.

The floor of a step is the bytes that it has to read (weights without the embedding's other rows, G, cached keys and values)
over the bandwidth of reading a buffer as large as the fp32 weights (which may fit a processor's caches), once in every round;
`share_of_floor` is how much of that speed is reached.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from pipeline.bench.blocks import Block, Caches, Contender
from pipeline.bench.decode_contenders import FULL, LOW_RANK, TWIN, make_contenders
from pipeline.bench.decode_loop import sampling_cost, speculation
from pipeline.bench.decode_table import table
from pipeline.bench.pages import huge_pages_gain
from pipeline.bench.rounds import Memory, Timed, Work, in_rounds, machine, speed_ratio
from pldr_model.config import ModelConfig

BATCH, PROMPT, CACHED, ROUNDS = (1, 8, 32), (16, 512), (4096, 16384), 9
LOOP_ROUNDS = 5  # at most, of what goes through `generate`
READ = "read"
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
    context = config.context_length
    fits = [length for length in prompts if length + (tokens or 1) <= context]
    if not fits:
        raise ValueError(
            f"prompt: {min(prompts)} cached tokens and {tokens or 1} new ones are over the context_length of {context}; give "
            "smaller numbers"
        )
    rank = max(1, config.head_dim // 4) if key_rank is None else key_rank
    if rank > config.head_dim:
        raise ValueError(f"key_rank: {rank} is over the head size of {config.head_dim}; give at most that")
    started = time.perf_counter()
    gain = huge_pages_gain(
        config, rounds
    )  # first: memory that has been on huge pages stays there when it is used again
    found = make_contenders(config, rank, max(context, *(length + MAX_BLOCK for length in long), 0))
    cells = Cells(found, tokens, rounds)
    result: dict[str, Any] = {
        "machine": machine(cells.device),
        "parameters": config.num_parameters()["total"],
        "rounds": rounds,
        "key_rank": rank,
        "bandwidth": {"read": cells.memory.read_bandwidth(), "copy": cells.memory.copy_bandwidth()},
        "weights_mb": {name: one.weight_bytes / 2**20 for name, one in found.items()},
        "huge_pages_gain": gain,
        "left_out": [f"prompt {length}: the context is {context}" for length in prompts if length not in fits],
    }
    result["by_batch"] = {
        str(size): {str(length): cells.measure(list(found), size, length, context - length) for length in fits}
        for size in batches
    }
    pair = [name for name in (FULL, LOW_RANK) if name in found]
    result["cached"] = {str(length): cells.measure(pair, 1, length, MAX_BLOCK, against=FULL) for length in long}
    result["sampling"] = sampling_cost(
        found[FULL].decoder, sorted({min(batches), max(batches)}), min(rounds, LOOP_ROUNDS)
    )
    result["speculation"] = speculation(config, min(rounds, LOOP_ROUNDS))
    result |= _headline(result["by_batch"], str(fits[0]))
    result["seconds"] = time.perf_counter() - started
    for line in table(result):
        report(line)
    return result


def _headline(by_batch: Mapping[str, Any], length: str) -> dict[str, Any]:
    """The ratios at batch 1, and what the largest batch gains over it, at the fewest cached tokens."""
    if "1" not in by_batch:
        return {}
    one, largest = by_batch["1"][length], max(by_batch, key=int)
    found = {
        f"{'decode' if name == FULL else name}_ratio_to_{TWIN}": one[name]["ratio_to_sdpa"]
        for name in one
        if name != TWIN
    }
    speeds = [by_batch[size][length][FULL]["tokens_per_second"] for size in ("1", largest)]
    return {**found, "largest_batch": int(largest), "batch_speedup": speeds[1] / speeds[0]}


class Cells:
    """Measurements of contenders at a number of rows and of cached tokens."""

    def __init__(self, found: Mapping[str, Contender], tokens: int | None, rounds: int) -> None:
        self.found, self.tokens, self.rounds = found, tokens, rounds
        self.device = found[TWIN].decoder.device
        self.memory = Memory(found[TWIN].weight_bytes, self.device)

    def measure(
        self, names: Sequence[str], size: int, length: int, room: int, *, against: str = TWIN
    ) -> dict[str, dict[str, float]]:
        """By contender: tokens a second, ratios to `against` by seconds and by CPU seconds, share of the floor."""
        limit, caches = min(room, self.tokens or MAX_BLOCK), Caches()
        blocks = {name: self.found[name].block(size, length, limit, caches) for name in names}
        for block in blocks.values():
            block(1)
        steps = self.tokens or self._steps(blocks[against], limit)
        works: dict[str, Work] = {name: partial(block, steps) for name, block in blocks.items()}
        times = in_rounds({READ: self.memory, **works}, self.rounds, self.device)
        return {name: self._numbers(name, times, against, size, length, steps) for name in names}

    def _steps(self, block: Block, limit: int) -> int:
        """Steps that take about `BLOCK_S`."""
        seconds = min(in_rounds({"one": partial(block, 1)}, 3, self.device)["one"].seconds)
        return max(1, min(limit, round(BLOCK_S / seconds)))

    def _numbers(
        self, name: str, times: Mapping[str, Timed], against: str, size: int, length: int, steps: int
    ) -> dict[str, float]:
        one, ratio = times[name], "ratio_to_sdpa" if against == TWIN else "ratio_to_full"
        passes = steps * self.found[name].bytes_of_step(size, length) / self.memory.nbytes
        return {
            "tokens_per_second": size * steps / statistics.median(one.seconds),
            ratio: speed_ratio(one.seconds, times[against].seconds),
            f"cpu_{ratio}": speed_ratio(one.cpu, times[against].cpu),
            "share_of_floor": passes * speed_ratio(one.seconds, times[READ].seconds),
            "steps": steps,
        }
