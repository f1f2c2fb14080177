"""Generation: prefill and cached decoding of a batch of prompts, or the control without any cache.

Background (2502.13502): with KV-cache and G-cache each new token costs what it costs an SDPA decoder. Without
caches the whole sequence is read again for each token and G is computed from it again; that is the control a
cached model is compared with, and the only one (keeping just K/V would freeze G as well).

Decision: every prompt is prefilled alone and unpadded, so that its G and K/V are exactly those of the prompt
alone; then rows decode together, each at its own length, as many as fit `memory_budget`. A prompt's random numbers
come from (seed, prompt) and the index of the token, so that its tokens do not depend on its neighbors.
Decision: a row whose logits are NaN or infinite has no next token. It ends; the others go on, and the error comes
when they are done.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from pldr_model.config import ModelConfig
from pldr_model.model import PLDRModel, g_shape
from pldr_model.next_token import RowSettings, choose
from pldr_model.sampling import Sampling, read_sampling, seeds_of

Stop = Callable[[int, list[int]], bool] | Sequence[Sequence[int]]

CPU_MEMORY = 512 << 20  # bytes for the rows that decode together
GPU_SHARE = 0.25  # of the device's memory, whatever is free: the same call makes the same batches
SAMPLED_COPIES = 8  # fp64 and int64 tensors [B,V] that `choose` holds at once


class NotFiniteError(ValueError):
    """Rows ended because their logits were NaN or infinite; all other rows are complete.

    rows: index of the prompt -> new tokens before that. new: what `generate` would have returned, those rows cut there.
    """

    def __init__(self, rows: dict[int, int], new: list[list[int]]) -> None:
        first, *others = rows
        more = f", and those of {len(others)} other prompts" if others else ""
        super().__init__(f"prompts[{first}]: its logits are NaN or infinite after {rows[first]} new tokens{more}")
        self.rows, self.new = rows, new


def generate(
    model: PLDRModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    g_lm: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    eos_id: int | None = None,
    stop: Stop | None = None,
    use_cache: bool = True,
    seed: int | None = None,
    memory: int | None = None,
) -> list[list[int]]:
    """Continue each prompt; returns the new tokens only, in the order of the prompts.

    A row ends with `max_new_tokens`, with a full context, with `eos_id` (kept as its last token), or when
    `stop` matches: a predicate on (index of the prompt, its new tokens), asked once after each of them, or token
    sequences one of which they end with (kept as well). How tokens are chosen: `pldr_model.next_token`; temperature 0 is
    greedy.
    g_lm: [L,H,K,K] for every prompt. None: the model's constant G, or, for a model that learns G, that of
        each prompt.
    use_cache False: no KV- and no G-cache, the whole sequence each time (a given `g_lm` still replaces the
        live one).
    seed: None: a fresh random one. Copies of one prompt differ; the same call gives the same tokens.
    memory: bytes that the rows which decode together may take (never less than one row); None: `memory_budget`.
    Errors: ValueError for no or empty prompts, a prompt that leaves no room in the context, ids outside the
    vocabulary, settings of a wrong type or out of range (`read_sampling`). NotFiniteError, when all rows have ended, for
    those whose logits were not finite.
    """
    *_, new = generate_steps(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        g_lm=g_lm,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        eos_id=eos_id,
        stop=stop,
        use_cache=use_cache,
        seed=seed,
        memory=memory,
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
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    eos_id: int | None = None,
    stop: Stop | None = None,
    use_cache: bool = True,
    seed: int | None = None,
    memory: int | None = None,
) -> Iterator[list[list[int]]]:
    """`generate` step by step, for streaming: after each step, every row's new tokens so far (one list, which grows; rows of
    a later batch are still empty). Nothing is checked or computed before the first step is asked for."""
    sampling = read_sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    if stop is not None and not callable(stop) and not all(stop):
        raise ValueError("stop: holds an empty sequence, which would end every row immediately; remove it")
    if g_lm is not None and tuple(g_lm.shape) != g_shape(model.config):
        raise ValueError(f"g_lm: shape {tuple(g_lm.shape)}, generation needs [L,H,K,K] = {g_shape(model.config)}")
    rows = [_Row(index, prompt) for index, prompt in enumerate(_read_prompts(model.config, prompts))]
    if sampling.seed is not None:
        for row, own in zip(rows, seeds_of([row.prompt for row in rows], sampling.seed), strict=True):
            row.seed = own
    new = [row.new for row in rows]
    device = model.embedding.weight.device
    chooser = _Chooser(sampling, model.config, device, eos_id, stop)
    row_bytes = _row_bytes(model, sampling, live_g=g_lm is None, use_cache=use_cache)
    room = memory_budget(model) if memory is None else memory
    for batch in _batches(rows, sampling.max_new_tokens, model.config.context_length, row_bytes, room):
        if use_cache:
            steps = _decode_cached(model, batch, chooser, g_lm=g_lm, max_new_tokens=sampling.max_new_tokens)
        else:
            steps = _decode_uncached(model, batch, chooser, g_lm=g_lm)
        for _ in steps:
            yield new
    if failed := {row.index: len(row.new) for row in rows if row.failed}:
        raise NotFiniteError(failed, new)


def memory_budget(model: PLDRModel) -> int:
    """Bytes for the rows that decode together: CPU_MEMORY, or on a GPU a fixed share of its memory."""
    device = model.embedding.weight.device
    if device.type != "cuda":
        return CPU_MEMORY
    return int(torch.cuda.get_device_properties(device).total_memory * GPU_SHARE)


class _Row:
    """A prompt that is being continued."""

    __slots__ = ("failed", "index", "new", "prompt", "seed")

    def __init__(self, index: int, prompt: array[int]) -> None:
        self.index, self.prompt = index, prompt
        self.new: list[int] = []
        self.failed = False  # its logits were not finite
        self.seed = 0


class _Chooser:
    """Gives rows their next tokens, and knows when they end."""

    def __init__(
        self, sampling: Sampling, config: ModelConfig, device: torch.device, eos_id: int | None, stop: Stop | None
    ) -> None:
        self.sampling, self.context_length, self.eos_id, self.stop = sampling, config.context_length, eos_id, stop
        self.settings = RowSettings.of([sampling], vocab_size=config.vocab_size, device=device)

    def __call__(self, live: list[_Row], logits_BV: Tensor) -> list[int]:
        """Give every live row its next token; returns the indices of those that continue."""
        finite_B = logits_BV.isfinite().all(dim=-1)
        for row, finite in zip(live, finite_B.tolist(), strict=True):
            row.failed = not finite
        device = logits_BV.device
        chosen = choose(
            logits_BV,
            self.settings,
            seed_B=torch.tensor([row.seed for row in live], device=device),
            number_B=torch.tensor([len(row.new) for row in live], device=device),
            seen_BV=self._seen(live, logits_BV) if self.settings.penalizes else None,
        ).tolist()
        going = []
        for index, (row, token) in enumerate(zip(live, chosen, strict=True)):
            if not row.failed:
                row.new.append(token)
            if not row.failed and not self._ended(row):
                going.append(index)
        return going

    @staticmethod
    def _seen(live: list[_Row], logits_BV: Tensor) -> Tensor:
        seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
        for seen_V, row in zip(seen_BV, live, strict=True):
            seen_V[row.prompt.tolist() + row.new] = True
        return seen_BV

    def _ended(self, row: _Row) -> bool:
        full = len(row.new) == self.sampling.max_new_tokens or len(row.prompt) + len(row.new) == self.context_length
        stopped = self.stop is not None and _stopped(row, self.stop)
        return full or stopped or row.new[-1] == self.eos_id


def _decode_cached(
    model: PLDRModel, rows: list[_Row], chooser: _Chooser, *, g_lm: Tensor | None, max_new_tokens: int
) -> Iterator[None]:
    device, context_length = model.embedding.weight.device, model.config.context_length
    # The last new token is chosen and never read.
    capacity = max(min(context_length, len(row.prompt) + max_new_tokens) - 1 for row in rows)
    cache = model.new_cache(batch_size=len(rows), capacity=capacity, g_lm=g_lm)
    logits_BV = model.embedding.weight.new_empty(len(rows), model.config.vocab_size)
    for index, row in enumerate(rows):
        alone = model.new_cache(batch_size=1, capacity=len(row.prompt), g_lm=g_lm)
        prompt_1S = torch.tensor([row.prompt.tolist()], device=device)
        logits_BV[index] = model.extend(prompt_1S, alone)[0]
        cache.stack_row(index, alone)
    live = rows
    while True:
        going = chooser(live, logits_BV)
        yield
        if not going:
            return
        if len(going) < len(live):
            cache.keep(going)
            live = [live[index] for index in going]
        last_B1 = torch.tensor([[row.new[-1]] for row in live], device=device)
        logits_BV = model.extend(last_B1, cache)


def _decode_uncached(model: PLDRModel, rows: list[_Row], chooser: _Chooser, *, g_lm: Tensor | None) -> Iterator[None]:
    """Rows of one length share a pass: padding to a common length would change G, a sum over the sequence."""
    for length in sorted({len(row.prompt) for row in rows}):
        live = [row for row in rows if len(row.prompt) == length]
        while live:
            ids = [row.prompt.tolist() + row.new for row in live]
            ids_BS = torch.tensor(ids, device=model.embedding.weight.device)
            logits_BSV = model(ids_BS, g_lm=g_lm, padded=False, last_only=True)
            live = [live[index] for index in chooser(live, logits_BSV[:, -1])]
            yield


def _stopped(row: _Row, stop: Stop) -> bool:
    if callable(stop):
        return stop(row.index, row.new)
    return any(row.new[-len(ending) :] == list(ending) for ending in stop)


def _row_bytes(model: PLDRModel, sampling: Sampling, *, live_g: bool, use_cache: bool) -> Callable[[int], int]:
    """Bytes of one row of this many tokens while it decodes. Logits count twice (the next ones are there before the last ones
    are gone), and cached keys, values and G too: when rows end, those that go on are copied."""
    config, weight = model.config, model.embedding.weight
    L, H, K, V = config.num_layers, config.num_heads, config.head_dim, config.vocab_size
    logits = V * (2 * weight.itemsize + (8 * SAMPLED_COPIES if sampling.temperature else 0))
    if not use_cache:  # every pass reads all tokens again: inputs and outputs of the widest products
        return lambda length: logits + length * weight.itemsize * (4 * config.d_model + 3 * config.feed_forward_size)
    own_g = L * H * K * K if live_g and config.g_source == "learned" else 0
    return lambda length: logits + 2 * weight.itemsize * (2 * L * H * K * length + own_g)


def _batches(
    rows: list[_Row], max_new_tokens: int, context_length: int, row_bytes: Callable[[int], int], memory: int
) -> Iterator[list[_Row]]:
    """The rows in batches that take no more than `memory` (one row at least). The short ones come first: every row of a batch
    takes what its longest needs."""
    batch: list[_Row] = []
    for row in sorted(rows, key=lambda row: len(row.prompt)):
        length = min(context_length, len(row.prompt) + max_new_tokens)
        if batch and (len(batch) + 1) * row_bytes(length) > memory:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def _read_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]]) -> list[array[int]]:
    """The ids as four bytes each. Errors: ValueError naming the prompt."""
    if not len(prompts):
        raise ValueError("prompts: none given")
    read = []
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompts[{index}]: empty; give at least one token (bos or eos will do)")
        if len(prompt) >= config.context_length:
            raise ValueError(
                f"prompts[{index}]: {len(prompt)} tokens leave no room for a new one in the context of "
                f"{config.context_length}; shorten it"
            )
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError(f"prompts[{index}]: holds ids outside the vocabulary of {config.vocab_size}")
        try:
            read.append(array("i", list(prompt)))
        except TypeError:
            raise ValueError(f"prompts[{index}]: token ids are integers") from None
    return read
