"""What is trained side by side: the model, its SDPA twin, and the ways to spare it work. A way that this version of the model
does not have is left out."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pldr_model.config import ModelConfig
from pldr_model.loss import total_loss
from pldr_model.model import PLDRModel

KEYWORDS = inspect.signature(PLDRModel.forward).parameters


@dataclass(frozen=True)
class Form:
    """A model as it is trained. chunked: the loss without logits of all tokens; g_from: whose G a sequence uses."""

    name: str
    config: ModelConfig
    chunked: bool = False
    g_from: str = "own"

    def loss(self, model: PLDRModel, ids_BS: Tensor) -> Tensor:
        """The training loss of sequences [B,S+1] without padding."""
        keywords: dict[str, Any] = {"padded": False}
        if self.g_from != "own":
            keywords["g_from"] = self.g_from
        if self.chunked:
            found: Tensor = model(ids_BS[:, :-1], targets=ids_BS[:, 1:], **keywords).total
            return found
        return total_loss(model(ids_BS[:, :-1], **keywords), ids_BS[:, 1:], self.config).total

    def flops_per_token(self, micro_batch: int) -> float:
        """Of a training step; a G that is shared is deduced once in a micro batch."""
        if self.g_from == "batch":
            return self.config.flops_per_token(training=True, sequences_per_g=micro_batch)  # type: ignore[call-arg]
        return self.config.flops_per_token(training=True)


def forms_of(config: ModelConfig) -> dict[str, Form]:
    """`plga`, `twin` (G = identity), and where there are such: `plga-chunked`, `plga-shared` (one G for a micro batch)."""
    forms = [Form("plga", config), Form("twin", config.sdpa_twin())]
    if "targets" in KEYWORDS:
        forms.append(Form("plga-chunked", config, chunked=True))
    if "g_from" in KEYWORDS:
        forms.append(Form("plga-shared", config, g_from="batch"))
    return {form.name: form for form in forms}
