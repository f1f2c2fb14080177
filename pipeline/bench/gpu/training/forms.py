"""What is trained side by side: the model with logits of all tokens, its SDPA twin, and the ways to spare it work."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pldr_model.config import GFrom, ModelConfig
from pldr_model.loss import losses_of_logits
from pldr_model.model import PLDRModel


@dataclass(frozen=True)
class Form:
    """A model as it is trained. chunked: the loss without logits of all tokens, which is how the trainer has it; g_from: whose
    G a sequence uses."""

    name: str
    config: ModelConfig
    chunked: bool = True
    g_from: GFrom = "own"

    def loss(self, model: PLDRModel, ids_BS: Tensor) -> Tensor:
        """The training loss of sequences [B,S+1] without padding."""
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
    """`plga`, `twin` (G = identity), `plga-logits` (all logits at once), `plga-shared` (one G for a micro batch)."""
    forms = [
        Form("plga", config),
        Form("twin", config.sdpa_twin()),
        Form("plga-logits", config, chunked=False),
        Form("plga-shared", config, g_from="batch"),
    ]
    return {form.name: form for form in forms}
