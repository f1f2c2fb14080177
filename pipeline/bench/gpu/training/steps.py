"""Training steps that are timed: of plain PyTorch, the same as one CUDA graph, and the trainer's own with DeepSpeed.

All do the same work in bf16: fp32 copies of the weights, gradients clipped by value, AdamW in one kernel. Each waits for its
loss, as the trainer does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.bench.gpu.training.forms import Form
from pldr_model.decode.capture import WARM_UP

Step = Callable[[], float]  # trains once; the loss
ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 0.1}
CLIP = 1.0
FIRST_ID = 4


def random_ids(form: Form, micro_batch: int) -> np.ndarray:
    """Sequences [B,S+1] without padding, as a loader gives them."""
    config = form.config
    size = (micro_batch, config.context_length + 1)
    return np.random.default_rng(0).integers(min(FIRST_ID, config.vocab_size - 1), config.vocab_size, size)


class Plain:
    """Plain PyTorch: a bf16 model, and fp32 weights that AdamW updates. graph: the whole step is one CUDA graph."""

    def __init__(
        self, form: Form, micro_batch: int, device: torch.device, *, compiled: bool = False, graph: bool = False
    ) -> None:
        self.form = form
        self.model = form.model(device).bfloat16()
        if compiled:
            for layer in self.model.layers:
                layer.compile()
        self.weights: list[Tensor] = [p for p in self.model.parameters() if p.requires_grad]
        self.masters = [p.detach().float() for p in self.weights]
        self.gradients = [torch.zeros_like(master) for master in self.masters]
        for master, gradient in zip(self.masters, self.gradients, strict=True):
            master.grad = gradient
        graph = graph and device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.masters, fused=True, capturable=graph, **ADAMW)
        self.micro = random_ids(form, micro_batch)
        self.ids_BS = torch.from_numpy(self.micro).to(device)
        self._replay = self._capture() if graph else None

    def __call__(self) -> float:
        self.ids_BS.copy_(torch.from_numpy(self.micro), non_blocking=True)
        return float(self.kernels() if self._replay is None else self._replay())

    def kernels(self) -> Tensor:
        """Everything that the device does in a step."""
        loss = self.form.loss(self.model, self.ids_BS)
        torch.autograd.backward(loss)
        torch._foreach_copy_(self.gradients, [w.grad for w in self.weights if w.grad is not None])
        torch._foreach_clamp_max_(self.gradients, CLIP)
        torch._foreach_clamp_min_(self.gradients, -CLIP)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)
        for weight in self.weights:
            weight.grad = None
        return loss.detach()

    def _capture(self) -> Callable[[], Tensor]:
        stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.kernels()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self.kernels()

        def replay() -> Tensor:
            graph.replay()
            return loss

        return replay
