"""What `pldr bench decode` times: decoders of one model in several forms, and blocks of their steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from pipeline.bundle.formats import SCALE, pack
from pipeline.config.post import WeightFormat
from pldr_model.config import ModelConfig
from pldr_model.decode.cache import KVCache, LayerShape
from pldr_model.decode.decoder import Decoder, Weights
from pldr_model.decode.linear import Matrix
from pldr_model.model import PLDRModel, g_shape

TWIN, FULL, LIVE, LOW_RANK = "sdpa", "bundle", "live", "low_rank"
FORMATS: tuple[WeightFormat, ...] = ("bf16", "int8")
FIRST_ID = 4  # past the special ids

Block = Callable[[int], None]


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

    def block(self, batch_size: int, length: int, room: int, caches: Caches) -> Block:
        """A function that runs so many steps, at most `room`, of rows with `length` cached tokens."""
        cache = caches.filled(self.decoder, batch_size, length, room)
        vocab_size = self.decoder.config.vocab_size
        first_B = torch.randint(min(FIRST_ID, vocab_size - 1), vocab_size, (batch_size,), device=self.decoder.device)

        def run(steps: int) -> None:
            cache.rollback([length] * batch_size)
            ids_B = first_B
            for _ in range(steps):
                ids_B = self.decoder.step(ids_B, cache).argmax(-1)

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


def make_contenders(config: ModelConfig, key_rank: int, context_length: int) -> dict[str, Contender]:
    """By name: `sdpa` and `bundle` in fp32, `live` if G is learned, `low_rank`, and the packed formats."""
    twin, constant = (replace(c, context_length=context_length) for c in (config.sdpa_twin(), config.with_constant_g()))
    weights = PLDRModel(twin).requires_grad_(False).state_dict()
    g_lm = torch.randn(g_shape(config))
    found = {TWIN: Contender.of(twin, weights), FULL: Contender.of(constant, weights, g_lm)}
    if config.g_source == "learned":
        found[LIVE] = replace(found[TWIN], decoder=Decoder(twin, weights, deduce=_no_prompt))
    for name in FORMATS:
        found[name] = Contender.of(constant, packed(weights, name), g_lm)
    return found


def packed(weights: Mapping[str, torch.Tensor], weight_format: WeightFormat) -> dict[str, Matrix | torch.Tensor]:
    """A state dict with its matrices in a format that a bundle is stored in."""
    stored = pack(weights, weight_format)
    found: dict[str, Matrix | torch.Tensor] = {}
    for name, tensor in stored.items():
        bias = stored.get(f"{name.removesuffix('weight')}bias")
        if tensor.dtype == torch.int8:
            found[name] = Matrix.int8(tensor, stored[name + SCALE], bias)
        elif tensor.dtype == torch.bfloat16:
            found[name] = Matrix.bf16(tensor, bias)
        elif not name.endswith(SCALE):
            found[name] = tensor
    return found


def _no_prompt(ids_1S: torch.Tensor) -> torch.Tensor:
    raise AssertionError("no prompt is read")
