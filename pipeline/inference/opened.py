"""What every model that was opened is, wherever it came from (`source.open_model`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from pipeline.tokenizer import Tokenizer
from pldr_model.model import PLDRModel

Kind = Literal["bundle", "hf", "run"]


@dataclass(frozen=True)
class OpenModel:
    """An opened model.

    model: evaluation mode, fp32, CPU, with `g_lm` [L,H,K,K] as its constant G. key_ranks [L,H]: of a bundle with low-rank keys,
    how many numbers of a key its cache holds; its model's G is then `g_lm` of these ranks. live: the same weights with their
    metric learner, None unless asked for. certificate: the one about these tensors, None where there is none. sha256: names
    weights and G: the bundle's, or of a run that of both files. generation: how prompts are encoded (generation_config.json).
    """

    kind: Kind
    path: Path
    name: str
    model: PLDRModel
    g_lm: Tensor
    live: PLDRModel | None
    tokenizer: Tokenizer
    certificate: dict[str, Any] | None
    certified: bool
    sha256: str
    generation: dict[str, Any]
    key_ranks: Tensor | None = None
    rounded: bool = False  # an export's weights are not fp32, and the certificate is about those that were

    @property
    def caution(self) -> str | None:
        """One line for whoever uses a model that is not certified; None for one that is."""
        if self.certified:
            return None
        what = {"bundle": "bundle", "hf": "export", "run": "run"}[self.kind]
        if self.rounded and self.certificate and self.certificate["verdict"] == "certified":
            return (
                f"{self.path}: UNCERTIFIED {what}: its weights are rounded, and the certificate is about the fp32 ones"
            )
        failed = [failure["measure"] for failure in self.certificate["failed"]] if self.certificate else []
        why = f"failed checks: {', '.join(failed) or 'none'}" if self.certificate else "no certificate"
        return f"{self.path}: UNCERTIFIED {what} ({why}): its cached G_LM may change the model's outputs"
