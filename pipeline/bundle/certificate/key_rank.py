"""Low-rank keys: the certificate's section `key_rank`, which says what they save and cost. Absent where keys are full.

A bundle stores the full G_LM and integer ranks [L,H], in config.json and here; its factors are made when it is loaded
(pldr_model/decode/low_rank.py). What is measured compares the stored weights with low-rank keys to the same weights with full
ones, so a packed format's own cost (section `weight_format`) is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config.post import MAX_KEY_LOSS
from pipeline.errors import UserError

SECTION = "key_rank"
KL_ROUND_OFF = 1e-5  # of a divergence, which may come out below 0
LOSS_ROUND_OFF = 1e-7  # of a loss, relative above 1: nine digits are written
Ranks = Sequence[Sequence[int]]  # [L][H]


def cache_numbers(ranks: Ranks, head_dim: int) -> dict[str, float | int]:
    """What follows from the ranks: numbers of a key, on average over layers and heads, and fp32 bytes of a token's keys and
    values in all layers, beside those of full keys."""
    heads = sum(len(row) for row in ranks)
    keys = sum(map(sum, ranks))
    return {
        "numbers_per_key": float(f"{keys / heads:.9g}"),
        "bytes_per_token": 4 * (keys + heads * head_dim),
        "bytes_per_token_full": 8 * heads * head_dim,
    }


def wrong_ranks(ranks: Any, model: Mapping[str, Any]) -> str | None:
    """What is wrong with ranks [L][H] for a model (its plain values), in one line; None when they fit."""
    layers, heads, size = (model[key] for key in ("num_layers", "num_heads", "head_dim"))
    well_formed = isinstance(ranks, list) and len(ranks) == layers
    if not well_formed or any(not isinstance(row, list) or len(row) != heads for row in ranks):
        return f"not the ranks of {layers} layers of {heads} heads"
    for rank in (rank for row in ranks for rank in row):
        if type(rank) is not int or not 1 <= rank <= size:
            return f"rank {rank!r} is not a whole number from 1 to {size}"
    return None


def passed(section: Mapping[str, Any]) -> bool:
    """Whether low-rank keys cost no more than allowed."""
    difference = section["loss_difference"]
    return difference is not None and math.isfinite(difference) and abs(difference) <= section["max_loss_difference"]


def wrong_difference(
    loss: float | None, full: float | None, difference: float | None, round_off: float = LOSS_ROUND_OFF
) -> str | None:
    """Whether a loss difference is not that of the two losses (all of them as written), in one line; None when it is."""
    if loss is None or full is None:
        fits = difference is None
    else:
        fits = difference is not None and abs(loss - full - difference) <= round_off * max(1.0, loss, full)
    return None if fits else f"loss_difference: {difference} is not that of the losses {loss} and {full}"


def impossible(section: Mapping[str, Any]) -> str | None:
    """A number that a comparison over held-out text cannot give, in one line; None when there is none."""
    if section["prompts"] < 1:
        return f"prompts: {section['prompts']} measure nothing"
    kl = section["kl"]
    if kl is not None and not -KL_ROUND_OFF <= kl < math.inf:
        return f"kl: {kl} is not a divergence"
    for key in ("top1_agreement", "greedy_agreement", "greedy_identical"):
        share = section.get(key)
        if share is not None and not 0 <= share <= 1:
            return f"{key}: {share} is not a share"
    return None


def inconsistent(certificate: Mapping[str, Any]) -> str | None:
    """The first number of the section that another contradicts, in one line; None when all fit, or there is no section."""
    section = certificate.get(SECTION)
    if not section:
        return None
    if wrong := wrong_ranks(section["ranks"], certificate["model"]):
        return f"{SECTION}.ranks: {wrong}"
    for key, value in cache_numbers(section["ranks"], certificate["model"]["head_dim"]).items():
        if section[key] != value:
            return f"{SECTION}.{key}: {section[key]} does not follow from the ranks ({value})"
    if not 0 <= section["max_loss_difference"] <= MAX_KEY_LOSS:
        allowed = section["max_loss_difference"]
        return f"{SECTION}.max_loss_difference: {allowed:g} nats; at most {MAX_KEY_LOSS:g} may be allowed"
    if wrong := impossible(section):
        return f"{SECTION}.{wrong}"
    if wrong := wrong_difference(section["loss"], section["loss_full"], section["loss_difference"]):
        return f"{SECTION}.{wrong}"
    difference = section["loss_difference"]
    if section["passed"] is not passed(section):
        return f"{SECTION}.passed: {section['passed']} contradicts a loss difference of {difference}"
    return None


def check_section(section: Any, *, ranks: Any, sha256: str, where: str) -> bool:
    """Whether, by the certificate's section, these ranks may be called certified.

    section: as schema.py checked it, or None. ranks: of config.json, or None; sha256: that of the bundle's
    model.safetensors. Raises UserError when one has ranks and the other has not, or has others, or was measured with other
    weights.
    """
    if section is None and ranks is None:
        return True
    if section is None or section["ranks"] != ranks or section["sha256"] != sha256:
        raise UserError(f"{where}: it holds no measurement of these key ranks and weights; make the bundle again")
    return bool(section["passed"])


def describe(section: Mapping[str, Any], head_dim: int) -> str:
    """What low-rank keys save and cost, in one line."""
    share = section["bytes_per_token"] / section["bytes_per_token_full"]
    return (
        f"Keys hold {section['numbers_per_key']:.3g} of {head_dim} numbers on average, and keys and values take {share:.2f} of "
        f"the bytes of full ones: held-out loss {_number(section['loss'])} against {_number(section['loss_full'])} nats "
        f"(difference {_number(section['loss_difference'], '.2g')}, allowed {section['max_loss_difference']:g}), KL "
        f"{_number(section['kl'], '.2g')}, top-1 agreement {_number(section['top1_agreement'])}, greedy agreement "
        f"{_number(section['greedy_agreement'])}, over {section['prompts']} prompts"
    )


def _number(value: float | None, form: str = ".6g") -> str:
    return "not finite" if value is None else format(value, form)
