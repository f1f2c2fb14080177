"""How fast training steps are on a GPU: what micro batch fills it, and forms of the model in turn, eager, compiled, captured.

`mfu` is `ModelConfig.flops_per_token` times tokens a second over the data sheet's dense bf16 rate; `of_ceiling` the same over
the rate of a large bf16 product measured in this run.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from pipeline.bench.gpu.training.forms import Form, forms_of
from pipeline.bench.gpu.training.ours import EngineStep, join
from pipeline.bench.gpu.training.setting import ROOM, TrainSetting
from pipeline.bench.gpu.training.steps import Plain, Step
from pipeline.bench.rounds import Work, in_rounds, speed_ratio, wait

Found = Iterator[dict[str, Any]]
Make = Callable[[], Step]

FILL_STEPS = 2


def fill(setting: TrainSetting) -> Found:
    """The micro batches that fit, by doubling, and of the first model also with all logits at once. Steps of plain PyTorch,
    eager."""
    for model, config in setting.models.items():
        yield from _double(setting, model, forms_of(config)["plga"])
    model, config = next(iter(setting.models.items()))
    yield from _double(setting, model, forms_of(config)["plga-logits"])


def _double(setting: TrainSetting, model: str, form: Form) -> Found:
    micro_batch, fits = setting.first, True
    while fits and micro_batch <= setting.most:
        _free(setting.device)
        row: dict[str, Any] = {"what": "fill", "model": model, "form": form.name, "micro_batch": micro_batch}
        try:
            row |= _tried(setting, form, micro_batch)
        except torch.OutOfMemoryError as error:
            row |= {"fits": False, "leaves_room": False, "error": str(error).splitlines()[0]}
        fits = row["fits"]
        yield row
        micro_batch *= 2
    _free(setting.device)


def _tried(setting: TrainSetting, form: Form, micro_batch: int) -> dict[str, Any]:
    memory = _Peak(setting.device)
    step = Plain(form, micro_batch, setting.device)
    step()
    seconds = []
    for _ in range(FILL_STEPS):
        started = time.perf_counter()
        step()
        wait(setting.device)
        seconds.append(time.perf_counter() - started)
    peak = memory.read()
    tokens = micro_batch * form.config.context_length / statistics.median(seconds)
    leaves_room = peak is None or peak <= ROOM * _card(setting.device)
    return {"fits": True, "leaves_room": leaves_room, "peak_mb": _mb(peak), "tokens_per_second": tokens}


def eager(setting: TrainSetting) -> Found:
    """Every form with the engine and in plain PyTorch, at the micro batch that was fastest."""
    yield from _forms(setting, next(iter(setting.models)), compiled=False)


def compiled(setting: TrainSetting) -> Found:
    """The same with compiled layers. Model and twin are timed before the other forms are compiled."""
    yield from _forms(setting, next(iter(setting.models)), compiled=True)


def large(setting: TrainSetting) -> Found:
    """The larger model beside its twin, eager, then compiled."""
    name = list(setting.models)[1]
    for is_compiled in (False, True):
        yield from _forms(setting, name, compiled=is_compiled, groups=(("ours plga", "ours twin"),))


GROUPS = (
    ("ours plga", "ours twin", "plain plga", "plain twin"),
    ("plain plga", "plain plga-logits", "plain plga-modules", "plain plga-triton"),
    ("ours plga", "ours plga-shared", "ours twin"),
)


def _forms(setting: TrainSetting, model: str, *, compiled: bool, groups: tuple[tuple[str, ...], ...] = GROUPS) -> Found:
    join(setting.device)
    micro_batch, every = setting.micro_batch(model), forms_of(setting.models[model])
    for group in groups:
        forms = {label: every[label.split()[1]] for label in group}
        make = {label: partial(_make, setting, label, form, micro_batch, compiled) for label, form in forms.items()}
        yield from in_turn(setting, model, "compiled" if compiled else "eager", micro_batch, forms, make)


def _make(setting: TrainSetting, label: str, form: Form, micro_batch: int, compiled: bool) -> Step:
    if label.startswith("ours"):
        return EngineStep(form, micro_batch, setting.device, setting.work / "steps", compiled=compiled)
    return Plain(form, micro_batch, setting.device, compiled=compiled)


def graphs(setting: TrainSetting) -> Found:
    """A whole step as one CUDA graph against the same step from Python: at the recipe's micro batch, where a GPU waits for
    Python most, and at the one that fills it; eager kernels, then compiled ones."""
    model = next(iter(setting.models))
    every = forms_of(setting.models[model])
    for micro_batch in dict.fromkeys((setting.small, setting.micro_batch(model))):
        for is_compiled in (False, True):
            forms = {f"{way} {name}": every[name] for name in ("plga", "twin") for way in ("plain", "graph")}
            make: dict[str, Make] = {
                label: partial(
                    Plain, form, micro_batch, setting.device, compiled=is_compiled, graph=label.startswith("graph")
                )
                for label, form in forms.items()
            }
            mode = "compiled, captured" if is_compiled else "captured"
            yield from in_turn(setting, model, mode, micro_batch, forms, make)


def in_turn(
    setting: TrainSetting, model: str, mode: str, micro_batch: int, forms: dict[str, Form], make: Mapping[str, Make]
) -> Found:
    """Make every step, and time them in turn; ratios are to the first. One that cannot run is an answer, too."""
    steps: dict[str, Step] = {}
    losses: dict[str, float] = {}
    peaks: dict[str, float | None] = {}
    base = {"what": "train", "model": model, "mode": mode, "micro_batch": micro_batch}
    for label, build in make.items():
        _free(setting.device)
        memory, started = _Peak(setting.device), time.perf_counter()
        try:
            step = build()
            losses[label] = step()
            step()
        except Exception as error:  # of a kernel's compiler, too
            yield base | {"form": label, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
            continue
        steps[label], peaks[label] = step, memory.read()
        yield {**base, "what": "start", "form": label, "seconds": time.perf_counter() - started}
    works: dict[str, Work] = {label: partial(_repeat, step, setting.steps) for label, step in steps.items()}
    times = in_rounds(works, setting.rounds, setting.device)
    first = next(iter(steps), "")
    for label in steps:
        form, seconds = forms[label], times[label].seconds
        tokens = micro_batch * form.config.context_length * setting.steps / statistics.median(seconds)
        yield base | {
            "form": label,
            "loss": losses[label],
            "step_ms": 1e3 * statistics.median(seconds) / setting.steps,
            "tokens_per_second": tokens,
            **_shares(setting, tokens * form.flops_per_token(micro_batch)),
            "peak_mb": _mb(peaks[label]),
            "ratios": {other: speed_ratio(seconds, times[other].seconds) for other in steps if other != label},
            "first": first,
        }
    for step in steps.values():
        if isinstance(step, EngineStep):
            step.close()
    steps.clear()
    works.clear()
    _free(setting.device)


def _repeat(step: Step, times: int) -> None:
    for _ in range(times):
        step()


def _shares(setting: TrainSetting, flops_per_second: float) -> dict[str, float | None]:
    from pipeline.train.telemetry import peak_flops

    peak, rate = peak_flops() if setting.device.type == "cuda" else None, setting.matrix_rate()
    return {
        "tflops": flops_per_second / 1e12,
        "mfu": None if peak is None else flops_per_second / peak,
        "of_ceiling": None if rate is None else flops_per_second / rate,
    }


class _Peak:
    """Bytes that were allocated at most since then, above what was there; None on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)

    def read(self) -> int | None:
        if self._device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self._device) - self._before


def _mb(nbytes: float | None) -> float | None:
    return None if nbytes is None else nbytes / 2**20


def _card(device: torch.device) -> float:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
