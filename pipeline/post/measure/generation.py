"""Generated text with and without caches: greedy agreement, the papers' order parameter, samples for the page.

The control processes the whole sequence again for every token and deduces G from it: no KV-cache, no G-cache.
Every function but `samples` is collective where there are several ranks. Shapes: N sequences, T = S+1 tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.distributed import merged, share
from pipeline.post.measure.downstream import Totals
from pipeline.post.measure.observe import batches, deduce, tensors_of
from pipeline.post.measure.statistics import Pair
from pldr_model.generation import generate
from pldr_model.model import PLDRModel

RUNS = (("1", "2"), ("1", "C"), ("2", "C"))


class Sample(NamedTuple):
    """One prompt and its continuations with and without caches, as ids. `how`: how tokens were chosen."""

    how: str
    prompt: list[int]
    cached: list[int]
    live: list[int]


def greedy_agreement(
    model: PLDRModel, g_LHKK: Tensor, text_NT: Tensor, *, num_tokens: int, num_prompts: int
) -> dict[str, Any]:
    """Greedy continuations with KV- and G-cache against those without any cache (live G at every token).

    After the first difference the two texts are not comparable, so only decisions taken after identical tokens are
    counted: `per_decision` = 1 - differences / decisions. `identical` is the share of prompts that never differ.
    """
    totals = Totals()
    for prompts in _prompt_batches(model, text_NT, num_tokens, num_prompts):
        cached = generate(model, prompts, max_new_tokens=num_tokens, g_lm=g_LHKK)
        live = generate(model, prompts, max_new_tokens=num_tokens, use_cache=False)
        for ours, control in zip(cached, live, strict=True):
            same = first_difference(ours, control)
            totals.add("decisions", len(control) if same is None else same + 1)
            totals.add("differences", same is not None)
            totals.add("prompts", 1)
            totals.take("tokens", len(control))
            totals.take("prompt", len(prompts[0]))
    totals = merged(totals)
    sums = totals.sums
    return {
        "per_decision": 1 - sums["differences"] / sums["decisions"],
        "identical": 1 - sums["differences"] / sums["prompts"],
        "num_prompts": sums["prompts"],
        "prompt_length": int(totals.largest["prompt"]),
        "num_tokens": int(totals.largest["tokens"]),
        "decisions": sums["decisions"],
    }


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
            new = generate(
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
        cached = generate(model, cut, max_new_tokens=num_tokens, g_lm=g_LHKK, **settings)  # type: ignore[arg-type]
        live = generate(model, cut, max_new_tokens=num_tokens, use_cache=False, **settings)  # type: ignore[arg-type]
        out += [Sample(how, *rest) for rest in zip(cut, cached, live, strict=True)]
    return out


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first index where two sequences differ; None when they are equal."""
    if len(a) != len(b):
        return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)


def _prompt_batches(model: PLDRModel, text_NT: Tensor, num_tokens: int, num_prompts: int) -> list[list[list[int]]]:
    """This rank's prompts in batches that fit: as long as the new tokens leave room for, from a quarter to half a context."""
    S = text_NT.shape[1] - 1
    length = max(1, S // 4, min(S // 2, S - num_tokens))
    # Batches are sized by full sequences, which a pass without caches processes in the end.
    return [ids_BS[:, :length].tolist() for ids_BS in batches(share(text_NT[:num_prompts, :S]), model)]
