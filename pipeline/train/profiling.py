"""Traces of single steps, and a report of what was in memory when a rank ran out of it.

`train.profile_steps: [first, last]` traces the CPU and the GPU on every rank: `logs/profile/steps-000010-000012/
rank-N.json.gz` opens in https://ui.perfetto.dev or chrome://tracing; `rank-N.txt` is a table of the most expensive operators.
Tracing makes these steps slower and changes no number of the training.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import psutil
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from pipeline.devices import has_gpu
from pipeline.errors import first_line

TABLE_ROWS = 60
SHOWN = 60  # kinds of tensors
HISTORY_EVENTS = 100_000
log = logging.getLogger(__name__)


class StepProfiler:
    """Traces the steps from `first` to `last`; nothing when `steps` is None or they are already over."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path, rank: int) -> None:
        self._first, self._last = steps or (0, -1)
        self._target = folder / f"steps-{self._first:06d}-{self._last:06d}"
        self._rank = rank
        self._profile: profile | None = None
        self._tracing = False
        self._span: record_function | None = None

    def begin(self, step: int) -> None:
        """A step begins. The step before the first traced one warms up the tracer."""
        self._end_span()
        if step > self._last:
            self.close()
            return
        if step >= self._first - 1 and self._profile is None:
            gpu = [ProfilerActivity.CUDA] if has_gpu() else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *gpu], record_shapes=True)
            self._profile.prepare_trace()
        if step >= self._first and self._profile is not None:
            if not self._tracing:
                self._profile.start_trace()
                self._tracing = True
            self._span = record_function(f"train step {step}")
            self._span.__enter__()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Write the trace, if there is one, and stop tracing."""
        self._end_span()
        traced, self._profile, self._last = self._profile, None, -1
        if traced is None or not self._tracing:
            return
        self._tracing = False
        traced.stop_trace()
        try:
            self._target.mkdir(parents=True, exist_ok=True)
            traced.export_chrome_trace(str(self._target / f"rank-{self._rank}.json.gz"))
            table = traced.key_averages().table(
                sort_by="self_cuda_time_total" if has_gpu() else "self_cpu_time_total", row_limit=TABLE_ROWS
            )
            (self._target / f"rank-{self._rank}.txt").write_text(table)
        except (OSError, RuntimeError) as error:  # a full disk must not end a run
            log.warning("the trace of rank %d was not written: %s", self._rank, first_line(error))

    def _end_span(self) -> None:
        if self._span is not None:
            self._span.__exit__(None, None, None)
            self._span = None


def record_history() -> None:
    """From now on, record which code allocates GPU memory; nothing on a CPU."""
    if has_gpu():
        torch.cuda.memory._record_memory_history(max_entries=HISTORY_EVENTS)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on a GPU, in torch's CPU allocator, or in Python."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def out_of_memory(error: BaseException, folder: Path, rank: int, where: str) -> str:
    """Write what is in memory to a file. Returns one line for the user. `error` holds the frames, which keep tensors alive."""
    problem = f"rank {rank} is out of memory in {where}: {first_line(error)}"
    fix = "lower train.micro_batch, or share the state with train.zero_stage 2 or 3"
    target = folder / f"rank-{rank}.txt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        target.write_text(f"{problem}\n\n{_totals()}\n\n" + "\n".join(tensor_lines(_live())) + "\n")
        if has_gpu():
            torch.cuda.memory._dump_snapshot(str(target.with_suffix(".pickle")))  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError, MemoryError) as failure:
        log.warning("the report of what was in memory was not written: %s", first_line(failure))
        return f"{problem}; {fix}"
    return f"{problem}; {fix}. What was in memory: {target}"


def tensor_lines(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Lines `GB  count  what` of named tensors, equal kinds together, largest first; a storage counts once."""
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    seen: set[int] = set()
    for name, tensor in tensors:
        try:
            storage = tensor.untyped_storage()
            address = storage.data_ptr() if storage.device.type != "meta" else None
        except (RuntimeError, NotImplementedError):  # of torch.compile or torch.export: there is nothing behind it
            continue
        if address is None or address in seen:
            continue
        seen.add(address)
        kind = f"{name or 'tensor'} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} {tensor.device}"
        sizes[kind] += storage.nbytes()
        counts[kind] += 1
    lines = [f"{size / 1e9:10.4f} GB  {counts[kind]:5d} x  {kind}" for kind, size in sizes.most_common(SHOWN)]
    rest = sum(size for _, size in sizes.most_common()[SHOWN:])
    return [f"{sum(sizes.values()) / 1e9:10.4f} GB in {sum(counts.values())} tensors", *lines] + (
        [f"{rest / 1e9:10.4f} GB in {len(sizes) - SHOWN} smaller kinds"] if rest else []
    )


def _live() -> list[tuple[str, torch.Tensor]]:
    """Every tensor that Python knows, named parameters first."""
    named: list[tuple[str, torch.Tensor]] = []
    others: list[tuple[str, torch.Tensor]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated attributes of objects that are only inspected
        for thing in gc.get_objects():
            kind = type(thing)
            if issubclass(kind, nn.Module):
                named += [(f"{kind.__name__}.{name}", p) for name, p in thing.named_parameters(recurse=False)]
            elif issubclass(kind, torch.Tensor) and thing.layout is torch.strided:
                others.append(("", thing))
    gradients = [(f"gradient of {name}", p.grad) for name, p in named if p.grad is not None]
    return named + gradients + others


def _totals() -> str:
    memory, process = psutil.virtual_memory(), psutil.Process().memory_info()
    text = f"process {process.rss / 1e9:.2f} GB resident; node {memory.used / 1e9:.2f} of {memory.total / 1e9:.2f} GB"
    if has_gpu():
        text += (
            f"; GPU {torch.cuda.memory_allocated() / 1e9:.2f} GB allocated, {torch.cuda.memory_reserved() / 1e9:.2f} reserved, "
            f"{torch.cuda.mem_get_info()[0] / 1e9:.2f} free\n\n{torch.cuda.memory_summary()}"
        )
    return text
