"""Log-probabilities of continuations: what evaluations, `score` and `logprobs` are made of.

With a cached G_LM the model is causal, so that a beginning that several requests share is read once, sequences of different
lengths share a pass (padding at the end reaches nobody), and neither changes a number by more than rounding. Only the tokens
that are asked for get logits: [asked, V], never [B, S, V].

Decision: the model computes in fp32. Of the logits [V] of a token the largest is subtracted first, their exponentials are
summed in fp32, and all that follows is fp64. Measured against fp64 throughout (V 32000, 2026-11-28): off by 5e-7, where fp32's
log_softmax is off by 7e-6; fp64 throughout takes three times as long, nearly as long as the output layer.

Shapes: B sequences, S tokens, D model width, N asked tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.inference.grouping import Group, Ids, batches, groups, windows
from pldr_model.decode.cache import KVCache
from pldr_model.decode.decoder import Decoder
from pldr_model.generation import memory_budget
from pldr_model.model import PLDRModel

# What a pass costs beside its tokens, in tokens: 40 at 110M on one CPU thread (2026-11-28); on a GPU not measured.
PASS_TOKENS = {"cpu": 40, "cuda": 2048}
Request = tuple[Sequence[int], Sequence[int]]  # context, continuation
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Scored:
    """Of a continuation: its log-probability (nats), whether it is what greedy decoding gives, and its number of tokens."""

    logprob: float
    greedy: bool
    num_tokens: int


class Scorer:
    """Scores token ids with a model, or a decoder of it (which spares preparing one).

    g_lm: [L,H,K,K], in place of the model's own G. live: G_LM is computed from each request. eos_id: what an empty context is.
    memory: bytes for a batch; None: `pldr_model.generation.memory_budget`.

    A live G is that of context *and* continuation, as in training: what is to be predicted takes part in predicting it. Where
    G is not invariant, live scores are too good by that (the leak). So a live model takes one full pass for each request, and
    only requests of equal length share a pass.
    """

    def __init__(
        self,
        model: PLDRModel | Decoder,
        *,
        g_lm: Tensor | None = None,
        live: bool = False,
        eos_id: int,
        memory: int | None = None,
    ) -> None:
        learned = model.config.g_source == "learned"
        if live and (g_lm is not None or not learned or isinstance(model, Decoder)):
            raise ValueError("live: needs a model with a metric learner, and no g_lm in its place")
        if not live and g_lm is None and learned:
            raise ValueError("g_lm: missing; without it this model's G depends on the request: pass live=True")
        self.live = model if live and isinstance(model, PLDRModel) else None
        self.decoder = model if isinstance(model, Decoder) else Decoder.of(model)
        self.config, self.g_lm, self.eos_id = model.config, g_lm, eos_id
        self.memory = memory_budget(self.decoder.device) if memory is None else memory

    def score(
        self, requests: Sequence[Request], *, progress: Progress | None = None, name: str = "requests"
    ) -> list[Scored]:
        """Score each continuation after its context, in their order.

        A context too long for the model is cut from the left, as lm-evaluation-harness does: context and continuation
        without its last token fill the context length. progress: called with the number of requests that a batch finished.
        name: what errors call the requests. Raises UserError that names the first with an empty continuation, one longer
        than the context, ids outside the vocabulary, or logits that are not finite.
        """
        run = self._run(requests, progress, name)
        return [Scored(math.fsum(each), best, len(each)) for each, best in zip(run.logprobs, run.greedy, strict=True)]

    def token_logprobs(self, ids: Sequence[int]) -> list[float]:
        """The log-probability of each token of a text of any length; the first is predicted from eos. See `windows`."""
        return self.rolling([ids])[0]

    def rolling(self, texts: Sequence[Sequence[int]], *, progress: Progress | None = None) -> list[list[float]]:
        """`token_logprobs` of several texts."""
        limit = self.config.context_length
        parts = [windows(ids, first=self.eos_id, context_length=limit) for ids in texts]
        run = self._run([pair for pairs in parts for pair in pairs], progress, "windows")
        logprobs = iter(run.logprobs)
        return [[value for _ in pairs for value in next(logprobs)] for pairs in parts]

    @torch.inference_mode()
    def _run(self, requests: Sequence[Request], progress: Progress | None, name: str) -> _Run:
        inputs = [self._input(f"{name}[{index}]", *request) for index, request in enumerate(requests)]
        run = _Run(self, inputs, [list(continuation) for _, continuation in requests], progress, name)
        found = [Group([ids], 0) for ids in run.asking] if self.live is not None else groups(run.asking)
        run.alone([group.members[0] for group in found if len(group.members) == 1])
        run.shared([group for group in found if len(group.members) > 1])
        return run

    def _input(self, name: str, context: Sequence[int], continuation: Sequence[int]) -> Ids:
        """What the model reads of a request: all but the last token, as much as the context holds."""
        config = self.config
        if not len(continuation):
            raise UserError(f"{name}: an empty continuation has no score; leave it out")
        if len(continuation) > config.context_length:
            raise UserError(
                f"{name}: a continuation of {len(continuation)} tokens is longer than the context of "
                f"{config.context_length}; shorten it"
            )
        ids = (*(context if len(context) else (self.eos_id,)), *continuation)
        if min(ids) < 0 or max(ids) >= config.vocab_size:
            raise UserError(f"{name}: holds ids outside the vocabulary of {config.vocab_size}")
        return ids[-(config.context_length + 1) : -1]


class _Asked(NamedTuple):
    """A token whose log-probability is asked for, and the place in a pass whose logits tell it."""

    row: int
    position: int
    request: int
    token: int  # of the continuation


class _Run:
    """The passes for the requests of one call, and what was found: `logprobs` of each token of each continuation, and whether
    all of them are the `greedy` ones."""

    def __init__(
        self, scorer: Scorer, inputs: Sequence[Ids], targets: list[list[int]], progress: Progress | None, name: str
    ) -> None:
        self.decoder, self.g_lm, self.memory, self.live = scorer.decoder, scorer.g_lm, scorer.memory, scorer.live
        self.targets, self.progress, self.name = targets, progress, name
        self.asking: dict[Ids, list[int]] = {}  # input -> its requests: the same input is read once
        for request, ids in enumerate(inputs):
            self.asking.setdefault(ids, []).append(request)
        self.logprobs = [[math.nan] * len(each) for each in targets]
        self.greedy = [True] * len(targets)
        self.pass_tokens = PASS_TOKENS["cuda" if self.decoder.device.type == "cuda" else "cpu"]
        config, itemsize = scorer.config, self.decoder.dtype.itemsize
        self.cache_bytes = 2 * config.num_layers * config.d_model * itemsize  # a token's keys and values
        self.pass_bytes = (
            5 * config.d_model + 3 * config.feed_forward_size
        ) * itemsize  # inputs and outputs of products
        self.logit_rows = max(1, self.memory // 4 // (2 * config.vocab_size * itemsize))

    def alone(self, inputs: Iterable[Ids]) -> None:
        """Sequences that share nothing: no cache."""
        size, room = (lambda longest: longest * self.pass_bytes), self.memory // 2
        equal = self.live is not None
        for batch in batches(inputs, length=len, size=size, room=room, pass_tokens=self.pass_tokens, equal=equal):
            ids_BS = self._padded(batch)
            if self.live is not None:
                hidden_BSD = self.live.hidden(ids_BS, padded=False)
            else:
                hidden_BSD = self.decoder.hidden(ids_BS, g_lm=self.g_lm)
            self._read_off(hidden_BSD, [one for row, ids in enumerate(batch) for one in self._asked(row, ids)])
            self._finished(batch)

    def shared(self, found: Iterable[Group]) -> None:
        """Groups: a pass over their beginnings, whose keys and values all members continue, in at least one pass more."""
        size, room = (lambda longest: longest * (self.pass_bytes + self.cache_bytes)), self.memory // 4
        for batch in batches(
            found, length=lambda group: group.num_shared, size=size, room=room, pass_tokens=2 * self.pass_tokens
        ):
            prefixes = [group.prefix for group in batch]
            cache = self.decoder.new_cache(batch_size=len(batch), capacity=len(prefixes[0]), g_lm=self.g_lm)
            hidden_BSD = self.decoder.read(self._padded(prefixes), cache, lengths=[len(ids) for ids in prefixes])
            members = [(row, ids) for row, group in enumerate(batch) for ids in group.members]
            asked = [one for row, ids in members for one in self._asked(row, ids, end=cache.lengths[row])]
            self._read_off(hidden_BSD, asked)
            self._continue(cache, [(row, ids) for row, ids in members if len(ids) > cache.lengths[row]])
            self._finished([ids for _, ids in members])

    def _continue(self, cache: KVCache, members: list[tuple[int, Ids]]) -> None:
        """What sequences have beyond the beginning that a row of the cache holds."""
        held = max(cache.lengths)

        def size(longest: int) -> int:
            attended = held + longest
            return (
                longest * (self.pass_bytes + 8 * attended) + attended * self.cache_bytes
            )  # 8: the mask, also as numbers

        def rest(member: tuple[int, Ids]) -> int:
            return len(member[1]) - cache.lengths[member[0]]

        for batch in batches(members, length=rest, size=size, room=self.memory // 2, pass_tokens=self.pass_tokens):
            own = cache.fork([row for row, _ in batch], room=rest(batch[0]))
            starts = list(own.lengths)
            parts = [ids[start:] for start, (_, ids) in zip(starts, batch, strict=True)]
            hidden_BSD = self.decoder.read(self._padded(parts), own, lengths=[len(part) for part in parts])
            rows = enumerate(zip(starts, batch, strict=True))
            self._read_off(hidden_BSD, [one for row, (start, (_, ids)) in rows for one in self._asked(row, ids, start)])

    def _asked(self, row: int, ids: Ids, start: int = 0, end: int | None = None) -> list[_Asked]:
        """What is asked of an input's tokens from `start` to `end`, which are those of a row of a pass."""
        found = []
        for request in self.asking[ids]:
            first = len(ids) - len(self.targets[request])
            for position in range(max(first, start), len(ids) if end is None else end):
                found.append(_Asked(row, position - start, request, position - first))
        return found

    def _read_off(self, hidden_BSD: Tensor, asked: Sequence[_Asked]) -> None:
        """Log-probabilities from the logits of those places that something is asked of, each place once."""
        places: dict[tuple[int, int], list[_Asked]] = {}
        for one in asked:
            places.setdefault((one.row, one.position), []).append(one)
        keys = list(places)
        for begin in range(0, len(keys), self.logit_rows):
            chunk = keys[begin : begin + self.logit_rows]
            here = [(index, one) for index, place in enumerate(chunk) for one in places[place]]
            targets = [(index, self.targets[one.request][one.token]) for index, one in here]
            row_N, position_N = torch.tensor(chunk, device=hidden_BSD.device).T
            index_M, target_M = torch.tensor(targets, device=hidden_BSD.device).T
            logprob_M, greedy_M = _logprobs(self.decoder.logits(hidden_BSD[row_N, position_N]), index_M, target_M)
            for (_, one), logprob, greedy in zip(here, logprob_M.tolist(), greedy_M.tolist(), strict=True):
                if not math.isfinite(logprob):
                    raise UserError(f"{self.name}[{one.request}]: the model's logits are NaN or infinite; leave it out")
                self.logprobs[one.request][one.token] = logprob
                self.greedy[one.request] &= greedy

    def _padded(self, rows: Sequence[Ids]) -> Tensor:
        """[B,S], the last token again at the end: of one that is not finite (id 0 may be) the row would become NaN."""
        longest = max(map(len, rows))
        ids = [(*row, *row[-1:] * (longest - len(row))) for row in rows]
        return torch.tensor(ids, device=self.decoder.device)

    def _finished(self, inputs: Iterable[Ids]) -> None:
        if self.progress is not None:
            self.progress(sum(len(self.asking[ids]) for ids in inputs))


def _logprobs(logits_NV: Tensor, index_M: Tensor, target_M: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities in fp64 of target m in row index_M[m], and whether it is the row's best. Overwrites the logits."""
    logit_M = logits_NV[index_M, target_M].double()
    best_N1, choice_N1 = logits_NV.max(dim=-1, keepdim=True)
    sum_N = logits_NV.sub_(best_N1).exp_().sum(dim=-1)
    logsumexp_N = best_N1.squeeze(-1).double() + sum_N.double().log()
    return logit_M - logsumexp_N[index_M], choice_N1.squeeze(-1)[index_M] == target_M
