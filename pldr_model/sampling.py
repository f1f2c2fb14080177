"""The settings of a request, checked here and nowhere else, and a seed for each of its prompts.

How a token is chosen by them is in `pldr_model.next_token`.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

SEEDS = range(-(2**63), 2**64)  # what torch's generators take


@dataclass(frozen=True)
class Sampling:
    """The checked settings of a request, as plain numbers. `seed` is None only where nothing is drawn."""

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None


def read_sampling(
    *,
    max_new_tokens: Any,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    seed: Any,
    min_p: Any = 0.0,
    repetition_penalty: Any = 1.0,
) -> Sampling:
    """The settings, whoever asks and in whatever numeric type (numpy's too).

    Errors: ValueError, one line, for a wrong type (bool, text, bytes, None; 8.0 where a count is meant) and for what is out of
    range, NaN and infinity included.

    temperature: 0 is greedy; any positive number will do, 5e-324 too. Counts may be larger than what there is: `max_new_tokens`
    ends at the context, `top_k` at the vocabulary. seed None: a fresh one.
    """
    count, k = _integer("max_new_tokens", max_new_tokens), _integer("top_k", top_k)
    t, p = _number("temperature", temperature), _number("top_p", top_p)
    low, penalty = _number("min_p", min_p), _number("repetition_penalty", repetition_penalty)
    if count < 1:
        raise ValueError(f"max_new_tokens: {_short(count)} must be at least 1")
    if not 0 <= t < math.inf:
        raise ValueError(f"temperature: {t} must be 0 (greedy) or a positive number")
    if k < 0:
        raise ValueError(f"top_k: {_short(k)} must be 0 (all tokens) or positive")
    if not 0 < p <= 1:
        raise ValueError(f"top_p: {p} must be in (0, 1]")
    if not 0 <= low <= 1:
        raise ValueError(f"min_p: {low} must be in [0, 1]")
    if not 0 < penalty < math.inf:
        raise ValueError(f"repetition_penalty: {penalty} must be a positive number (1: none)")
    chosen = secrets.randbits(63) if seed is None else _integer("seed", seed)
    if chosen not in SEEDS:
        raise ValueError(f"seed: {_short(chosen)} must have at most 64 bits")
    return Sampling(count, t, k, p, low, penalty, chosen if t > 0 else None)


def seeds_of(prompts: Sequence[Sequence[int]], seed: int) -> list[int]:
    """A seed for each prompt, from its tokens and how many equal ones came before it: its neighbors play no part."""
    copies: Counter[bytes] = Counter()
    seeds = []
    for prompt in prompts:
        key = str(tuple(prompt))
        same = hashlib.sha256(key.encode()).digest()
        digest = hashlib.sha256(f"{seed} {copies[same]} {key}".encode()).digest()
        seeds.append(int.from_bytes(digest[:8], "big") >> 1)
        copies[same] += 1
    return seeds


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name}: {_short(value)} is no integer; give one")
    return int(value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name}: {_short(value)} is no number; give one")
    number: Any = value  # `Real` has no order
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def _short(value: Any) -> str:
    """A value in a message of one line. An integer of many digits is not written out: Python refuses to."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value) if isinstance(value, str | bytes | int | float | type(None)) else type(value).__name__
    return text if len(text) <= 40 else f"{text[:40]}…"
