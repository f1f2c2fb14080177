"""How fast steps are on a GPU: floor, eager, captured, compiled, with long caches, and single products.

`share` of a row is the bytes that its step reads (weights, G, keys and values) over its time, over the bandwidth of a copy. A
step launches a hundred kernels: eager ones measure the host, captured ones the device.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from pipeline.bench.blocks import Caches, Contender
from pipeline.bench.gpu.setting import Setting, make_forms
from pipeline.bench.gpu.stepper import Mode, stepper
from pipeline.bench.rounds import Memory, Work, in_rounds, speed_ratio
from pldr_model.decode.linear import Matrix
from pldr_model.generation import generate

Found = Iterator[dict[str, Any]]

FORMS = ("fp32", "bf16", "int8")
ATEN_COLUMNS = 16  # `_weight_int8pack_mm` reads out of bounds where in_features is no multiple of it (seen on a CPU)


def floor(setting: Setting) -> Found:
    """What no step can be faster than: its bytes over the copy bandwidth."""
    copy = Memory(setting.buffer_bytes, setting.device).copy_bandwidth()
    yield {"what": "bandwidth", "copy_gb_per_second": copy / 1e9, "buffer_mb": setting.buffer_bytes / 2**20}
    for form, each in make_forms(setting, (*FORMS, "bf16_low_rank")).items():
        one = each.contender()
        for length in (setting.length, setting.long):
            for batch in setting.batches:
                nbytes = one.bytes_of_step(batch, length)
                yield {
                    "what": "floor",
                    "form": form,
                    "batch": batch,
                    "cached": length,
                    "bytes": nbytes,
                    "tokens_per_second": batch * copy / nbytes,
                }


def eager(setting: Setting) -> Found:
    """One kernel after the other, as Python asks for them."""
    yield from _steps(setting, (*FORMS, "bf16_sdpa"), "eager")


def captured(setting: Setting) -> Found:
    """A step as one CUDA graph."""
    yield from _steps(setting, (*FORMS, "bf16_sdpa"), "captured")


def compiled(setting: Setting) -> Found:
    """A step through torch.compile, captured: products of packed weights are fused with their unpacking. Compiling takes longer
    than the rest of the run, so there are few: int8 at the smaller batches, then bf16 alone."""
    yield from _steps(setting, ("int8",), "compiled", batches=setting.batches[:2])
    yield from _steps(setting, ("bf16",), "compiled", batches=setting.batches[:1])


def _steps(setting: Setting, names: tuple[str, ...], mode: Mode, *, batches: tuple[int, ...] | None = None) -> Found:
    """All forms at every batch, in turn, against the first of them."""
    contenders = {form: each.contender() for form, each in make_forms(setting, names).items()}
    for batch in batches or setting.batches:
        yield from _in_turn(setting, contenders, batch, setting.length, mode)


def long_caches(setting: Setting) -> Found:
    """Low-rank keys against full ones, in bf16, with long caches."""
    contenders = {form: each.contender() for form, each in make_forms(setting, ("bf16", "bf16_low_rank")).items()}
    for batch in setting.batches[:2]:
        yield from _in_turn(setting, contenders, batch, setting.long, "captured")


def _in_turn(setting: Setting, contenders: dict[str, Contender], batch: int, length: int, mode: Mode) -> Found:
    memory, caches = Memory(setting.buffer_bytes, setting.device), Caches()
    blocks = {
        form: one.block(batch, length, setting.steps, caches, stepper(one.decoder, mode))
        for form, one in contenders.items()
    }
    for block in blocks.values():
        block(setting.steps)  # captures
    works: dict[str, Work] = {form: partial(block, setting.steps) for form, block in blocks.items()}
    times = in_rounds({"copy": memory.copy, **works}, setting.rounds, setting.device)
    first = next(iter(blocks))
    for form, one in contenders.items():
        seconds, moved = times[form].seconds, setting.steps * one.bytes_of_step(batch, length) / (2 * memory.nbytes)
        yield {
            "what": "steps",
            "mode": mode,
            "form": form,
            "batch": batch,
            "cached": length,
            "step_ms": 1e3 * statistics.median(seconds) / setting.steps,
            "tokens_per_second": batch * setting.steps / statistics.median(seconds),
            "share": moved * speed_ratio(seconds, times["copy"].seconds),
            f"ratio_to_{first}": speed_ratio(seconds, times[first].seconds),
        }


def products(setting: Setting) -> Found:
    """The model's matrices alone, by way of multiplying int8: which of them reads bytes as fast as bf16 does."""
    config, device = setting.config, setting.device
    width, hidden = config.d_model, config.feed_forward_size
    shapes = {
        "qkv": (3 * width, width),
        "w12": (2 * hidden, width),
        "w3": (width, hidden),
        "output": (config.vocab_size, width),
    }
    for name, (out, into) in shapes.items():
        weight = torch.randn(out, into, device=device)
        scale_O = weight.abs().amax(dim=1) / 127
        values_OI = (weight / scale_O[:, None]).round().to(torch.int8)
        matrix = Matrix.int8(values_OI, scale_O, dtype=torch.bfloat16)
        for batch in setting.batches:
            x = torch.randn(batch, into, device=device, dtype=torch.bfloat16)
            ways: dict[str, tuple[int, Callable[[], torch.Tensor]]] = {
                "fp32": (4, partial(F.linear, x.float(), weight)),
                "bf16": (2, partial(F.linear, x, weight.bfloat16())),
                "int8 unpacked": (1, partial(matrix, x)),
            }
            if into % ATEN_COLUMNS == 0:
                aten = partial(torch._weight_int8pack_mm, x, values_OI, scale_O.bfloat16())
                ways["int8 aten"] = (1, aten)
            for way, (nbytes, work) in ways.items():
                yield {"what": "product", "matrix": name, "batch": batch, "way": way} | _product(
                    setting, work, out * into * nbytes
                )


def _product(setting: Setting, work: Callable[[], torch.Tensor], nbytes: int) -> dict[str, Any]:
    """Microseconds, and bytes a second. A kernel that this device lacks is an answer, too."""

    def run() -> None:
        for _ in range(setting.steps):
            work()

    try:
        run()
    except (RuntimeError, NotImplementedError) as error:
        return {"error": str(error).splitlines()[0]}
    seconds = statistics.median(in_rounds({"run": run}, setting.rounds, setting.device)["run"].seconds) / setting.steps
    return {"microseconds": 1e6 * seconds, "gb_per_second": nbytes / seconds / 1e9}


def generation(setting: Setting) -> Found:
    """`generate` as users call it, prompts and choice of tokens included, greedy and sampled."""
    decoder = make_forms(setting, ("bf16",))["bf16"].contender().decoder
    new = 2 * setting.steps
    for batch in setting.batches:
        prompts = torch.randint(4, setting.config.vocab_size, (batch, setting.length)).tolist()
        settings: list[dict[str, Any]] = [{}, {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 0}]
        if setting.device.type == "cuda":
            settings += [{**how, "capture": True} for how in settings]
        for how in settings:
            run = partial(generate, decoder, prompts, max_new_tokens=new, **how)
            run()
            times = in_rounds({"run": run}, setting.rounds, setting.device)["run"].seconds
            yield {
                "what": "generate",
                "form": "bf16",
                "batch": batch,
                "prompt": setting.length,
                "new": new,
                "sampled": "temperature" in how,
                "captured": "capture" in how,
                "tokens_per_second": batch * new / statistics.median(times),
            }
