"""Whether the parts of a certificate's measures fit together: summaries against details, and a proof against a search."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.bundle.certificate import key_rank
from pipeline.config.post import MAX_FORMAT_LOSS

Tree = Mapping[str, Any]
# Measured where everything was finite, and only there; the last ones of a G_LM that is deduced from the input.
MEASURED = ("losses", "prefix", "effects", "agreement", "leak", "greedy", "fp64", "cached_rank")
DEDUCED = ("worst_row", "proof", "query_deviation", "order_parameter")
SEARCH_ROUND_OFF = 1e-10  # the search computes in fp64, the proof bounds exact arithmetic
PROMPT_ROUND_OFF = 1e-6  # a deviation below it may be round-off; a proven bound does not speak of that
AS_WRITTEN = 1e-8  # relative; numbers were rounded after they were counted
LOSS_ROUND_OFF = 1e-7  # of a loss: nine digits are written
FORMAT_ROUND_OFF = 1e-5  # of the losses of packed weights, relative above 1: six digits are written
ALWAYS = ("text", "random", "repeated", "padded", "lengths")  # kinds of prompts; others depend on the length of text


def largest(values: Iterable[float | None]) -> float | None:
    """The largest; None when there is none, or any could not be measured."""
    known = list(values)
    finite = [value for value in known if value is not None and math.isfinite(value)]
    return max(finite) if finite and len(finite) == len(known) else None


def inconsistent(certificate: Tree) -> str | None:
    """The first part of a certificate of today's schema that another part contradicts, in one line; None when all fit."""
    measures, model = certificate["measures"], certificate["model"]
    for key in ("vocab_size", "num_layers", "context_length"):
        if type(model.get(key)) is not int:
            return f"model.{key} is not a whole number"
    learned, deviations = model["g_source"] == "learned", measures["deviations"]
    if deviations.keys() != {"fp32", "fp64"}:
        return "measures.deviations: not exactly fp32 and fp64"
    for precision, key in (("fp64", "relative_deviation_g"), ("fp32", "relative_deviation_g_fp32")):
        if measures[key] != deviations[precision].get("G_LM", {}).get("max"):
            return f"measures.{key} is not that of G_LM in {precision}"
    for precision, tensors in deviations.items():
        if not learned and set(tensors) - {"G_LM"}:
            return f"measures.deviations.{precision}: a constant G_LM has no other deduced tensors"
        if wrong := unlike_details(tensors, f"measures.deviations.{precision}"):
            return wrong
    return (
        _present(certificate, learned=learned)
        or _summaries(certificate)
        or _every_input(measures)
        or untrained(certificate["controls"], learned=learned)
        or _prompts(certificate)
        or _smaller_weights(certificate)
        or key_rank.inconsistent(certificate)
    )


def unlike_details(tensors: Tree, where: str) -> str | None:
    """The first tensor whose `max` does not match its kinds, or its heads."""
    for name, found in tensors.items():
        if found["max"] != largest(found["by_kind"].values()) or found["max"] != largest(_flat(found["per_head"])):
            return f"{where}.{name}.max is not the largest of its kinds and heads"
    return None


def untrained(controls: Tree, *, learned: bool) -> str | None:
    """What is wrong with the untrained control."""
    control = controls.get("untrained")
    if learned is not bool(control):
        return "controls.untrained: missing" if learned else "controls.untrained: a constant G_LM has none"
    if not control:
        return None
    if control["relative_deviation_g"] != control["deviations"].get("G_LM", {}).get("max"):
        return "controls.untrained.relative_deviation_g does not match its G_LM"
    return unlike_details(control["deviations"], "controls.untrained.deviations")


def _present(certificate: Tree, *, learned: bool) -> str | None:
    """What is missing, or there although it cannot have been measured."""
    measures, settings = certificate["measures"], certificate["settings"]
    finite = not measures["not_finite"]
    if bool(measures["row_variance_ratio_A"]) is not learned:
        return "measures.row_variance_ratio_A: missing, or present for a model without A"
    asked = {"proof": settings["prove"], "order_parameter": settings["order_parameter"]}
    expected = dict.fromkeys(MEASURED, finite) | {
        name: finite and learned and asked.get(name, True) for name in DEDUCED
    }
    for name, there in expected.items():
        if bool(measures[name]) is not there:
            if there:
                return f"measures.{name}: missing"
            return f"measures.{name}: measured although " + (
                "something was not finite" if not finite else "it does not apply or was not asked for"
            )
    return None


def _summaries(certificate: Tree) -> str | None:
    """The first summary that is not that of its details."""
    measures, model = certificate["measures"], certificate["model"]
    seen, ids, size = measures["coverage"]["seen"], measures["coverage"]["ids"], model["vocab_size"]
    if not (seen <= ids and size - 1 <= ids <= size):
        return f"measures.coverage: {seen} of {ids} ids do not match a vocabulary of {size}"
    query = measures["query_deviation"]
    if query and (wrong := unlike_details({"query_deviation": query}, "measures")):
        return wrong
    leak = measures["leak"]
    parts = ("last_token", "last_quarter", "short")
    if leak and leak["worst_rms"] != largest(leak[part][rms] for part in parts for rms in ("live_rms", "cached_rms")):
        return "measures.leak.worst_rms is not the largest of the six"
    effects, least = measures["effects"], certificate["thresholds"]["min_attention_effect"]
    if effects:
        by_layer = effects["per_layer"]
        if any(len(values) != model["num_layers"] for values in by_layer.values()):
            return f"measures.effects.per_layer: not of {model['num_layers']} layers"
        alive = [layer for layer, value in enumerate(by_layer["zero"]) if value is not None and value >= least]
        if effects["alive_layers"] != alive:
            return f"measures.effects.alive_layers: {effects['alive_layers']} does not follow from per_layer.zero ({alive})"
        for name in ("zero", "identity", "plain"):
            loss, cached, effect = measures["losses"][name], measures["losses"]["cached"], effects[name]
            known = [value is not None for value in (loss, cached, effect)]
            if (known[0] and known[1]) is not known[2] or (
                known[2]
                and not math.isclose(effect, loss - cached, rel_tol=0, abs_tol=LOSS_ROUND_OFF * (1 + abs(loss)))
            ):
                return f"measures.effects.{name}: {effect} does not follow from the losses"
    return _possible(measures)


def _possible(measures: Tree) -> str | None:
    """The first number that no outputs can have given."""
    for name, found in measures["agreement"].items():
        if found["top1"] is not None and not 0 <= found["top1"] <= 1:
            return f"measures.agreement.{name}.top1: {found['top1']:g} is no share"
        if found["kl"] is not None and found["kl"] < -key_rank.KL_ROUND_OFF:
            return f"measures.agreement.{name}.kl: {found['kl']:g} is less than 0"
    greedy = measures["greedy"]
    if not greedy:
        return None
    for name in ("per_decision", "identical"):
        if greedy[name] is not None and not 0 <= greedy[name] <= 1:
            return f"measures.greedy.{name}: {greedy[name]:g} is no share"
    if min(greedy["num_prompts"], greedy["num_tokens"], greedy["decisions"], greedy["live_checks"]) < 1:
        return "measures.greedy: nothing was generated or checked"
    return None


def _every_input(measures: Tree) -> str | None:
    """Search and proof, each in itself and beside one another."""
    row, proof = measures["worst_row"], measures["proof"]
    if row and row["max"] != largest(_flat(row["per_head"])):
        return "measures.worst_row.max is not the largest of its heads"
    if row and min(row["starts"], row["steps"]) < 1:
        return "measures.worst_row: a search without starts or steps"
    if not proof:
        return None
    bound = proof["bound"]
    if bound != largest(_flat(proof["per_head"])):
        return "measures.proof.bound is not the largest of its heads"
    if row and (wrong := _above_its_bound(row["per_head"], proof["per_head"])):
        return wrong
    if not proof["closed"]:
        return None
    if bound is None or bound < 0:
        return "measures.proof: closed without a bound"
    deviation = measures["relative_deviation_g"]
    if (
        deviation is not None and deviation > 2 * bound + PROMPT_ROUND_OFF
    ):  # both lie within the bound of the cached G_LM
        return f"measures.relative_deviation_g {deviation:g} is more than the proven bound {bound:g} allows"
    return None


def _above_its_bound(found_LH: list[list[float | None]], proven_LH: list[list[float | None]]) -> str | None:
    """The first head in which the search found more than the proof allows; the proof of some heads may not have closed."""
    if [len(heads) for heads in found_LH] != [len(heads) for heads in proven_LH]:
        return "measures.proof.per_head: not the heads of the search"
    for layer, (found, proven) in enumerate(zip(found_LH, proven_LH, strict=True)):
        for head, (value, bound) in enumerate(zip(found, proven, strict=True)):
            if value is not None and bound is not None and value > bound + SEARCH_ROUND_OFF:
                where = f"layer {layer}, head {head}"
                return f"measures.worst_row of {where}, {value:g}, is above the proven bound {bound:g}"
    return None


def _prompts(certificate: Tree) -> str | None:
    """Whether the numbers of prompts fit together, and with what was measured over them."""
    prompts, measures = certificate["prompts"], certificate["measures"]
    if "text" not in prompts["kinds"] or not 2 <= prompts["distinct"] <= prompts["kinds"]["text"][0]:
        return f"prompts: {prompts['distinct']} different ones do not match the number of held-out ones"
    context, coverage = certificate["model"]["context_length"], measures["coverage"]
    for kind in ALWAYS:
        if kind not in prompts["kinds"]:
            return f"prompts.kinds: no {kind}"
    for kind, (count, longest) in prompts["kinds"].items():
        if count < 1 or not 1 <= longest <= context:
            return f"prompts.kinds.{kind}: {count} prompts of up to {longest} tokens; the context has {context}"
    if coverage["seen"] > math.prod(prompts["kinds"]["random"]):
        return f"measures.coverage.seen: {coverage['seen']} ids are more than the random prompts hold"
    documents, deviating = prompts["documents"], prompts["deviating"]
    if documents is not None and not 1 <= documents <= prompts["kinds"]["text"][0]:
        return f"prompts.documents: {documents} of {prompts['kinds']['text'][0]} prompts"
    by_kind = measures["deviations"]["fp32"].get("G_LM", {}).get("by_kind", {})
    if by_kind and by_kind.keys() != prompts["kinds"].keys():
        return f"prompts.kinds: not those that were measured ({', '.join(sorted(by_kind.keys() ^ prompts['kinds'].keys()))})"
    text = [value for kind, value in by_kind.items() if kind == "text" or kind.startswith("text_")]
    most, allowed = largest(text), certificate["thresholds"]["max_relative_deviation_g"]
    too_many = not 0 <= deviating <= prompts["kinds"]["text"][0]
    unseen = most is not None and deviating > 0 and most < allowed * (1 - AS_WRITTEN)
    full = by_kind.get("text")
    hidden = full is not None and deviating == 0 and full > allowed * (1 + AS_WRITTEN)
    if too_many or unseen or hidden:
        return f"prompts.deviating: {deviating} does not match the deviations of text"
    return None


def _smaller_weights(certificate: Tree) -> str | None:
    """Whether packed weights were allowed to cost more than any configuration may, or cost what their losses contradict."""
    section = certificate.get("weight_format")
    if not section:
        return None
    if not 0 <= section["max_loss_difference"] <= MAX_FORMAT_LOSS:
        allowed = section["max_loss_difference"]
        return f"weight_format.max_loss_difference: {allowed:g} nats; at most {MAX_FORMAT_LOSS:g} may be allowed"
    loss, full, difference = (section[key] for key in ("loss", "loss_fp32", "loss_difference"))
    wrong = key_rank.impossible(section) or key_rank.wrong_difference(loss, full, difference, FORMAT_ROUND_OFF)
    return f"weight_format.{wrong}" if wrong else None


def _flat(per_head: Iterable[Iterable[float | None]]) -> list[float | None]:
    return [value for row in per_head for value in row]
