"""Generation: prefill and cached decoding of a batch of prompts, or the control without any cache.

Background (2502.13502): with KV-cache and G-cache each new token costs what it costs an SDPA decoder. Without
caches the whole sequence is read again for each token and G is computed from it again; that is the control a
cached model is compared with, and the only one (keeping just K/V would freeze G as well).

Decision: every prompt is prefilled alone and unpadded, so that its G and K/V are exactly those of the prompt
alone; then all rows decode together, each at its own length. Sampling draws from one CPU generator per
prompt, seeded by (seed, prompt), so that a prompt's tokens do not depend on its neighbours in the batch.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from pldr_model.model import PLDRModel, g_shape

Stop = Callable[[list[int]], bool] | Sequence[Sequence[int]]


def generate(
    model: PLDRModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    g_lm: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_id: int | None = None,
    stop: Stop | None = None,
    use_cache: bool = True,
    seed: int | None = None,
) -> list[list[int]]:
    """Continue each prompt; returns the new tokens only, in the order of the prompts.

    A row ends with `max_new_tokens`, with a full context, with `eos_id` (kept as its last token), or when
    `stop` matches: a predicate on the row's new tokens, or token sequences one of which they end with (kept
    as well). temperature 0 is greedy. Otherwise logits / temperature, then the `top_k` best (0: all), then
    the smallest set of best tokens whose probability reaches `top_p` (the token that crosses it is kept).
    g_lm: [L,H,K,K] for every prompt. None: the model's constant G, or, for a model that learns G, that of
        each prompt.
    use_cache False: no KV- and no G-cache, the whole sequence each time (a given `g_lm` still replaces the
        live one).
    seed: None: a fresh random one. Copies of one prompt in a batch differ; the same call gives the same
        tokens.
    Errors: ValueError for no or empty prompts, a prompt that leaves no room in the context, ids outside the
    vocabulary, settings out of range.
    """
    *_, new = generate_steps(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        g_lm=g_lm,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_id=eos_id,
        stop=stop,
        use_cache=use_cache,
        seed=seed,
    )
    return new


@torch.inference_mode()
def generate_steps(
    model: PLDRModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    g_lm: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_id: int | None = None,
    stop: Stop | None = None,
    use_cache: bool = True,
    seed: int | None = None,
) -> Iterator[list[list[int]]]:
    """`generate` step by step, for streaming: after each step, every row's new tokens so far. Nothing is checked or computed
    before the first step is asked for."""
    _check_prompts(model, prompts)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: {max_new_tokens} must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: {temperature} must be 0 (greedy) or a positive number")
    if top_k < 0:
        raise ValueError(f"top_k: {top_k} must be 0 (all tokens) or positive")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: {top_p} must be in (0, 1]")
    if stop is not None and not callable(stop) and not all(stop):
        raise ValueError("stop: holds an empty sequence, which would end every row immediately; remove it")
    if g_lm is not None and tuple(g_lm.shape) != g_shape(model.config):
        raise ValueError(f"g_lm: shape {tuple(g_lm.shape)}, generation needs [L,H,K,K] = {g_shape(model.config)}")
    rows = [_Row(list(prompt)) for prompt in prompts]
    if temperature > 0:
        _seed_rows(rows, secrets.randbits(63) if seed is None else seed)
    context_length = model.config.context_length

    def ended(row: _Row) -> bool:
        full = len(row.new) == max_new_tokens or len(row.prompt) + len(row.new) == context_length
        return full or row.new[-1] == eos_id or (stop is not None and _stopped(row.new, stop))

    def choose(live: list[_Row], logits_BV: Tensor) -> list[int]:
        """Give every live row its next token; returns the indices of those that continue."""
        if temperature == 0:
            chosen = logits_BV.argmax(dim=-1).tolist()
        else:
            p_BV = token_probabilities(logits_BV.cpu(), temperature=temperature, top_k=top_k, top_p=top_p)
            chosen = [int(p_V.multinomial(1, generator=r.generator)) for r, p_V in zip(live, p_BV, strict=True)]
        for row, token in zip(live, chosen, strict=True):
            row.new.append(token)
        return [index for index, row in enumerate(live) if not ended(row)]

    if use_cache:
        capacity = min(context_length, max(len(row.prompt) for row in rows) + max_new_tokens)
        steps = _decode_cached(model, rows, choose, g_lm=g_lm, capacity=capacity)
    else:
        steps = _decode_uncached(model, rows, choose, g_lm=g_lm)
    for _ in steps:
        yield [row.new for row in rows]


def token_probabilities(logits_BV: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """The distribution that sampling draws from, [B,V] in fp64: temperature, top-k, then top-p (nucleus).

    top-p keeps the fewest best tokens whose probabilities sum to at least `top_p`: the token that crosses it
    is kept.
    """
    p_BV = (logits_BV.double() / temperature).softmax(dim=-1)
    sorted_BV, order_BV = p_BV.sort(dim=-1, descending=True, stable=True)
    if top_k:
        sorted_BV[:, top_k:] = 0.0
        sorted_BV /= sorted_BV.sum(dim=-1, keepdim=True)
    if top_p < 1.0:
        before_BV = sorted_BV.cumsum(dim=-1) - sorted_BV
        sorted_BV[before_BV >= top_p] = 0.0
    return torch.zeros_like(p_BV).scatter_(-1, order_BV, sorted_BV / sorted_BV.sum(dim=-1, keepdim=True))


class _Row:
    """A prompt that is being continued."""

    def __init__(self, prompt: list[int]) -> None:
        self.prompt = prompt
        self.new: list[int] = []
        self.generator: torch.Generator | None = None


Choose = Callable[[list[_Row], Tensor], list[int]]


def _decode_cached(
    model: PLDRModel, rows: list[_Row], choose: Choose, *, g_lm: Tensor | None, capacity: int
) -> Iterator[None]:
    device = model.embedding.weight.device
    cache = model.new_cache(batch_size=len(rows), capacity=capacity, g_lm=g_lm)
    first_logits = []
    for index, row in enumerate(rows):
        alone = model.new_cache(batch_size=1, capacity=len(row.prompt), g_lm=g_lm)
        prompt_1S = torch.tensor([row.prompt], device=device)
        first_logits.append(model.extend(prompt_1S, alone))
        cache.stack_row(index, alone)
    live, logits_BV = rows, torch.cat(first_logits)
    while True:
        going = choose(live, logits_BV)
        yield
        if not going:
            return
        if len(going) < len(live):
            cache.keep(going)
            live = [live[index] for index in going]
        last_B1 = torch.tensor([[row.new[-1]] for row in live], device=device)
        logits_BV = model.extend(last_B1, cache)


def _decode_uncached(model: PLDRModel, rows: list[_Row], choose: Choose, *, g_lm: Tensor | None) -> Iterator[None]:
    """Rows of one length share a pass: padding to a common length would change G, a sum over the sequence."""
    for length in sorted({len(row.prompt) for row in rows}):
        live = [row for row in rows if len(row.prompt) == length]
        while live:
            ids_BS = torch.tensor([row.prompt + row.new for row in live], device=model.embedding.weight.device)
            logits_BSV = model(ids_BS, g_lm=g_lm, padded=False, last_only=True)
            live = [live[index] for index in choose(live, logits_BSV[:, -1])]
            yield


def _stopped(new: list[int], stop: Stop) -> bool:
    if callable(stop):
        return stop(new)
    return any(new[-len(ending) :] == list(ending) for ending in stop)


def _seed_rows(rows: list[_Row], seed: int) -> None:
    copies: Counter[tuple[int, ...]] = Counter()
    for row in rows:
        key = tuple(row.prompt)
        digest = hashlib.sha256(f"{seed} {copies[key]} {key}".encode()).digest()
        row.generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        copies[key] += 1


def _check_prompts(model: PLDRModel, prompts: Sequence[Sequence[int]]) -> None:
    vocab_size, context_length = model.config.vocab_size, model.config.context_length
    if not prompts:
        raise ValueError("prompts: none given")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompts[{index}]: empty; give at least one token (bos or eos will do)")
        if len(prompt) >= context_length:
            raise ValueError(
                f"prompts[{index}]: {len(prompt)} tokens leave no room for a new one in the context of "
                f"{context_length}; shorten it"
            )
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise ValueError(f"prompts[{index}]: holds ids outside the vocabulary of {vocab_size}")
