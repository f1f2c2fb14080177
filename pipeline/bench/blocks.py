"""Blocks of decoding steps on caches of random tokens, and the bytes that a step reads. Needs torch only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pldr_model.config import ModelConfig
from pldr_model.decode.cache import KVCache, LayerShape
from pldr_model.decode.decoder import Decoder, Weights

FIRST_ID = 4  # past the special ids

Block = Callable[[int], None]
Step = Callable[[torch.Tensor, KVCache], torch.Tensor]


@dataclass(frozen=True)
class Contender:
    """A decoder; `weight_bytes` are those of all its weights, `embedding_bytes` those of the embedding, of which a step reads a
    few rows."""

    decoder: Decoder
    weight_bytes: int
    embedding_bytes: int

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        weights: Weights,
        g_lm: torch.Tensor | None = None,
        key_ranks: torch.Tensor | None = None,
    ) -> Contender:
        """A model of a constant G; without `g_lm` of the identity."""
        total = sum(weight.nbytes for weight in weights.values()) + (0 if g_lm is None else g_lm.nbytes)
        return cls(Decoder(config, weights, g_lm, key_ranks), total, weights["embedding.weight"].nbytes)

    def block(self, batch_size: int, length: int, room: int, caches: Caches, step: Step | None = None) -> Block:
        """A function that runs so many steps, at most `room`, of rows with `length` cached tokens. step: in place of the
        decoder's own."""
        cache, take = caches.filled(self.decoder, batch_size, length, room), step or self.decoder.step
        vocab_size = self.decoder.config.vocab_size
        first_B = torch.randint(min(FIRST_ID, vocab_size - 1), vocab_size, (batch_size,), device=self.decoder.device)

        def run(steps: int) -> None:
            cache.rollback([length] * batch_size)
            ids_B = first_B
            for _ in range(steps):
                ids_B = take(ids_B, cache).argmax(-1)

        return run

    def bytes_of_step(self, batch_size: int, length: int) -> int:
        """Bytes that a step cannot do without: weights, G, the rows' embeddings, keys and values."""
        cache = self.decoder.new_cache(batch_size=1, capacity=1)
        own_g = sum(g.nbytes for g in cache.g) if cache.g is not None else 0
        rows = batch_size * (self.embedding_bytes // self.decoder.config.vocab_size + length * cache.nbytes + own_g)
        return self.weight_bytes - self.embedding_bytes + rows


class Caches:
    """The caches of one batch, length and room. Decoders that keep the same of a token take turns with one."""

    def __init__(self) -> None:
        self._made: dict[tuple[tuple[LayerShape, ...], torch.dtype], KVCache] = {}

    def filled(self, decoder: Decoder, batch_size: int, length: int, room: int) -> KVCache:
        """With `length` random tokens in each row, and room for more. Rows of a live model get a random G."""
        cache = decoder.new_cache(batch_size=batch_size, capacity=length + room)
        kind = (tuple(cache.shapes), cache.dtype)
        if cache.g is None and kind in self._made:
            return self._made[kind]
        for tensor in (store for layer in cache.layers for store in layer.stores):
            tensor[:, :, :length].normal_()
        for g in cache.g or ():
            g.normal_()
        cache.grow(length)
        cache.length_B.add_(length)
        if cache.g is None:
            self._made[kind] = cache
        return cache
