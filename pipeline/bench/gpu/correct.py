"""Whether a device computes what fp64 on the CPU does: fresh random weights, inputs and lengths in every run.

The yardstick is the model's plain pass over the whole sequence, in fp64, without any cache. The decoder under test reads a part
of each row, rows at their own lengths, and then the rest token by token. Its weights are unpacked for the yardstick, so a
difference is one of arithmetic.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import torch

from pipeline.bench.gpu.setting import Form, Setting, make_forms
from pipeline.bench.gpu.stepper import Mode, stepper
from pldr_model.decode.decoder import Decoder
from pldr_model.decode.linear import Matrix
from pldr_model.decode.low_rank import truncate_g
from pldr_model.model import PLDRModel

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "int8": 5e-2, "bf16_low_rank": 5e-2}  # of the largest logit
MODES: tuple[Mode, ...] = ("eager", "captured")
STEPS = 6


def correct(setting: Setting) -> Iterator[dict[str, Any]]:
    """By form: the largest difference of logits over the largest logit, and how many greedy tokens agree."""
    seed = secrets.randbits(31)
    torch.manual_seed(seed)
    lengths = [setting.config.context_length // 8, 3, setting.config.context_length // 3]
    ids_BS = torch.randint(4, setting.config.vocab_size, (len(lengths), max(lengths) + STEPS))
    for name, form in make_forms(setting, tuple(TOLERANCE)).items():
        expected_BTV = _expected(form, ids_BS, lengths)
        decoder = form.contender().decoder
        found_BTV, captured_BTV = (_found(decoder, ids_BS, lengths, mode) for mode in MODES)
        difference = float((found_BTV - expected_BTV).abs().max() / expected_BTV.abs().max())
        yield {
            "what": "correct",
            "form": name,
            "seed": seed,
            "lengths": lengths,
            "difference": difference,
            "allowed": TOLERANCE[name],
            "captured_is_eager": captured_BTV.equal(found_BTV),
            "passed": difference <= TOLERANCE[name] and captured_BTV.equal(found_BTV),
            "top1_agreement": float((found_BTV.argmax(-1) == expected_BTV.argmax(-1)).double().mean()),
        }


def _expected(form: Form, ids_BS: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Logits after the part that is read and after each step, [B,1+STEPS,V]."""
    weights = {name: w.dense() if isinstance(w, Matrix) else w for name, w in form.weights.items()}
    assert form.g_lm is not None
    g_lm = form.g_lm.double().cpu()
    if form.key_ranks is not None:
        g_lm = truncate_g(g_lm, form.key_ranks)
    model = PLDRModel(form.config, g_lm_LHKK=g_lm).double()
    model.load_state_dict({**{name: w.double().cpu() for name, w in weights.items()}, "g_lm": g_lm})
    logits_BSV = model(ids_BS, padded=False)
    return torch.stack([logits_SV[n - 1 : n + STEPS] for logits_SV, n in zip(logits_BSV, lengths, strict=True)])


def _found(decoder: Decoder, ids_BS: torch.Tensor, lengths: list[int], mode: Mode) -> torch.Tensor:
    ids_BS, step = ids_BS.to(decoder.device), stepper(decoder, mode)
    cache = decoder.new_cache(batch_size=len(lengths), capacity=max(lengths) + STEPS)
    hidden_BSD = decoder.read(ids_BS[:, : max(lengths)], cache, lengths=lengths)
    last_B = torch.tensor(lengths, device=decoder.device)
    row_B = torch.arange(len(lengths), device=decoder.device)
    logits = [decoder.logits(hidden_BSD[row_B, last_B - 1])]
    for number in range(STEPS):
        logits.append(step(ids_BS[row_B, last_B + number], cache).clone())
    return torch.stack(logits, dim=1).double().cpu()
