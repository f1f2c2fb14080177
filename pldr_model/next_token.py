"""The next token of every row, in one pass on the logits' device: no generator, no loop over rows, nothing read on the host.

Order of the steps, as in transformers 5.24 (`GenerationMixin._get_logits_processor`): repetition penalty, temperature, top-k,
top-p, min-p. vLLM (its v1 `Sampler`) applies min-p before top-k and top-p: with both `min_p` and a `top_p` below 1 its nucleus
is of what min-p has left, and may be smaller.

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

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pldr_model.sampling import Sampling

GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed integer: splitmix64's step (Steele et al. 2014)
MIX = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))  # its shifts and factors; a shift by 31 follows
WEIGHT_BITS = 62  # of the sum of a row's weights
WINDOW = 2048  # tokens that a nucleus is looked for in, before all are sorted


@dataclass(frozen=True)
class RowSettings:
    """The settings of rows, ready for `choose`: made once for many tokens. All tensors are [R,1], on the logits' device."""

    vocab_size: int
    draws: bool  # some row samples
    mixed: bool  # some do, some do not
    penalizes: bool  # some row has a repetition penalty
    floors: bool  # some row has a min_p
    best: int  # how many of the best tokens must be in order; 0: none
    greedy: Tensor
    temperature: Tensor  # fp64; 1 for greedy rows
    top_k: Tensor  # int64; 0 for all
    top_p: Tensor  # fp64
    min_weight: Tensor  # int64: min_p, as a weight
    penalty: Tensor  # fp64

    @classmethod
    def of(cls, rows: Sequence[Sampling], *, vocab_size: int, device: torch.device | str = "cpu") -> RowSettings:
        """One for each row, or one for all."""
        V = vocab_size
        drawn = [row for row in rows if row.temperature > 0]
        plain = [row if row.temperature > 0 else replace(row, top_k=0, top_p=1.0, min_p=0.0) for row in rows]
        top_k = [row.top_k if row.top_k < V else 0 for row in plain]
        nucleus = any(row.top_p < 1 and not k for row, k in zip(plain, top_k, strict=True))

        def column(values: list[Any], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device).unsqueeze(-1)

        return cls(
            vocab_size=V,
            draws=bool(drawn),
            mixed=0 < len(drawn) < len(rows),
            penalizes=any(row.repetition_penalty != 1 for row in rows),
            floors=any(row.min_p > 0 for row in plain),
            best=V if nucleus else max(top_k),
            greedy=column([row.temperature == 0 for row in rows], torch.bool),
            temperature=column([row.temperature or 1.0 for row in rows], torch.float64),
            top_k=column(top_k, torch.int64),
            top_p=column([row.top_p for row in plain], torch.float64),
            min_weight=column([int(row.min_p * 2.0 ** _scale(V)) for row in plain], torch.int64),
            penalty=column([row.repetition_penalty for row in rows], torch.float64),
        )

    @property
    def copies(self) -> int:
        """Tensors of the logits' size, with 8 bytes a number, that `choose` holds at once, at most (measured)."""
        if not self.draws:
            return 2 if self.penalizes else 0
        return 3 + math.ceil(5 * self.best / self.vocab_size)


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
        logits_BV = _penalized(logits_BV, seen_BV, settings.penalty)
    if not settings.draws:
        return logits_BV.argmax(dim=-1)
    assert seed_B is not None and number_B is not None, "sampling needs seeds and numbers"
    until_BV = _weights(logits_BV, settings).cumsum_(dim=-1)
    total_B1 = until_BV[:, -1:]
    at_B1 = (uniform(seed_B, number_B).unsqueeze(-1) * total_B1.double()).to(torch.int64)
    drawn_B1 = torch.searchsorted(until_BV, at_B1.minimum(total_B1 - 1), right=True)
    drawn_B = drawn_B1.squeeze(-1).clamp_(0, settings.vocab_size - 1)  # beyond it only where logits are not finite
    return torch.where(settings.greedy.squeeze(-1), logits_BV.argmax(dim=-1), drawn_B) if settings.mixed else drawn_B


def token_probabilities(logits_BV: Tensor, settings: RowSettings, *, seen_BV: Tensor | None = None) -> Tensor:
    """The distribution that `choose` draws from, [B,V] in fp64. (A greedy row's is that of temperature 1.)"""
    if settings.penalizes:
        logits_BV = _penalized(logits_BV, seen_BV, settings.penalty)
    weight_BV = _weights(logits_BV, settings).double()
    return weight_BV / weight_BV.sum(dim=-1, keepdim=True)


def uniform(seed_B: Tensor, number_B: Tensor) -> Tensor:
    """A number in [0, 1) for each (seed, number), fp64 with 53 random bits: that of this index in splitmix64's sequence
    from the seed on. The same on every device."""
    x = seed_B + (number_B + 1) * GOLDEN
    for shift, factor in MIX:
        x = (x ^ _shift(x, shift)) * factor
    return _shift(x ^ _shift(x, 31), 11).double() * 2.0**-53


def _shift(x: Tensor, bits: int) -> Tensor:
    """To the right, as unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _penalized(logits_BV: Tensor, seen_BV: Tensor | None, penalty_R1: Tensor) -> Tensor:
    """Keskar et al. 2019, as in transformers: the logit of a token that was seen is divided by the penalty if it
    is positive, and multiplied if not. fp64; what overflows becomes the largest number."""
    assert seen_BV is not None, "a repetition penalty needs the tokens seen"
    largest = torch.finfo(torch.float64).max
    wide_BV = logits_BV.to(torch.float64, copy=True)
    factor_BV = torch.where(wide_BV < 0, penalty_R1, penalty_R1.reciprocal().clamp(max=largest))
    return wide_BV.mul_(factor_BV.masked_fill_(~seen_BV, 1.0)).clamp_(-largest, largest)


def _weights(logits_BV: Tensor, settings: RowSettings) -> Tensor:
    """[B,V] int64 in proportion to the probabilities; 0 for what the settings leave out. In place where it can be: the pages of
    new memory take longer than the arithmetic."""
    V, bits = logits_BV.shape[-1], _id_bits(logits_BV.shape[-1])
    # The best logit becomes 0 first: a tiny temperature gives -inf for the others, and never inf - inf.
    share_BV = logits_BV.to(torch.float64, copy=True).sub_(logits_BV.amax(dim=-1, keepdim=True))
    share_BV = share_BV.div_(settings.temperature).exp_()
    weight_BV = share_BV.mul_(2.0 ** _scale(V)).to(torch.int64)
    del share_BV
    if settings.best:
        total_B1 = weight_BV.sum(dim=-1, keepdim=True)
        key_BV = weight_BV.bitwise_left_shift_(bits)
        key_BV = key_BV.bitwise_or_(torch.arange(V - 1, -1, -1, device=logits_BV.device))
        least_B1 = _least_key(key_BV, total_B1, settings)
        weight_BV = key_BV.masked_fill_(key_BV < least_B1, 0).bitwise_right_shift_(bits)
    if settings.floors:
        weight_BV = weight_BV.masked_fill_(weight_BV < settings.min_weight, 0)
    return weight_BV


def _least_key(key_BV: Tensor, total_B1: Tensor, settings: RowSettings) -> Tensor:
    """The smallest key that top-k and then top-p keep, [B,1]; 0 for rows without them."""
    B, V = key_BV.shape
    top_k_B1, top_p_B1 = settings.top_k.expand(B, 1), settings.top_p.expand(B, 1)
    on_cpu = key_BV.device.type == "cpu" and not torch.compiler.is_compiling()
    if not (on_cpu and settings.best == V > WINDOW):
        return _search(key_BV, total_B1, top_k_B1, top_p_B1, settings.best)[0]
    # A nucleus is small, most often; and on a CPU, to look whether it was is no synchronization. The result is the same.
    least_B1, found_B1 = _search(key_BV, total_B1, top_k_B1, top_p_B1, WINDOW)
    rest = found_B1.logical_not().squeeze(-1).nonzero().squeeze(-1)
    if len(rest):
        least_B1[rest] = _search(key_BV[rest], total_B1[rest], top_k_B1[rest], top_p_B1[rest], V)[0]
    return least_B1


def _search(key_BV: Tensor, total_B1: Tensor, top_k_B1: Tensor, top_p_B1: Tensor, best: int) -> tuple[Tensor, Tensor]:
    """The key of `_least_key` among the `best` keys of each row, and whether it is there."""
    key_BN = key_BV.topk(best, dim=-1).values
    weight_BN = key_BN >> _id_bits(key_BV.shape[-1])
    until_BN = weight_BN.cumsum(dim=-1)
    last_B1 = top_k_B1.clamp(1, best) - 1
    total_B1 = torch.where(top_k_B1 > 0, until_BN.gather(-1, last_B1), total_B1)
    wanted_B1 = torch.where(top_p_B1 < 1, (top_p_B1 * total_B1.double()).ceil().to(torch.int64), total_B1)
    limited_B1 = (top_k_B1 > 0) | (top_p_B1 < 1)
    found_B1 = (top_k_B1 <= best) & (until_BN[:, -1:] >= wanted_B1)
    # A token stays if those before it do not reach what is wanted.
    at_B1 = (until_BN.sub_(weight_BN) < wanted_B1).sum(dim=-1, keepdim=True).clamp(min=1) - 1
    at_B1 = torch.where(top_k_B1 > 0, at_B1.minimum(last_B1), at_B1)
    return key_BN.gather(-1, at_B1).where(limited_B1, 0), found_B1 | ~limited_B1


def _id_bits(vocab_size: int) -> int:
    return max(1, (vocab_size - 1).bit_length())


def _scale(vocab_size: int) -> int:
    return WEIGHT_BITS - _id_bits(vocab_size)
