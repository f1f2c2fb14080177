"""What a bundle's model says by itself: prompts on its own distribution, its greedy tokens, and their log-probabilities.

Whoever runs an export (transformers, vLLM, a server) is compared with these.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch

from pipeline.inference.runtime import Bundle
from pldr_model.generation import generate

FIRST = 4  # ids below are special


@dataclass(frozen=True)
class Case:
    """A prompt, the greedy tokens after it, and the log-probability of each token of both (NaN for the first)."""

    prompt: list[int]
    new: list[int]
    logprobs: list[float]


def cases_of(bundle: Bundle, *, count: int = 20, new: int = 40, longest: int = 12, seed: int = 0) -> list[Case]:
    """`count` prompts of 2 to `longest` tokens, drawn from the model, with their greedy continuations."""
    rng = random.Random(seed)
    starts = [[rng.randrange(FIRST, bundle.config.vocab_size)] for _ in range(count)]
    drawn = generate(bundle.model, starts, max_new_tokens=longest - 1, temperature=1.0, seed=seed)
    prompts = [(start + more)[: rng.randint(2, longest)] for start, more in zip(starts, drawn, strict=True)]
    greedy = generate(bundle.model, prompts, max_new_tokens=new, eos_id=bundle.generation["eos_id"])
    return [Case(prompt, ids, logprobs(bundle, prompt + ids)) for prompt, ids in zip(prompts, greedy, strict=True)]


@torch.inference_mode()
def logprobs(bundle: Bundle, ids: list[int]) -> list[float]:
    """The log-probability of each token given those before it; NaN for the first."""
    logits_BSV = bundle.model(torch.tensor([ids]), padded=False)
    assert isinstance(logits_BSV, torch.Tensor)
    scores_SV = logits_BSV[0, :-1].double().log_softmax(-1)
    return [math.nan, *scores_SV.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()]
