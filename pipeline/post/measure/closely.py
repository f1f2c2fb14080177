"""A closer look at a few prompts: how much the rotated queries' product with G_LM moves, and which rows the metric learner saw.

Background: a head's RMS is that of all directions, also of those in which no query points. A G_LM that is huge there would make
every movement look small. So the movement of q G_LM is measured too, relative to q G_LM over the tokens of a kind.

The rows are starts of the search for the worst rows (every_input/search.py). Everything is streamed.

Shapes: B prompts in a batch, S tokens, L layers, H heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.distributed import merged
from pipeline.post.every_input.rows import learned_layers, normalised
from pipeline.post.every_input.search import PromptRows
from pipeline.post.measure.deviation import worst_of
from pipeline.post.measure.passes import LivePass
from pipeline.post.measure.prompts import PromptKind
from pipeline.post.measure.statistics import QueryRatio, Top, deviation_of_each
from pldr_model.model import PLDRModel

KEPT_ROWS = 64  # of every layer: those whose row of A is farthest from the mean


class CloseLook:
    """Watches the live passes of a model that learns its G, as the first watcher, inside `with close_look.queries():`.

    references: the means of A and G_LM [L,H,K,K], from which they are seen to move.
    """

    def __init__(self, model: PLDRModel, references: Mapping[str, Tensor], kinds: Sequence[PromptKind]) -> None:
        self._plgas = learned_layers(model)
        self._g_LHKK, self._a_LK = references["G_LM"], references["A"].mean(dim=(1, 2))
        self._ratios = {kind.name: QueryRatio() for kind in kinds}
        self._rows = [Top(KEPT_ROWS) for _ in self._plgas]
        self._sets = RowSets()
        self._queries: dict[int, Tensor] = {}  # of the last pass, by layer: [B,H,S,K]

    @contextmanager
    def queries(self) -> Iterator[None]:
        """While this is open, the rotated queries of the last pass are known."""

        def keep(layer: int, _: nn.Module, inputs: tuple[Tensor]) -> None:
            self._queries[layer] = inputs[0]

        hooks = [plga.register_forward_pre_hook(partial(keep, layer)) for layer, plga in enumerate(self._plgas)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._queries.clear()

    def __call__(self, live: LivePass) -> None:
        """Add one batch."""
        moved, size, rows = [], [], []
        for layer, plga in enumerate(self._plgas):
            q_BHSK = self._queries[layer].double()
            reference_HKK = self._g_LHKK[layer].to(q_BHSK.device)
            moved.append(_squares(q_BHSK @ (live.tensors["G_LM"][:, layer].double() - reference_HKK)))
            size.append(_squares(q_BHSK @ reference_HKK))
            rows_BHKK = normalised(q_BHSK.mT @ q_BHSK, plga.density_norm)
            distance_BHK = (live.tensors["A"][:, layer].double() - self._a_LK[layer].to(q_BHSK.device)).norm(dim=-1)
            self._rows[layer].update(distance_BHK.flatten(), rows_BHKK.flatten(end_dim=2))
            rows.append(rows_BHKK)
        tokens = live.ids_BS.shape[1]
        self._ratios[live.kind.name].update(torch.stack(moved, dim=1), torch.stack(size, dim=1), tokens=tokens)
        self._sets.update(deviation_of_each(live.tensors["G_LM"], self._g_LHKK), torch.stack(rows, dim=1))

    def merge_ranks(self) -> None:
        """Add what the other ranks have seen. Collective."""
        self._ratios = {kind: merged(ratio) for kind, ratio in self._ratios.items()}
        self._rows = [merged(top) for top in self._rows]
        self._sets = merged(self._sets)

    def query_deviation(self) -> dict[str, Any]:
        """The certificate's `query_deviation`: RMS(q dG) of the worst prompt, over RMS(q G) over its kind, per head."""
        return worst_of({kind: ratio.per_head() for kind, ratio in self._ratios.items() if ratio.count})

    def prompt_rows(self) -> PromptRows:
        """The rows that moved A or G_LM most."""
        return PromptRows([top.beside for top in self._rows if top.beside is not None], self._sets.rows_LHKK)


class RowSets:
    """Streaming: for every head the rows of the prompt whose G_LM deviates most, [L,H,K,K]."""

    def __init__(self) -> None:
        self.deviation_LH = self.rows_LHKK = torch.zeros(0)

    def update(self, deviation_BLH: Tensor, rows_BLHKK: Tensor) -> None:
        """Add B more prompts."""
        other = RowSets()
        other.deviation_LH, prompt_LH = deviation_BLH.cpu().max(dim=0)
        layer_L1, head_1H = (torch.arange(n) for n in prompt_LH.shape)
        other.rows_LHKK = rows_BLHKK[prompt_LH.to(rows_BLHKK.device), layer_L1.unsqueeze(1), head_1H].cpu()
        self.merge(other)

    def merge(self, other: RowSets) -> None:
        """Add what another accumulator has seen."""
        if not len(self.deviation_LH) or not len(other.deviation_LH):
            self.__dict__.update((self if len(self.deviation_LH) else other).__dict__)
            return
        more_LH = other.deviation_LH > self.deviation_LH
        self.deviation_LH = torch.where(more_LH, other.deviation_LH, self.deviation_LH)
        self.rows_LHKK = torch.where(more_LH[..., None, None], other.rows_LHKK, self.rows_LHKK)


def _squares(x_BHSK: Tensor) -> Tensor:
    return x_BHSK.square().sum(dim=(-2, -1))
