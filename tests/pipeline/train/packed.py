"""Packed sequences with several documents and sources, for mean_worker.py and test_mean.py; and their losses in plain PyTorch,
from each document alone, without a mask."""

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from pipeline.train.by_source import Sources
from pipeline.train.evaluate import validate
from pipeline.train.freeze import mean_g
from tests.pipeline.train.zero_worker import Batches

NAMES = ("plays", "web-2", "unseen")


def packed_rows(seed, count, width=17):
    """Tokens and document numbers [2, count, width]: documents of 1 to 7 tokens, and up to half a row of padding."""
    rng = np.random.default_rng(seed)
    out = np.zeros((2, count, width), dtype=np.int64)
    for row in range(count):
        documents = np.repeat(np.arange(1, width + 1), rng.integers(1, 8, size=width))[
            : rng.integers(width // 2, width + 1)
        ]
        out[:, row, : len(documents)] = rng.integers(4, 67, size=len(documents)), documents
    return out


def sources_of(rows):
    """Each document's source: the first or the second, by turns."""
    return Sources(NAMES, np.where(rows[1] > 0, 1 + rows[1] % 2, 0))


class Packed(Batches):
    """Global batches of packed rows that follow from their position alone; a rank's micro batches are consecutive."""

    def micro_batches(self, position, *, limit):
        train, rank, world = self.config.train, dist.get_rank(), dist.get_world_size()
        for _ in range(limit):
            rows = packed_rows(position, train.global_batch)
            position += train.global_batch
            yield list(np.moveaxis(rows.reshape(2, world, -1, train.micro_batch, 17)[:, rank], 1, 0)), position


def alone(model, rows, row, **more):
    """Logits of a row's inputs, each document read by itself; padding at the end is left out."""
    ids, documents = torch.from_numpy(rows[0, row, :-1]), rows[1, row, :-1]
    lengths = np.bincount(documents)[1:].tolist()
    pieces = ids[: sum(lengths)].split(lengths)
    return torch.cat([model(piece.unsqueeze(0), padded=False, **more)[0] for piece in pieces])


def nll_alone(model, rows, first=0, **more):
    """(loss, row, place) of every target that is no padding; those that begin a document count too."""
    found = []
    for row in range(first, rows.shape[1]):
        targets = torch.from_numpy(rows[0, row, 1:])
        logits = alone(model, rows, row, **more)
        losses = F.cross_entropy(logits, targets[: len(logits)], reduction="none")
        found += [(losses[place], row, place + 1) for place in range(len(logits)) if targets[place]]
    return found


def results(trainer):
    """What a validation and a freeze make of packed sequences with document masks, and plain PyTorch. G is learned."""
    model, rows = trainer.engine.module, packed_rows(7, 8)
    config, sources = trainer.model, sources_of(rows)
    values = validate(trainer.engine, config, rows, batch_size=3, bytes_per_token=2.0, sources=sources)
    unmasked = validate(trainer.engine, config, rows[0], batch_size=3, bytes_per_token=2.0)
    ids, documents = torch.from_numpy(rows)
    with torch.no_grad():
        _, outputs = model(ids[:, :-1], documents=documents[:, :-1], padded=True, return_outputs=True)
        g_lm = torch.stack([layer.G_LM for layer in outputs])
        losses = nll_alone(model, rows, first=1, g_lm=g_lm[:, 0])
    plain = {}
    for number, name in enumerate(NAMES, 1):
        mine = [float(loss) for loss, row, place in losses if sources.numbers[row, place] == number]
        plain[name] = [sum(mine), len(mine)]
    (micro, _), *_ = Packed(trainer.config).micro_batches(3, limit=1)
    batch, documents = torch.from_numpy(packed_rows(3, trainer.config.train.global_batch))[..., :-1]
    _, outputs = model(batch, documents=documents, padded=True, return_outputs=True)
    right = torch.stack([layer.G_LM for layer in outputs]).detach().mean(dim=1)
    micros = {"masked": micro, "not": [part[0] for part in micro]}
    found = {which: mean_g(trainer.engine, config, [parts]) for which, parts in micros.items()}
    off = {which: float((mean - right).norm() / right.norm()) for which, mean in found.items()}
    return {"values": values, "unmasked": unmasked, "plain": plain, "mean_g": off}
