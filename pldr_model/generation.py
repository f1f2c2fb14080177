"""Generation: prefill and cached decoding of a batch of prompts, or the control without any cache.

Background (2502.13502): with KV-cache and G-cache each new token costs what it costs an SDPA decoder. Without
caches the whole sequence is read again for each token and G is computed from it again; that is the control a
cached model is compared with, and the only one (keeping just K/V would freeze G as well).

Decision: every prompt is prefilled alone and unpadded, so that its G and K/V are exactly those of the prompt
alone; then rows decode together, each at its own length, as many as fit `memory_budget`, and a row that has ended is
given to the next prompt (`decode.slots`). A prompt's random numbers come from (seed, prompt) and the index of the token,
so that its tokens do not depend on its neighbors.
Decision: a row whose logits are NaN or infinite has no next token. It ends; the others go on, and the error comes
when they are done.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from pldr_model.config import ModelConfig
from pldr_model.decode.capture import CapturedStep
from pldr_model.decode.decoder import Decoder
from pldr_model.decode.lookup import continue_alone
from pldr_model.decode.rows import Draws, Row, Rules, Stop
from pldr_model.decode.slots import Slots
from pldr_model.model import PLDRModel, g_shape
from pldr_model.next_token import RowSettings
from pldr_model.sampling import read_sampling, seeds_of

CPU_MEMORY = 512 << 20  # bytes for the rows that decode together
GPU_SHARE = 0.25  # of the device's memory, whatever is free: the same call makes the same batches
GPU_BLOCK = 16  # tokens between two looks of the host, which waits for a GPU then


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
    model: PLDRModel | Decoder,
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
    block: int | None = None,
    speculate: bool | None = None,
    capture: bool = False,
) -> list[list[int]]:
    """Continue each prompt; returns the new tokens only, in the order of the prompts. A decoder of the model spares
    preparing one.

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
    block: tokens of a row between two looks of the host; None: 1, and GPU_BLOCK on a GPU. It changes no token.
    speculate: where one row decodes at a time, whether tokens that followed before are read ahead (`decode.lookup`); None: on a
        CPU. It changes no token.
    capture: run steps as CUDA graphs, which are made anew by each call: for thousands of tokens.
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
        block=block,
        speculate=speculate,
        capture=capture,
    )
    return new


@torch.inference_mode()
def generate_steps(
    model: PLDRModel | Decoder,
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
    block: int | None = None,
    speculate: bool | None = None,
    capture: bool = False,
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
    if stop is not None and not callable(stop) and not all(isinstance(ending, Iterable) for ending in stop):
        raise ValueError("stop: holds what is not a sequence of token ids; give a list of sequences, or a predicate")
    if stop is not None and not callable(stop) and not all(stop):
        raise ValueError("stop: holds an empty sequence, which would end every row immediately; remove it")
    if block is not None and block < 1:
        raise ValueError(f"block: {block} must be at least 1 token")
    if g_lm is not None and tuple(g_lm.shape) != g_shape(model.config):
        raise ValueError(f"g_lm: shape {tuple(g_lm.shape)}, generation needs [L,H,K,K] = {g_shape(model.config)}")
    config = model.config
    rows = [
        Row(index, prompt, min(sampling.max_new_tokens, config.context_length - len(prompt)))
        for index, prompt in enumerate(_read_prompts(config, prompts))
    ]
    if sampling.seed is not None:
        for row, own in zip(rows, seeds_of([row.prompt for row in rows], sampling.seed), strict=True):
            row.seed = own
    new = [row.new for row in rows]
    device, dtype = _place(model)
    rules, settings = Rules(eos_id, stop), RowSettings.of([sampling], vocab_size=config.vocab_size, device=device)
    row_bytes = _row_bytes(config, dtype, settings, live_g=g_lm is None, use_cache=use_cache)
    room = memory_budget(device) if memory is None else memory
    decoder = None
    if use_cache:
        decoder = model if isinstance(model, Decoder) else Decoder.of(model)
    elif isinstance(model, Decoder):
        raise ValueError("use_cache: False needs the model; a decoder has nothing but caches")
    steps: Iterator[None]
    if capture and device.type != "cuda":
        raise ValueError(f"capture: CUDA graphs need a GPU, the model is on the {device.type.upper()}; leave it off")
    for wave, num_slots in _waves(rows, row_bytes, room):
        if decoder is not None and num_slots == 1 and (device.type == "cpu" if speculate is None else speculate):
            steps = chain.from_iterable(continue_alone(decoder, row, rules, settings, g_lm=g_lm) for row in wave)
        elif decoder is not None:
            slots = Slots(
                decoder,
                rules,
                settings,
                num_slots=num_slots,
                capacity=max(row.length for row in wave),
                g_lm=g_lm,
                block=block or (1 if device.type == "cpu" else GPU_BLOCK),
                step=CapturedStep(decoder.step_kernels) if capture else None,
            )
            steps = slots.run(deque(wave))
        else:
            assert isinstance(model, PLDRModel)
            steps = _decode_uncached(model, wave, num_slots, rules, settings, g_lm=g_lm)
        for _ in steps:
            yield new
    if failed := {row.index: len(row.new) for row in rows if row.failed}:
        raise NotFiniteError(failed, new)


def memory_budget(device: torch.device) -> int:
    """Bytes for the rows that decode together: CPU_MEMORY, or on a GPU a fixed share of its memory."""
    if device.type != "cuda":
        return CPU_MEMORY
    return int(torch.cuda.get_device_properties(device).total_memory * GPU_SHARE)


def _place(model: PLDRModel | Decoder) -> tuple[torch.device, torch.dtype]:
    if isinstance(model, Decoder):
        return model.device, model.dtype
    weight = model.embedding.weight
    return weight.device, weight.dtype


def _decode_uncached(
    model: PLDRModel, wave: list[Row], num_rows: int, rules: Rules, settings: RowSettings, *, g_lm: Tensor | None
) -> Iterator[None]:
    """Rows of one length share a pass: padding to a common length would change G, a sum over the sequence."""
    device = model.embedding.weight.device
    for length in sorted({len(row.prompt) for row in wave}):
        waiting = [row for row in wave if len(row.prompt) == length]
        while waiting:
            live, waiting = waiting[:num_rows], waiting[num_rows:]
            draws = Draws(live, settings, device)
            while live:
                ids_BS = torch.tensor([row.prompt.tolist() + row.new for row in live], device=device)
                logits_BSV = model(ids_BS, g_lm=g_lm, padded=False, last_only=True)
                tokens, finite = draws.next(logits_BSV[:, -1]).tolist()
                going = [index for index, row in enumerate(live) if rules.take(row, tokens[index], bool(finite[index]))]
                live = [live[index] for index in going]
                draws.keep(going)
                yield


def _row_bytes(
    config: ModelConfig, dtype: torch.dtype, settings: RowSettings, *, live_g: bool, use_cache: bool
) -> Callable[[int], int]:
    """Bytes of one row of this many tokens while it decodes. Logits count twice (the next ones are there before the last ones
    are gone), and cached keys, values and G too: when rows end, those that go on are copied."""
    L, H, K, V = config.num_layers, config.num_heads, config.head_dim, config.vocab_size
    logits = V * (2 * dtype.itemsize + 8 * settings.copies)
    if not use_cache:  # every pass reads all tokens again: inputs and outputs of the widest products
        return lambda length: logits + length * dtype.itemsize * (4 * config.d_model + 3 * config.feed_forward_size)
    own_g = L * H * K * K if live_g and config.g_source == "learned" else 0
    return lambda length: logits + 2 * dtype.itemsize * (2 * L * H * K * length + own_g)


def _waves(rows: list[Row], row_bytes: Callable[[int], int], memory: int) -> Iterator[tuple[list[Row], int]]:
    """Rows that take turns in one cache, and how many of them at once take no more than `memory` (one at least). All of them
    if they fit at once; else short ones come first and share no cache with those that need more than twice their place."""

    def fitting(length: int) -> int:
        return max(1, memory // row_bytes(length))

    wave: list[Row] = []
    for row in sorted(rows, key=lambda row: row.length):
        if wave and len(wave) >= fitting(row.length) and row.length > 2 * wave[0].length:
            yield wave, min(len(wave), fitting(wave[-1].length))
            wave = []
        wave.append(row)
    yield wave, min(len(wave), fitting(wave[-1].length))


def _read_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]]) -> list[array[int]]:
    """The ids as four bytes each. Errors: ValueError naming the prompt."""
    if not len(prompts):
        raise ValueError("prompts: none given")
    read = []
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, Iterable):
            raise ValueError(f"prompts: holds {prompt!r}; give a list of prompts, each a sequence of token ids")
        if not len(prompt):
            raise ValueError(f"prompts[{index}]: empty; give at least one token (bos or eos will do)")
        if len(prompt) >= config.context_length:
            raise ValueError(
                f"prompts[{index}]: {len(prompt)} tokens leave no room for a new one in the context of "
                f"{config.context_length}; shorten it"
            )
        try:
            ids = array("q", list(prompt))
        except (TypeError, OverflowError):
            raise ValueError(f"prompts[{index}]: token ids are integers") from None
        if min(ids) < 0 or max(ids) >= config.vocab_size:
            raise ValueError(f"prompts[{index}]: holds ids outside the vocabulary of {config.vocab_size}")
        read.append(array("i", ids))
    return read
