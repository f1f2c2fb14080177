"""What a run on a GPU measures, part by part. A part yields its results one by one, so a late failure loses no early one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from pipeline.bench.gpu.correct import correct
from pipeline.bench.gpu.others import reference_loop, transformers_export
from pipeline.bench.gpu.setting import Setting
from pipeline.bench.gpu.speed import captured, compiled, eager, floor, generation, long_caches, products
from pipeline.bench.gpu.training import checks, corpus, speed, trainer
from pipeline.bench.gpu.training.floor import floor as train_floor
from pipeline.bench.gpu.training.setting import TrainSetting
from pipeline.bench.rounds import machine

What = Literal["decode", "train", "all"]


class Part(NamedTuple):
    """`run` measures; `seconds` is its limit, the start of its process included. Of training: `trains`."""

    run: Callable[[Any], Iterator[dict[str, Any]]]
    seconds: float
    trains: bool = False


PARTS = {
    "train-floor": Part(train_floor, 25, trains=True),
    "fill": Part(speed.fill, 40, trains=True),
    "train-eager": Part(speed.eager, 40, trains=True),
    "train-compiled": Part(speed.compiled, 120, trains=True),
    "tokens": Part(corpus.tokens, 25, trains=True),
    "trainer": Part(trainer.trainer, 40, trains=True),
    "resume": Part(trainer.resume, 35, trains=True),
    "tests": Part(checks.tests, 70, trains=True),
    "train-graphs": Part(speed.graphs, 30, trains=True),
    "train-large": Part(speed.large, 35, trains=True),
    "floor": Part(floor, 40),
    "correct": Part(correct, 70),
    "eager": Part(eager, 50),
    "captured": Part(captured, 60),
    "long": Part(long_caches, 50),
    "compiled": Part(compiled, 110),
    "products": Part(products, 60),
    "generation": Part(generation, 50),
    "transformers": Part(transformers_export, 60),
    "reference": Part(reference_loop, 50),
}
# Both in the time of one: what is wanted of training, and steps of decoding.
SHORT = ("train-floor", "fill", "train-eager", "train-compiled", "trainer", "resume", "correct", "captured")


def parts_of(what: What) -> list[str]:
    """The names of the parts of `decode`, of `train`, or the most important ones of both."""
    if what == "all":
        return list(SHORT)
    return [name for name, part in PARTS.items() if part.trains == (what == "train")]


def run_part(name: str, file: Path, *, device: str, tiny: bool, reference: Path | None) -> None:
    """Write each result of a part as a line of JSON, as soon as it is there."""
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    part, setting = PARTS[name], Setting.of(device=device, tiny=tiny, reference=reference)
    given = TrainSetting.of(device=device, tiny=tiny, folder=file.parent) if part.trains else setting
    with file.open("w") as lines, nullcontext() if part.trains else torch.inference_mode():
        for found in chain([{"what": "machine", **machine(setting.device)}], part.run(given)):
            lines.write(json.dumps(found) + "\n")
            lines.flush()
