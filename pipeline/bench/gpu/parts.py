"""What a run on a GPU measures, part by part. A part yields its results one by one, so a late failure loses no early one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.bench.gpu.correct import correct
from pipeline.bench.gpu.others import reference_loop, transformers_export
from pipeline.bench.gpu.setting import Setting
from pipeline.bench.gpu.speed import captured, compiled, eager, floor, generation, long_caches, products
from pipeline.bench.rounds import machine


class Part(NamedTuple):
    """`run` measures; `seconds` is its limit, the start of its process included."""

    run: Callable[[Setting], Iterator[dict[str, Any]]]
    seconds: float


PARTS = {
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


def run_part(name: str, setting: Setting, file: Path) -> None:
    """Write each result of a part as a line of JSON, as soon as it is there."""
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    with file.open("w") as lines, torch.inference_mode():
        for found in chain([{"what": "machine", **machine(setting.device)}], PARTS[name].run(setting)):
            lines.write(json.dumps(found) + "\n")
            lines.flush()
