"""A closer look at a few prompts: how much the rotated queries' product with G_LM moves, and which rows the metric learner saw.

Background: a head's RMS is that of all directions, also of those in which no query points. A G_LM that is huge there would make
every movement look small. So the movement of q G_LM is measured too, relative to q G_LM over the tokens of a kind.

The rows are starts of the search for the worst rows (pipeline/post/every_input/search.py). Everything is streamed.

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
from pipeline.post.every_input.rows import learned_layers, normalized
from pipeline.post.every_input.search import Found, Seen
from pipeline.post.measure.deviation import worst_of
from pipeline.post.measure.passes import LivePass
from pipeline.post.measure.prompts import PromptKind
from pipeline.post.measure.worst import Moment, QueryRatio, RowSets, Top, deviation_of_each
from pldr_model.model import PLDRModel

SEARCHED = "worst_rows"  # beside the kinds of prompts
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
        self._sets, self._density = RowSets(), Moment()
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
        moved, size, rows, densities = [], [], [], []
        for layer, plga in enumerate(self._plgas):
            q_BHSK = self._queries[layer].double()
            reference_HKK = self._g_LHKK[layer].to(q_BHSK.device)
            moved.append(_squares(q_BHSK @ (live.tensors["G_LM"][:, layer].double() - reference_HKK)))
            size.append(_squares(q_BHSK @ reference_HKK))
            density_BHKK = q_BHSK.mT @ q_BHSK
            densities.append(density_BHKK.sum(dim=0))
            rows_BHKK = normalized(density_BHKK, plga.density_norm)
            distance_BHK = (live.tensors["A"][:, layer].double() - self._a_LK[layer].to(q_BHSK.device)).norm(dim=-1)
            self._rows[layer].update(distance_BHK.flatten(), rows_BHKK.flatten(end_dim=2))
            rows.append(rows_BHKK)
        tokens = live.ids_BS.shape[1]
        self._ratios[live.kind.name].update(torch.stack(moved, dim=1), torch.stack(size, dim=1), tokens=tokens)
        self._density.update(torch.stack(densities), count=live.ids_BS.numel())
        self._sets.update(deviation_of_each(live.tensors["G_LM"], self._g_LHKK), torch.stack(rows, dim=1))

    def merge_ranks(self) -> None:
        """Add what the other ranks have seen. Collective."""
        self._ratios = {kind: merged(ratio) for kind, ratio in self._ratios.items()}
        self._rows = [merged(top) for top in self._rows]
        self._sets, self._density = merged(self._sets), merged(self._density)

    def seen(self) -> Seen:
        """The rows that moved A or G_LM most, and the queries' second moments."""
        rows = [top.beside for top in self._rows if top.beside is not None]
        return Seen(rows, self._sets.rows_LHKK, self._density.mean())

    def query_deviation(self, searched: Found) -> dict[str, Any]:
        """The certificate's `query_deviation`, per head: RMS(q dG) of the worst prompt, over RMS(q G) over its kind.
        A kind of its own, SEARCHED, are the worst rows that the search found, with these prompts' queries."""
        by_kind = {kind: ratio.per_head() for kind, ratio in self._ratios.items() if ratio.count}
        return worst_of({**by_kind, SEARCHED: searched.query_LH})


def _squares(x_BHSK: Tensor) -> Tensor:
    return x_BHSK.square().sum(dim=(-2, -1))
