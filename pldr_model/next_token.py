"""The next token of every row, in one pass on the logits' device: no generator, no loop over rows, nothing read on the host.

Order of the steps, as in transformers 5.24 (`generation/utils.py`, `_get_logits_processor`): repetition penalty, temperature,
top-k, top-p, min-p. vLLM (`v1/sample/sampler.py`) applies min-p before top-k and top-p: with both `min_p` and a `top_p` below
1 its nucleus is of what min-p has left, and may be smaller.

Decision: probabilities are integers. The best token weighs 2^S, another one the integer part of 2^S exp((x - best) /
temperature), with S so that the weights of a row sum to at most 2^62 (S = 47 for 32,000 tokens). Sums of integers are the same
in any order, so that a row gets the same token alone and in any batch. A weight and the id together make a key: no two are
equal, so top-k and top-p are "keys from here on", and of equally probable tokens the lower ids come first.
Decision: a row's random numbers are a hash of (its seed, how many tokens it has got), as in counter-based generators (Salmon
et al. 2011, Random123). Nothing is kept between tokens. A caller that guesses tokens ahead (speculation with a fixed draft)
chooses at each guessed position and keeps tokens for as long as they equal the guess: that is rejection sampling, and the
tokens are those that decoding one by one gives.

Shapes: B rows, R rows of settings (B, or 1 for all), V vocabulary, N best tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pldr_model.sampling import Sampling

GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed integer: splitmix64's step (Steele et al. 2014)
MIX = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))  # its shifts and factors; a shift by 31 follows
WEIGHT_BITS = 62  # of the sum of a row's weights


@dataclass(frozen=True)
class RowSettings:
    """The settings of rows, ready for `choose`: made once for many tokens. All tensors are [R,1], on the logits' device."""

    vocab_size: int
    draws: bool  # some row samples
    penalizes: bool  # some row has a repetition penalty
    best: int  # how many of the best tokens must be in order; 0: none
    greedy: Tensor
    temperature: Tensor  # fp64; 1 for greedy rows
    top_k: Tensor  # int64, at most `best`
    top_p: Tensor  # fp64
    limited: Tensor  # top_k or top_p is set
    min_key: Tensor  # int64: min_p as a key
    penalty: Tensor  # fp64

    @classmethod
    def of(cls, rows: Sequence[Sampling], *, vocab_size: int, device: torch.device | str = "cpu") -> RowSettings:
        """One for each row, or one for all."""
        V, drawn = vocab_size, [row for row in rows if row.temperature > 0]
        nucleus = any(row.top_p < 1 and not 0 < row.top_k < V for row in drawn)
        best = V if nucleus else max((row.top_k for row in drawn if row.top_k < V), default=0)

        def column(values: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device).unsqueeze(-1)

        def count(values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device).unsqueeze(-1)

        return cls(
            vocab_size=V,
            draws=bool(drawn),
            penalizes=any(row.repetition_penalty != 1 for row in rows),
            best=best,
            greedy=count([row.temperature == 0 for row in rows], torch.bool),
            temperature=column([row.temperature or 1.0 for row in rows]),
            top_k=count([row.top_k if 0 < row.top_k < best else max(best, 1) for row in rows]),
            top_p=column([row.top_p for row in rows]),
            limited=count([row.top_p < 1 or 0 < row.top_k < V for row in rows], torch.bool),
            min_key=count([int(row.min_p * 2.0 ** _scale(V)) << _id_bits(V) for row in rows]),
            penalty=column([row.repetition_penalty for row in rows]),
        )


def choose(
    logits_BV: Tensor,
    settings: RowSettings,
    *,
    seed_B: Tensor | None = None,
    number_B: Tensor | None = None,
    seen_BV: Tensor | None = None,
) -> Tensor:
    """The next token of each row, [B] int64. The same for a row alone and in any batch.

    seed_B, number_B: int64, where a row samples: its seed, and how many new tokens it has. seen_BV: bool, where a row has a
    repetition penalty: the tokens of its prompt and its new ones. A row whose logits are not finite gets some token, and
    changes no other row.
    """
    if settings.penalizes:
        assert seen_BV is not None, "a repetition penalty needs the tokens seen"
        logits_BV = _penalized(logits_BV, seen_BV, settings.penalty)
    if not settings.draws:
        return logits_BV.argmax(dim=-1)
    assert seed_B is not None and number_B is not None, "sampling needs seeds and numbers"
    until_BV = _weights(logits_BV, settings).cumsum(dim=-1)
    total_B1 = until_BV[:, -1:]
    at_B1 = (uniform(seed_B, number_B).unsqueeze(-1) * total_B1.double()).to(torch.int64)
    drawn_B1 = torch.searchsorted(until_BV, at_B1.minimum(total_B1 - 1), right=True)
    drawn_B = drawn_B1.squeeze(-1).clamp(0, settings.vocab_size - 1)  # beyond it only where logits are not finite
    return torch.where(settings.greedy.squeeze(-1), logits_BV.argmax(dim=-1), drawn_B)


def token_probabilities(logits_BV: Tensor, settings: RowSettings, *, seen_BV: Tensor | None = None) -> Tensor:
    """The distribution that `choose` draws from, [B,V] in fp64. (A greedy row's is that of temperature 1.)"""
    if settings.penalizes:
        assert seen_BV is not None, "a repetition penalty needs the tokens seen"
        logits_BV = _penalized(logits_BV, seen_BV, settings.penalty)
    weight_BV = _weights(logits_BV, settings).double()
    return weight_BV / weight_BV.sum(dim=-1, keepdim=True)


def uniform(seed_B: Tensor, number_B: Tensor) -> Tensor:
    """A number in [0, 1) for each (seed, number), fp64 with 53 random bits: splitmix64's number of that index, in
    the sequence that starts at the hash of the seed. The same on every device."""
    mixed_B = _mix(_mix(seed_B) + (number_B + 1) * GOLDEN)
    return _shift(mixed_B, 11).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    """splitmix64's hash of 64 bits, one to one."""
    for shift, factor in MIX:
        x = (x ^ _shift(x, shift)) * factor
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """To the right, as unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _penalized(logits_BV: Tensor, seen_BV: Tensor, penalty_R1: Tensor) -> Tensor:
    """Keskar et al. 2019, as in transformers: the logit of a token that was seen is divided by the penalty if it
    is positive, and multiplied if not. fp64; what overflows becomes the largest number."""
    wide_BV = logits_BV.double()
    changed_BV = torch.where(wide_BV < 0, wide_BV * penalty_R1, wide_BV / penalty_R1)
    largest = torch.finfo(torch.float64).max
    return torch.where(seen_BV & (penalty_R1 != 1), changed_BV.clamp(-largest, largest), wide_BV)


def _weights(logits_BV: Tensor, settings: RowSettings) -> Tensor:
    """[B,V] int64 in proportion to the probabilities; 0 for what the settings leave out."""
    V = logits_BV.shape[-1]
    wide_BV = logits_BV.double()
    # The best logit becomes 0 first: a tiny temperature gives -inf for the others, and never inf - inf.
    share_BV = ((wide_BV - wide_BV.amax(dim=-1, keepdim=True)) / settings.temperature).exp()
    weight_BV = (share_BV * 2.0 ** _scale(V)).to(torch.int64)
    bits = _id_bits(V)
    key_BV = (weight_BV << bits) | torch.arange(V - 1, -1, -1, device=logits_BV.device)
    least_B1 = settings.min_key
    if settings.best:
        least_B1 = torch.maximum(least_B1, _least_key(key_BV, settings, bits).where(settings.limited, 0))
    return weight_BV.where(key_BV >= least_B1, 0)


def _least_key(key_BV: Tensor, settings: RowSettings, bits: int) -> Tensor:
    """The smallest key that top-k and then top-p keep, [B,1]."""
    key_BN = key_BV.topk(settings.best, dim=-1).values
    weight_BN = key_BN >> bits
    until_BN = weight_BN.cumsum(dim=-1)
    top_k_B1 = settings.top_k.expand(len(key_BV), 1)
    total_B1 = until_BN.gather(-1, top_k_B1 - 1)
    wanted_B1 = (settings.top_p * total_B1.double()).ceil().to(torch.int64)
    wanted_B1 = torch.where(settings.top_p < 1, wanted_B1, total_B1)
    # A token stays if those before it do not reach what is wanted; the first always does.
    kept_B1 = (until_BN - weight_BN < wanted_B1).sum(dim=-1, keepdim=True).clamp(min=1)
    return key_BN.gather(-1, kept_B1.minimum(top_k_B1) - 1)


def _id_bits(vocab_size: int) -> int:
    return max(1, (vocab_size - 1).bit_length())


def _scale(vocab_size: int) -> int:
    return WEIGHT_BITS - _id_bits(vocab_size)
