"""What is trained side by side: the model with logits of all tokens, its SDPA twin, and the ways to spare it work."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from pldr_model.config import GFrom, ModelConfig
from pldr_model.loss import losses_of_logits
from pldr_model.metric_learner import run_as_modules
from pldr_model.model import PLDRModel


@dataclass(frozen=True)
class Form:
    """A model as it is trained. chunked: the loss without logits of all tokens, as the trainer has it; g_from: whose G a
    sequence uses; modules: the metric learner's modules one after the other, not its function with a gradient of its own;
    triton: that function as Triton kernels, on a GPU and not compiled."""

    name: str
    config: ModelConfig
    chunked: bool = True
    g_from: GFrom = "own"
    modules: bool = False
    triton: bool = False

    def model(self, device: torch.device) -> PLDRModel:
        """With new weights, drawn on the device: the same for every form of one architecture."""
        torch.manual_seed(0)
        with device:
            model = PLDRModel(self.config)
        if self.modules:
            run_as_modules(model)
        return model

    def loss(self, model: PLDRModel, ids_BS: Tensor) -> Tensor:
        """The training loss of sequences [B,S+1] without padding."""
        os.environ["PLDR_METRIC_LEARNER"] = "triton" if self.triton else ""  # read in each forward pass
        inputs_BS, targets_BS = ids_BS[:, :-1], ids_BS[:, 1:]
        if self.chunked:
            loss: Tensor = model(inputs_BS, targets=targets_BS, g_from=self.g_from, padded=False).loss
            return loss
        logits_BSV = model(inputs_BS, g_from=self.g_from, padded=False)
        return losses_of_logits(logits_BSV, targets_BS, pad_id=self.config.pad_id).loss

    def flops_per_token(self, micro_batch: int) -> float:
        """Of a training step; a G that is shared is deduced once in a micro batch."""
        sequences = micro_batch if self.g_from == "batch" else 1
        return self.config.flops_per_token(training=True, sequences_per_g=sequences)


def forms_of(config: ModelConfig) -> dict[str, Form]:
    """`plga`, `twin` (G = identity), `plga-logits` (all logits at once), `plga-modules` (the metric learner not as one
    function), `plga-triton` (its kernels), `plga-shared` (one G for a micro batch)."""
    forms = [
        Form("plga", config),
        Form("twin", config.sdpa_twin()),
        Form("plga-logits", config, chunked=False),
        Form("plga-modules", config, modules=True),
        Form("plga-triton", config, triton=True),
        Form("plga-shared", config, g_from="batch"),
    ]
    return {form.name: form for form in forms}
