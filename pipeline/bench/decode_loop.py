"""What generation costs around a step: choosing tokens, and what prompt lookup saves. Part of `pldr bench decode`.

Both go through `generate_steps`, as everything that generates does. Speculation is measured on a model whose text is known: its
layers add nothing to the residual stream, and its output layer answers token t with the next of a cycle. All products have
their usual sizes, so a step costs what it always costs, and the cycle's length alone sets what is accepted: a short one repeats
(every draft is right), one over all tokens never does.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

import torch

from pipeline.bench.rounds import in_rounds, speed_ratio
from pldr_model.config import ModelConfig
from pldr_model.decode.decoder import Decoder
from pldr_model.generation import generate_steps
from pldr_model.model import PLDRModel, g_shape

SAMPLED = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 0}
PROMPT, NEW = 24, 48  # tokens, fewer where the context is short
CYCLE = 8  # tokens of the text that repeats
FIRST_ID = 4  # past the special ids


def sampling_cost(decoder: Decoder, sizes: list[int], rounds: int) -> dict[str, Any]:
    """By number of rows: seconds of a step of generation, greedy and sampled as SAMPLED says, and `cost`: the share of a greedy
    step that sampling adds, the median of the rounds'."""
    config = decoder.config
    start, new = _lengths(config)
    ids = torch.randint(min(FIRST_ID, config.vocab_size - 1), config.vocab_size, (max(sizes), start)).tolist()
    found: dict[str, Any] = {}
    for size in sizes:
        works = {
            "greedy": partial(_step_s, decoder, ids[:size], new // 4, speculate=False),
            "sampled": partial(_step_s, decoder, ids[:size], new // 4, speculate=False, **SAMPLED),
        }
        times = in_rounds(works, rounds, decoder.device)
        greedy, sampled = times["greedy"].seconds, times["sampled"].seconds
        found[str(size)] = {
            "greedy_step_s": statistics.median(greedy),
            "sampled_step_s": statistics.median(sampled),
            "cost": 1 / speed_ratio(sampled, greedy) - 1,
        }
    return found


def speculation(config: ModelConfig, rounds: int) -> dict[str, float]:
    """Of a text that repeats and one that does not: how many times as fast generation is with prompt lookup, batch 1."""
    start, new = _lengths(config)
    found = {}
    for text, cycle in (("repeating", CYCLE), ("other", config.vocab_size)):
        decoder = Decoder.of(cyclic_model(config, cycle))
        prompt = [[token % cycle for token in range(start)]]
        works = {
            "plain": partial(_step_s, decoder, prompt, new, speculate=False),
            "speculating": partial(_step_s, decoder, prompt, new, speculate=True),
        }
        times = in_rounds(works, rounds, decoder.device)
        found[text] = speed_ratio(times["speculating"].seconds, times["plain"].seconds)
    return found


def cyclic_model(config: ModelConfig, cycle: int) -> PLDRModel:
    """A model of these sizes with a constant G that continues token t < cycle with (t + 1) % cycle, greedily."""
    model = PLDRModel(config.with_constant_g(), g_lm_LHKK=torch.randn(g_shape(config))).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if ".attention.output." in name or ".feed_forward.w3." in name:
            parameter.zero_()
    hidden_VD = torch.nn.functional.layer_norm(model.embedding.weight, (config.d_model,))
    model.output.weight[:cycle] = hidden_VD[:cycle].roll(1, 0)
    return model


def _lengths(config: ModelConfig) -> tuple[int, int]:
    """Tokens of a prompt and new ones."""
    start = min(PROMPT, config.context_length // 2)
    return start, min(NEW, config.context_length - start)


def _step_s(decoder: Decoder, prompts: list[list[int]], new_tokens: int, **how: Any) -> float:
    """Seconds of a step of generation, without the prompts: those after the first token over the tokens of a row."""
    steps = generate_steps(decoder, prompts, max_new_tokens=new_tokens, **how)
    new = next(steps)  # grows
    started, first = time.perf_counter(), len(new[0])
    for _ in steps:
        pass
    return (time.perf_counter() - started) / (len(new[0]) - first)
