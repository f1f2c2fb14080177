"""Sizes of the training parts, and what a part reads of those that ran before it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.bench.gpu.setting import PAPER_110M, TINY
from pldr_model.config import ModelConfig

PAPER_350M = ModelConfig(vocab_size=32000, num_layers=13, num_heads=20, head_dim=64, context_length=1024)
RECIPE = Path(__file__).resolve().parents[4] / "configs" / "pldr-110m.yaml"
ROOM = 0.6  # of the card, for a micro batch that is timed: models that take turns lie there together


@dataclass(frozen=True)
class TrainSetting:
    """What is trained. models: by name, the first is the one that most parts measure; first, most: micro batches that are
    tried, by doubling; usual: where nothing was tried; small: that of configs/pldr-110m.yaml; steps: of a round; folder: where
    the parts' results are; work: for tokens and checkpoints; text_bytes: of the corpus; trained: steps of the trainer."""

    device: torch.device
    models: dict[str, ModelConfig]
    first: int
    most: int
    usual: int
    small: int
    steps: int
    rounds: int
    buffer_bytes: int
    matrix: int
    text_bytes: int
    pieces: int
    trained: int
    folder: Path
    work: Path

    @classmethod
    def of(cls, *, device: str, tiny: bool, folder: Path) -> TrainSetting:
        """The papers' 110M model and one of 350M, or a small one to try everything."""
        place, work = torch.device(device), folder / "work"
        if tiny:
            models = dict.fromkeys(("110m", "350m"), replace(TINY, vocab_size=512))
            return cls(place, models, 2, 4, 2, 2, 1, 2, 1 << 16, 64, 400_000, 420, 8, folder, work)
        models = {"110m": PAPER_110M, "350m": PAPER_350M}
        return cls(place, models, 8, 512, 16, 4, 2, 5, 1 << 30, 8192, 4_000_000, 4096, 60, folder, work)

    def found(self, part: str, what: str) -> list[dict[str, Any]]:
        """The results of that kind of an earlier part; none where it did not run."""
        file = self.folder / f"{part}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        return [row for row in rows if row["what"] == what]

    def micro_batch(self, model: str) -> int:
        """The micro batch at which the model trained fastest among those that leave room."""
        rows = [row for row in self.found("fill", "fill") if row["model"] == model and row["form"] == "plga"]
        tried = {row["micro_batch"]: row["tokens_per_second"] for row in rows if row["leaves_room"]}
        return int(max(tried, key=tried.__getitem__)) if tried else self.usual

    def matrix_rate(self) -> float | None:
        """FLOP/s that a large bf16 product reached here."""
        rows = self.found("train-floor", "ceilings")
        return rows[0]["bf16_tflops"] * 1e12 if rows else None
