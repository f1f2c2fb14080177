"""How a token is chosen inside transformers' continuous batching: as `Bundle.generate` chooses it.

Their engine draws all sequences of a batch from one generator, so that a sequence's tokens depend on its neighbors. This is one
of their per-request logits processors: it chooses the tokens of all rows (`pldr_model.next_token`) and leaves the engine
scores with one finite number, whose argmax is that token. It sees the logits first, so log-probabilities come from here, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from pipeline.inference.serve.engine import DecodeRequest, Token
from pldr_model.next_token import RowSettings, choose
from pldr_model.sampling import Sampling

GREEDY = Sampling(1)


class Draw:
    """A sequence that the engine decodes, and its tokens so far. Written by the engine's thread, read by the server's."""

    def __init__(self, request: DecodeRequest) -> None:
        self.request = request
        self.tokens: list[Token] = []
        self.failed = False  # its logits were NaN or infinite; it gets no more tokens
        self.sampling = request.sampling()

    def again(self) -> Draw:
        """To go on where this one failed. Another object: a pass that has begun may still hold this one."""
        draw = Draw(self.request)
        draw.tokens = list(self.tokens)
        return draw


class Choose(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]  # transformers has no types
    """Knows each sequence by its request id (`draws`). One batch is prepared, then run: the rows of `__call__` are those of
    the last `prepare_tensor_args`."""

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012
    ignored_kwargs = ()

    def __init__(self) -> None:
        self.draws: dict[str, Draw] = {}
        self._rows: list[Draw | None] = []  # None: cancelled meanwhile

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Nothing is kept in their tensors."""

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """The sequences of the next batch."""
        self._rows = [self.draws.get(one.state.request_id) for one in requests_with_new_token]
        return torch.zeros(len(self._rows), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """scores: logits [B,V], fp32. Returns [B,V] whose argmax are the chosen tokens.

        A batch with pieces of prompts has more rows than sequences with a new token (it may have none): their rows come first,
        and the others are read by nobody.
        """
        chosen = torch.full_like(scores, -torch.inf)
        if self._rows:
            chosen[: len(self._rows)].scatter_(-1, self._choose(scores[: len(self._rows)]).unsqueeze(-1), 0.0)
        return chosen

    def _choose(self, scores: Tensor) -> Tensor:
        """The tokens of `_rows`, which get them."""
        device, draws = scores.device, self._rows
        settings = RowSettings.of(
            [GREEDY if draw is None else draw.sampling for draw in draws], vocab_size=scores.shape[-1], device=device
        )
        chosen_B = choose(
            scores,
            settings,
            seed_B=torch.tensor([0 if draw is None else draw.request.seed for draw in draws], device=device),
            number_B=torch.tensor([0 if draw is None else len(draw.tokens) for draw in draws], device=device),
            seen_BV=self._seen(scores) if settings.penalizes else None,
        )
        finite_B = scores.isfinite().all(dim=-1).tolist()
        tokens = self._tokens(scores, chosen_B.tolist())
        for draw, finite, token in zip(draws, finite_B, tokens, strict=True):
            if draw is not None:
                draw.failed |= not finite
                if not draw.failed:
                    draw.tokens.append(token)
        return chosen_B

    def _seen(self, scores: Tensor) -> Tensor:
        """The tokens of each prompt and the new ones, where a repetition penalty asks for them."""
        seen_BV = torch.zeros_like(scores, dtype=torch.bool)
        for seen_V, draw in zip(seen_BV, self._rows, strict=True):
            if draw is not None and draw.request.repetition_penalty != 1:
                seen_V[draw.request.ids + [token.id for token in draw.tokens]] = True
        return seen_BV

    def _tokens(self, scores: Tensor, chosen: list[int]) -> list[Token]:
        """The chosen tokens, with log-probabilities where they were asked for."""
        tokens = [Token(id) for id in chosen]
        wanted = [
            index for index, draw in enumerate(self._rows) if draw is not None and draw.request.num_top is not None
        ]
        if wanted:
            tops = [
                draw.request.num_top or 0
                for draw in self._rows
                if draw is not None and draw.request.num_top is not None
            ]
            named = name_tokens(scores[wanted], [chosen[index] for index in wanted], max(tops))
            for index, num_top, token in zip(wanted, tops, named, strict=True):
                tokens[index] = Token(token.id, token.logprob, token.top[:num_top])
        return tokens


def name_tokens(logits_BV: Tensor, ids: list[int], num_top: int) -> list[Token]:
    """Tokens with their log-probabilities, and the best `num_top` of each row."""
    logprobs_BV = logits_BV.float().log_softmax(dim=-1)
    own_B = logprobs_BV.gather(-1, torch.tensor(ids, device=logits_BV.device).unsqueeze(-1)).squeeze(-1)
    best = logprobs_BV.topk(min(num_top, logprobs_BV.shape[-1]), dim=-1)
    return [
        Token(id, own, tuple(zip(best_ids, values, strict=True)))
        for id, own, best_ids, values in zip(
            ids, own_B.tolist(), best.indices.tolist(), best.values.tolist(), strict=True
        )
    ]
