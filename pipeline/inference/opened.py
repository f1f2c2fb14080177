"""What every model that was opened is, wherever it came from (`source.open_model`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from pipeline.tokenizer import Tokenizer
from pldr_model.config import ModelConfig
from pldr_model.decode.decoder import Decoder
from pldr_model.model import PLDRModel

Kind = Literal["bundle", "hf", "run"]


@dataclass(frozen=True)
class OpenModel:
    """An opened model.

    held: what is in memory: the model, or, of packed weights, what decodes with them; unpack: the model of those. key_ranks
    [L,H]: of a bundle with low-rank keys, how many numbers of a key its cache holds; its model's G is then `g_lm` of these
    ranks. live: the same weights with their metric learner, None unless asked for. certificate: the one that is about these
    tensors, None where there is none. sha256: names weights and G: the bundle's, or of a run that of both files. generation:
    how prompts are encoded (generation_config.json).
    """

    kind: Kind
    path: Path
    name: str
    config: ModelConfig
    held: PLDRModel | Decoder
    g_lm: Tensor
    live: PLDRModel | None
    tokenizer: Tokenizer
    certificate: dict[str, Any] | None
    certified: bool
    sha256: str
    generation: dict[str, Any]
    unpack: Callable[[], PLDRModel] | None = None
    key_ranks: Tensor | None = None
    rounded: bool = False  # an export's weights are not fp32, and the certificate is about those that were

    @cached_property
    def model(self) -> PLDRModel:
        """Evaluation mode, fp32, CPU, with `g_lm` [L,H,K,K] as its constant G. Packed weights are unpacked for whoever asks:
        to generate and score takes `decoder` alone."""
        if isinstance(self.held, PLDRModel):
            return self.held
        assert self.unpack is not None, "packed weights can be unpacked"
        return self.unpack()

    @cached_property
    def decoder(self) -> Decoder:
        """What generates and scores."""
        return self.held if isinstance(self.held, Decoder) else Decoder.of(self.held, key_ranks=self.key_ranks)

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
        for section in ("weight_format", "key_rank"):
            cost = (self.certificate or {}).get(section)
            if cost and not cost["passed"]:
                failed.append(
                    f"{section} costs {cost['loss_difference']:.2g} nats, allowed {cost['max_loss_difference']:g}"
                )
        why = f"failed checks: {', '.join(failed) or 'none'}" if self.certificate else "no certificate"
        return f"{self.path}: UNCERTIFIED {what} ({why}): its cached G_LM may change the model's outputs"
