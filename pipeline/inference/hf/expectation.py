"""What an export must reproduce: logits, greedy tokens and ids, computed by our own model and tokenizer.

Decision: prompts are random pieces of the vocabulary, drawn by the model's hash, so that nothing but the model is needed and
the same model gives the same prompts.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.inference.hf.texts import ODD
from pipeline.tokenizer import Tokenizer
from pldr_model.generation import generate
from pldr_model.model import PLDRModel

NUM_PROMPTS = 20
MAX_PROMPT = 64  # tokens
MAX_NEW = 32
EXACT = "exact"  # name of the logits in fp64
EMBEDDING = "embedding"  # name of the tokens' vectors [V,D]: few of a large vocabulary are in the prompts


@dataclass(frozen=True)
class Expectation:
    """greedy: the new tokens of each prompt. sequences: the prompts and a full context. ids, decoded: of each of `texts`.
    rounding: what fp32 does to our own model's logits, the largest difference from fp64. settings: what `generate` and the
    tokenizer must do by default (`settings_of` in selfcheck.py)."""

    prompts: list[list[int]]
    max_new_tokens: int
    greedy: list[list[int]]
    sequences: list[list[int]]
    texts: list[str]
    ids: list[list[int]]
    decoded: list[str]
    rounding: float
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


@torch.inference_mode()
def expect(
    model: PLDRModel, tokenizer: Tokenizer, *, seed: str, texts: Sequence[str], wide: PLDRModel | None = None
) -> tuple[Expectation, dict[str, Tensor]]:
    """What this model and tokenizer give, and the logits [S,V] of each sequence by its number; EXACT: those of the last one, a
    full context, in fp64. A model that learns its G reads every prompt with the prompt's own G. wide: the model in fp64, where
    that is not the same numbers in another type (int8 times a scale is rounded in fp32)."""
    config = model.config
    draw = random.Random(seed)
    pieces = [token for token in range(4, tokenizer.vocab_size) if tokenizer.byte(token) is None] or [3]
    longest = max(1, min(MAX_PROMPT, config.context_length // 2))
    lengths = [1 + i * (longest - 1) // (NUM_PROMPTS - 1) for i in range(NUM_PROMPTS)]
    prompts = [draw.choices(pieces, k=length) for length in lengths]
    max_new = max(1, min(MAX_NEW, config.context_length - longest))
    sequences = [*prompts, draw.choices(pieces, k=config.context_length)]
    logits = {
        str(i): model(torch.tensor([sequence]), padded=False)[0].contiguous() for i, sequence in enumerate(sequences)
    }
    logits[EMBEDDING] = model.embedding.weight.detach().clone()
    wide, rounding = copy.deepcopy(model).double() if wide is None else wide, 0.0
    for i, sequence in enumerate(sequences):
        logits[EXACT] = wide(torch.tensor([sequence]), padded=False)[0].contiguous()
        rounding = max(rounding, float((logits[EXACT] - logits[str(i)]).abs().max().nan_to_num(nan=float("inf"))))
    checked = [*texts, *ODD]
    ids = tokenizer.encode_batch(checked)
    expected = Expectation(
        prompts=prompts,
        max_new_tokens=max_new,
        greedy=generate(model, prompts, max_new_tokens=max_new, eos_id=config.eos_id),
        sequences=sequences,
        texts=checked,
        ids=ids,
        decoded=[tokenizer.decode(one) for one in ids],
        rounding=rounding,
        settings={
            "eos_token_id": [config.eos_id] * 3,
            "pad_token_id": [config.pad_id] * 3,
            "bos_token_id": None,
            "context": [config.context_length] * 2,
            "do_sample": False,
            "padding_side": "left",
        },
    )
    return expected, logits
