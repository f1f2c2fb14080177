"""Generated text with and without caches: greedy agreement, the papers' order parameter, samples for the page.

The control processes the whole sequence again and deduces G from it: no KV-cache, no G-cache. A pass of it gives one token, so
a greedy text is checked at some of its prefixes (each is a decision of its own), and not generated a second time.
Every function but `samples` is collective where there are several ranks. Shapes: N sequences, T = S+1 tokens of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.distributed import merged, share
from pipeline.post.measure.downstream import Totals
from pipeline.post.measure.observe import batches, deduce, tensors_of
from pipeline.post.measure.statistics import Pair
from pldr_model.generation import NotFiniteError, generate
from pldr_model.model import PLDRModel

LIVE_CHECKS = 16  # of each greedy text
RUNS = (("1", "2"), ("1", "C"), ("2", "C"))


class Sample(NamedTuple):
    """One prompt and its continuations with and without caches, as ids. `how`: how tokens were chosen."""

    how: str
    prompt: list[int]
    cached: list[int]
    live: list[int]


@torch.inference_mode()
def greedy_agreement(
    model: PLDRModel, g_LHKK: Tensor, text_NT: Tensor, *, num_tokens: int, num_prompts: int, seed: int
) -> dict[str, Any]:
    """Greedy continuations with KV- and G-cache, and what the model without any cache (live G) would have chosen at random
    prefixes of them: one in each of LIVE_CHECKS equal parts of the new tokens, drawn from `seed`.

    Each check is a decision after identical tokens, whatever the earlier ones were: `per_decision` = 1 - differences /
    decisions. `identical` is the share of texts without a difference. Both are NaN when any logits were not finite.
    """
    totals = Totals()
    for ids_BS, num_new, broken in greedy_continuations(
        model, g_LHKK, text_NT, num_tokens=num_tokens, num_prompts=num_prompts
    ):
        totals.add("not finite", broken)
        prompt_length = ids_BS.shape[1] - num_new
        checked = _one_in_each_part(num_new, seed)
        differs_B = torch.zeros(len(ids_BS), dtype=torch.bool)
        for index in checked:
            until = prompt_length + index
            live_BV = model(ids_BS[:, :until], padded=False, last_only=True)[:, -1]
            totals.add("not finite", int((~live_BV.isfinite().all(dim=-1)).sum()))
            wrong_B = (live_BV.argmax(dim=-1) != ids_BS[:, until]).cpu()
            differs_B |= wrong_B
            totals.add("differences", int(wrong_B.sum()))
        totals.add("decisions", len(ids_BS) * len(checked))
        totals.add("texts that differ", int(differs_B.sum()))
        totals.add("prompts", len(ids_BS))
        totals.take("tokens", num_new)
        totals.take("prompt", prompt_length)
    totals = merged(totals)
    sums = totals.sums
    known = math.nan if sums["not finite"] else 1.0
    return {
        "per_decision": known - sums["differences"] / sums["decisions"],
        "identical": known - sums["texts that differ"] / sums["prompts"],
        "num_prompts": sums["prompts"],
        "prompt_length": int(totals.largest["prompt"]),
        "num_tokens": int(totals.largest["tokens"]),
        "decisions": sums["decisions"],
        "live_checks": sums["decisions"],
    }


def greedy_continuations(
    model: PLDRModel, g_LHKK: Tensor, text_NT: Tensor, *, num_tokens: int, num_prompts: int
) -> Iterator[tuple[Tensor, int, int]]:
    """This rank's prompts with their greedy continuations, ids [B,S] on the model's device; how many tokens of a row are new;
    how many rows had logits that were not finite."""
    for prompts in _prompt_batches(model, text_NT, num_tokens, num_prompts):
        new, broken = _continue(model, prompts, max_new_tokens=num_tokens, g_lm=g_LHKK)
        ids_BS = torch.cat((torch.tensor(prompts), torch.tensor(new)), dim=1)
        yield ids_BS.to(model.embedding.weight.device), len(new[0]), broken


def order_parameters(
    model: PLDRModel, text_NT: Tensor, *, num_tokens: int, num_prompts: int, seed: int
) -> dict[str, Any]:
    """The papers' protocol: runs 1 and 2 sample (p = 0.8, T = 1) without caches and the deductive outputs are taken after the
    last token; run C takes them after the prompt, where a cache would. Per tensor and pair of runs: `Pair.as_dict`."""
    pairs = {name: {runs: Pair() for runs in RUNS} for name in tensors_of(model.config)}
    device = model.embedding.weight.device
    for prompts in _prompt_batches(model, text_NT, num_tokens, num_prompts):
        ids = {"C": torch.tensor(prompts)}
        for number in (1, 2):
            new, _ = _continue(
                model,
                prompts,
                max_new_tokens=num_tokens,
                use_cache=False,
                seed=seed + number,
                temperature=1.0,
                top_p=0.8,
            )
            ids[str(number)] = torch.tensor([p + n for p, n in zip(prompts, new, strict=True)])
        with torch.inference_mode():
            outputs = {run: deduce(model, ids_BS.to(device)) for run, ids_BS in ids.items()}
        for name, of_tensor in pairs.items():
            for (a, b), pair in of_tensor.items():
                pair.update(outputs[a][name], outputs[b][name])
    return {
        name: {f"{a}-{b}": merged(pair).as_dict() for (a, b), pair in of_tensor.items()}
        for name, of_tensor in pairs.items()
    }


def samples(
    model: PLDRModel, g_LHKK: Tensor, prompts: Sequence[list[int]], *, num_tokens: int, seed: int
) -> list[Sample]:
    """Each prompt twice: greedy, and drawn at temperature 0.8, top-p 0.9 from one seed; with caches and without."""
    room = model.config.context_length // 2
    cut = [prompt[-room:] for prompt in prompts]
    out = []
    for how, settings in (
        ("greedy", {}),
        (f"temperature 0.8, top-p 0.9, seed {seed}", {"temperature": 0.8, "top_p": 0.9, "seed": seed}),
    ):
        cached, _ = _continue(model, cut, max_new_tokens=num_tokens, g_lm=g_LHKK, **settings)
        live, _ = _continue(model, cut, max_new_tokens=num_tokens, use_cache=False, **settings)
        out += [Sample(how, *rest) for rest in zip(cut, cached, live, strict=True)]
    return out


def _continue(
    model: PLDRModel, prompts: Sequence[list[int]], *, max_new_tokens: int, **settings: Any
) -> tuple[list[list[int]], int]:
    """The new tokens of each prompt, and how many prompts had logits that were not finite: theirs end in padding."""
    try:
        return generate(model, prompts, max_new_tokens=max_new_tokens, **settings), 0
    except NotFiniteError as error:
        room = [min(max_new_tokens, model.config.context_length - len(prompt)) for prompt in prompts]
        pad = model.config.pad_id
        return [row + [pad] * (size - len(row)) for row, size in zip(error.new, room, strict=True)], len(error.rows)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first index where two sequences differ; None when they are equal."""
    if len(a) != len(b):
        return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)


def _one_in_each_part(count: int, seed: int) -> list[int]:
    """LIVE_CHECKS different indices below `count` (all of them where there are fewer): one from each of as many equal parts."""
    parts = min(LIVE_CHECKS, count)
    shares = torch.rand(parts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    lows = [count * index // parts for index in range(parts)]
    highs = [*lows[1:], count]
    return [low + int(drawn * (high - low)) for drawn, low, high in zip(shares, lows, highs, strict=True)]


def _prompt_batches(model: PLDRModel, text_NT: Tensor, num_tokens: int, num_prompts: int) -> list[list[list[int]]]:
    """This rank's prompts in batches that fit: as long as the new tokens leave room for, from a quarter to half a context."""
    S = text_NT.shape[1] - 1
    length = max(1, S // 4, min(S // 2, S - num_tokens))
    # Batches are sized by full sequences, which a pass without caches processes in the end.
    return [ids_BS[:, :length].tolist() for ids_BS in batches(share(text_NT[:num_prompts, :S]), model)]
