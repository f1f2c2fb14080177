"""One optimizer step over a global batch, and what all ranks have to know about it: the loss, a skip, a request to stop.

The loss is the mean over all targets of the global batch that are not padding, whatever rank and micro batch they are in. Every
micro batch has its own mean, and DeepSpeed takes the mean of those over micro batches and ranks. So each is weighted by its
number of targets over the average number in a micro batch, for which the numbers are summed over ranks before the first
backward pass. Without padding the weights are exactly 1. The DAG regularizer is a mean over sequences, of which all micro
batches have equally many.

Decision: one more all-reduce of a few numbers ends a step. On gloo it costs a fraction of a millisecond. On a GPU it is queued
before the last `engine.step`, which waits for the device anyway (it reads the gradients' norm), so reading it afterwards costs
no wait.

Losses that are not finite: a loss that is NaN or infinite is multiplied by NaN, so that its gradients are not finite either,
wherever it arose. The reduction brings them to every rank, and all skip the step: DeepSpeed does that at ZeRO stages 1 to 3
and in bf16, ClippedAdamW (optim.py) in fp32 at stage 0, where DeepSpeed has no such check. Weights and moments stay as they
were. A batch of nothing but padding has no loss, and is skipped likewise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pipeline.train.signals import StopRequest, signal_name
from pipeline.train.targets import has_padding, masks, num_targets, with_documents
from pipeline.train.telemetry import Stopwatch
from pldr_model.config import GFrom, ModelConfig
from pldr_model.loss import total_loss


@dataclass(frozen=True)
class Outcome:
    """The result of a step, the same on every rank. loss: mean over the targets of the global batch, nats per token; stop: a
    signal's name."""

    loss: float
    targets: int
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
    z_loss: float = 0.0,
    g_from: GFrom = "own",
) -> Outcome:
    """Forward, backward and update over this rank's micro batches, each [n, S+1], or with document masks [2, n, S+1]
    (`with_documents`); collective. `forward`: times the forward passes; `g_from`: whose G a sequence uses, see
    PLDRModel.forward."""
    wants_outputs = any(model.dag_coefficients)
    loss_sum = torch.zeros((), device=device)
    skipped_before = int(engine.skipped_steps)
    reduced: _AllReduce | None = None
    targets = [num_targets(with_documents(micro)[0], model.pad_id) for micro in micro_batches]
    passes = len(targets) * dist.get_world_size()
    all_targets = torch.tensor(sum(targets), dtype=torch.float64).to(device, non_blocking=True)
    dist.all_reduce(all_targets)
    for number, (micro, documents) in enumerate(map(with_documents, micro_batches), 1):
        ids = torch.from_numpy(micro).to(device, non_blocking=True)
        with forward.running():
            padded = has_padding(micro, model.pad_id)
            result = engine(
                ids[:, :-1],
                targets=ids[:, 1:],
                z_loss=z_loss,
                g_from=g_from,
                padded=padded,
                return_outputs=wants_outputs,
                **masks(documents, device),
            )
        tokens, outputs = result if wants_outputs else (result, None)
        weight = targets[number - 1] * passes / all_targets  # 1 without padding, NaN without any target
        try:
            total, plain, _ = total_loss(tokens, model, outputs=outputs, weight=weight)
        except FloatingPointError:  # the DAG regularizer's tensors are not finite
            total, plain = tokens.loss * torch.nan, tokens.cross_entropy
        engine.backward(_poisoned(total))
        loss_sum += plain * weight.to(plain.dtype)
        if number == len(micro_batches):
            reduced = _AllReduce(loss_sum / number, all_targets, stop.flags())
        engine.step()
    assert reduced is not None
    mean_loss, num, flags = reduced.read()
    return Outcome(mean_loss, num, int(engine.skipped_steps) != skipped_before, signal_name(flags))


def _poisoned(loss: torch.Tensor) -> torch.Tensor:
    """The loss; times NaN when it is not finite. Times 1, which changes no bit, otherwise. No wait for the device."""
    finite = torch.isfinite(loss.detach())
    return loss * torch.where(finite, torch.ones_like(loss), torch.full_like(loss, torch.nan))


class _AllReduce:
    """Over all ranks: the mean of a loss and the sums of flags. Starts immediately; `read` waits for it, and for `targets`,
    which is summed already."""

    def __init__(self, loss: torch.Tensor, targets: torch.Tensor, flags: list[float]) -> None:
        numbers = torch.cat(
            [loss.detach().double().reshape(1), torch.tensor(flags, dtype=torch.float64).to(loss.device)]
        )
        dist.all_reduce(numbers)
        numbers = torch.cat([targets.reshape(1), numbers])
        self._numbers = numbers.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if numbers.is_cuda else None  # type: ignore[no-untyped-call]
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> tuple[float, int, list[float]]:
        if self._arrived is not None:
            self._arrived.synchronize()
        targets, loss, *flags = self._numbers.tolist()
        return loss / dist.get_world_size(), int(targets), flags
