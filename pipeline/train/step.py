"""One optimizer step over a global batch, and what all ranks have to know of it: the loss, a skip, a wish to stop.

Decision: one all-reduce of a few numbers a step. On gloo it costs a fraction of a millisecond. On a GPU it is queued before
the last `engine.step`, which waits for the device anyway (it reads the gradients' norm), so reading it afterwards waits for
nothing.

What is not finite: a loss that is NaN or infinite is multiplied with NaN, so that its gradients are not finite either,
wherever it arose; through the reduction they reach every rank, and all skip the step: at ZeRO stages 1 to 3 and in bf16
DeepSpeed does that, in fp32 at stage 0, where it has no such check, ClippedAdamW. Weights and moments stay as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pipeline.train.signals import StopRequest, named
from pipeline.train.telemetry import Stopwatch
from pldr_model.config import ModelConfig
from pldr_model.loss import cross_entropy, total_loss


@dataclass(frozen=True)
class Outcome:
    """A step, as every rank knows it. loss: mean over the global batch, nats per token; stop: a signal's name."""

    loss: float
    skipped: bool
    stop: str | None


def global_step(
    engine: Any,
    micro_batches: Sequence[np.ndarray],
    model: ModelConfig,
    *,
    stop: StopRequest,
    device: torch.device,
    forward: Stopwatch,
) -> Outcome:
    """Forward, backward and update over this rank's micro batches, each [n, S+1]; collective. `forward` times the first."""
    wants_outputs = any(model.dag_coefficients)
    loss_sum = torch.zeros((), device=device)
    skipped_before = int(engine.skipped_steps)
    told: _Told | None = None
    for number, micro in enumerate(micro_batches, 1):
        ids = torch.from_numpy(micro).to(device, non_blocking=True)
        with forward.running():
            result = engine(ids[:, :-1], padded=False, return_outputs=wants_outputs)
        logits, outputs = result if wants_outputs else (result, None)
        try:
            losses = total_loss(logits, ids[:, 1:], model, outputs=outputs)
            total, plain = losses.total, losses.cross_entropy
        except FloatingPointError:  # the DAG regulariser's tensors are not finite
            plain = cross_entropy(logits, ids[:, 1:], pad_id=model.pad_id)
            total = plain * torch.nan
        engine.backward(_poisoned(total))
        loss_sum += plain.detach()
        if number == len(micro_batches):
            told = _Told(loss_sum / number, stop.flags())
        engine.step()
    assert told is not None
    loss, flags = told.read()
    return Outcome(loss, int(engine.skipped_steps) != skipped_before, named(flags))


def _poisoned(loss: torch.Tensor) -> torch.Tensor:
    """The loss; times NaN when it is not finite. Times 1, which changes no bit, otherwise. No wait for the device."""
    finite = torch.isfinite(loss.detach())
    return loss * torch.where(finite, torch.ones_like(loss), torch.full_like(loss, torch.nan))


class _Told:
    """A loss and flags on their way through all ranks: the mean of the one, the sums of the others."""

    def __init__(self, loss: torch.Tensor, flags: list[float]) -> None:
        numbers = torch.cat(
            [loss.detach().double().reshape(1), torch.tensor(flags, dtype=torch.float64).to(loss.device)]
        )
        dist.all_reduce(numbers)
        self._numbers = numbers.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if numbers.is_cuda else None  # type: ignore[no-untyped-call]
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> tuple[float, list[float]]:
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, *flags = self._numbers.tolist()
        return loss / dist.get_world_size(), flags
