"""What caching G_LM does to the model's answers, against full recomputation without any cache.

Background (docs/certificate.md, "what fools a validator"):
- The control is the live model: G deduced anew from the whole sequence, nothing cached. Keeping only K/V would freeze G too.
- A G deduced from a whole sequence has seen the tokens to be predicted. So beside the live loss stands the loss with the G
  of *another* prompt, which cannot leak; their difference is the leak gap. The same leak seen directly: change the last
  token and watch the logits before it.
- A model whose attention is dead agrees with itself perfectly under any G. So the loss with G = 0 and with G = identity
  must be worse.

Shapes: N sequences, T = S+1 tokens of a sequence, B batch, V vocabulary, L layers, H heads, K head dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.post.measures import order_parameter
from pipeline.post.observe import TENSORS, batches, deduce
from pldr_model.generate import generate
from pldr_model.model import PLDRModel

GENERATION_PROMPTS = 8


class Agreement:
    """Streaming comparison of cached against live logits: max |delta|, KL(live || cached) per token, top-1."""

    def __init__(self) -> None:
        self.tokens = self.same = 0
        self.kl_sum = self.kl_max = self.max_delta = 0.0

    def update(self, live_BSV: Tensor, cached_BSV: Tensor) -> None:
        """Take in the logits of one batch; fp64, in slices, so that a large vocabulary fits."""
        rows = max(1, (1 << 24) // live_BSV.shape[-1])
        live_NV, cached_NV = live_BSV.flatten(0, 1), cached_BSV.flatten(0, 1)
        for start in range(0, len(live_NV), rows):
            live_RV, cached_RV = live_NV[start : start + rows], cached_NV[start : start + rows]
            log_p_RV, log_q_RV = live_RV.double().log_softmax(-1), cached_RV.double().log_softmax(-1)
            kl_R = (log_p_RV.exp() * (log_p_RV - log_q_RV)).sum(-1)
            self.tokens += len(kl_R)
            self.same += int((live_RV.argmax(-1) == cached_RV.argmax(-1)).sum())
            self.kl_sum += kl_R.sum().item()
            # not max(): Python's would drop a NaN
            self.kl_max = torch.tensor([self.kl_max, kl_R.max().item()]).max().item()
            delta = (live_RV.double() - cached_RV.double()).abs().max().item()
            self.max_delta = torch.tensor([self.max_delta, delta]).max().item()

    def as_dict(self) -> dict[str, float]:
        """Plain numbers; KL in nats per token."""
        return {
            "max_abs_delta_logit": self.max_delta,
            "kl": max(0.0, self.kl_sum / self.tokens) if math.isfinite(self.kl_sum) else math.nan,
            "kl_max": self.kl_max,
            "top1": self.same / self.tokens if math.isfinite(self.max_delta) else math.nan,
        }


@torch.inference_mode()
def compare_losses(model: PLDRModel, g_LHKK: Tensor, text_NT: Tensor) -> dict[str, Any]:
    """Held-out loss in nats with G live (`block`), cached, of another prompt, zero and identity; and the agreement of
    cached with live logits. N >= 2."""
    device = model.embedding.weight.device
    g_LHKK = g_LHKK.to(device)
    zero_LHKK = torch.zeros_like(g_LHKK)
    identity_LHKK = torch.eye(g_LHKK.shape[-1], dtype=g_LHKK.dtype, device=device).expand_as(g_LHKK)
    nll = dict.fromkeys(("block", "cached", "other", "zero", "identity"), 0.0)
    agreement, tokens = Agreement(), 0
    # The first batch needs a neighbour for every prompt: the G before the first prompt is the last prompt's.
    previous_LBHKK = model.compute_g(text_NT[-1:, :-1].to(device), padded=False)
    for ids_BT in batches(text_NT, model):
        inputs_BS, targets_BS = ids_BT[:, :-1], ids_BT[:, 1:]
        g_live_LBHKK = model.compute_g(inputs_BS, padded=False)
        g_other_LBHKK = torch.cat((previous_LBHKK, g_live_LBHKK[:, :-1]), dim=1)
        previous_LBHKK = g_live_LBHKK[:, -1:]
        live_BSV = _logits(model, inputs_BS)
        nll["block"] += _nll(live_BSV, targets_BS)
        given = {"cached": g_LHKK, "other": g_other_LBHKK, "zero": zero_LHKK, "identity": identity_LHKK}
        for name, g in given.items():
            logits_BSV = _logits(model, inputs_BS, g)
            nll[name] += _nll(logits_BSV, targets_BS)
            if name == "cached":
                agreement.update(live_BSV, logits_BSV)
        tokens += targets_BS.numel()
    return {"losses": {name: value / tokens for name, value in nll.items()}, "agreement": agreement.as_dict()}


@torch.inference_mode()
def leak_test(model: PLDRModel, g_LHKK: Tensor, text_NT: Tensor) -> dict[str, float]:
    """Change the last token of each sequence: how far do the logits before it move, relative to their own spread?

    `live_rms` and `live_max` with the live G (RMS and largest |delta| over the standard deviation of the logits),
    `cached_max` with the cached G, where causality alone makes it zero up to round-off.
    """
    device = model.embedding.weight.device
    sums = {"delta": 0.0, "logit": 0.0, "square": 0.0, "count": 0}
    highest = {"live": 0.0, "cached": 0.0}
    for ids_BS in batches(text_NT[:, :-1], model):
        changed_BS = ids_BS.clone()
        # The next real id: never the padding id, which would hide the key and not only change it.
        changed_BS[:, -1] = (ids_BS[:, -1] + 1) % model.config.vocab_size
        changed_BS[changed_BS[:, -1] == model.config.pad_id, -1] += 1
        for name, g in (("live", None), ("cached", g_LHKK.to(device))):
            logits_BSV = _logits(model, ids_BS, g)[:, :-1]
            delta_BSV = (_logits(model, changed_BS, g)[:, :-1] - logits_BSV).double()
            highest[name] = torch.tensor([highest[name], delta_BSV.abs().max().item()]).max().item()
            if name == "live":
                sums["delta"] += delta_BSV.square().sum().item()
                sums["logit"] += logits_BSV.double().sum().item()
                sums["square"] += logits_BSV.double().square().sum().item()
                sums["count"] += delta_BSV.numel()
    mean = sums["logit"] / sums["count"]
    spread = math.sqrt(max(0.0, sums["square"] / sums["count"] - mean**2)) or math.nan
    return {
        "live_rms": math.sqrt(sums["delta"] / sums["count"]) / spread,
        "live_max": highest["live"] / spread,
        "cached_max": highest["cached"] / spread,
        "logit_spread": spread,
    }


def greedy_agreement(model: PLDRModel, g_LHKK: Tensor, text_NT: Tensor, *, num_tokens: int) -> dict[str, Any]:
    """Greedy continuations with KV- and G-cache against those without any cache (live G at every token).

    After a first difference the two texts are not comparable, so what is counted is decisions taken after identical
    tokens: `per_decision` = 1 - differences / decisions. `identical` is the share of prompts that never differ.
    """
    prompts = _generation_prompts(text_NT)
    cached = generate(model, prompts, max_new_tokens=num_tokens, g_lm=g_LHKK)
    live = generate(model, prompts, max_new_tokens=num_tokens, use_cache=False)
    decisions = differences = 0
    for ours, control in zip(cached, live, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(ours, control, strict=True)) if a != b), None)
        decisions += len(control) if same is None else same + 1
        differences += same is not None
    return {
        "per_decision": 1 - differences / decisions,
        "identical": 1 - differences / len(prompts),
        "num_prompts": len(prompts),
        "num_tokens": len(live[0]),
        "decisions": decisions,
    }


def order_parameters(model: PLDRModel, text_NT: Tensor, *, num_tokens: int, seed: int) -> dict[str, Any]:
    """The papers' protocol, smaller: runs 1 and 2 sample (p = 0.8, T = 1) without caches and the deductive outputs are
    taken after the last token; run C takes them after the prompt, where a cache would. Per tensor and pair of runs:
    [RMSE / |mean|, RMSE / RMS]."""
    prompts = _generation_prompts(text_NT)
    device = model.embedding.weight.device
    runs = {"C": torch.tensor(prompts)}
    for number in (1, 2):
        new = generate(
            model, prompts, max_new_tokens=num_tokens, use_cache=False, seed=seed + number, temperature=1.0, top_p=0.8
        )
        runs[str(number)] = torch.tensor([p + n for p, n in zip(prompts, new, strict=True)])
    with torch.inference_mode():
        outputs = {name: deduce(model, ids.to(device)) for name, ids in runs.items()}
    return {
        tensor: {
            f"{a}-{b}": list(order_parameter(outputs[a][tensor], outputs[b][tensor]))
            for a, b in (("1", "2"), ("1", "C"), ("2", "C"))
        }
        for tensor in TENSORS
    }


def _generation_prompts(text_NT: Tensor) -> list[list[int]]:
    """Half a context of text, so that there is room to go on."""
    prompts: list[list[int]] = text_NT[:GENERATION_PROMPTS, : max(1, (text_NT.shape[1] - 1) // 2)].tolist()
    return prompts


def _logits(model: PLDRModel, ids_BS: Tensor, g: Tensor | None = None) -> Tensor:
    logits_BSV = model(ids_BS, g_lm=g, padded=False)
    assert isinstance(logits_BSV, Tensor)
    return logits_BSV


def _nll(logits_BSV: Tensor, targets_BS: Tensor) -> float:
    """Summed negative log-likelihood in nats; summed in fp64, or a gap of 1e-6 a token would drown in the sum."""
    flat = logits_BSV.flatten(0, 1).float()
    return F.cross_entropy(flat, targets_BS.flatten(), reduction="none").double().sum().item()
