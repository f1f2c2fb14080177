"""The page's parts on what was tried: the prompts by kind, every row there is (search and proof), and each layer's effect.

Certificates before schema 5 have fewer of these measures; what one does not have is not shown.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.bundle.certificate.consistency import largest
from pipeline.bundle.certificate.statement import rounded_up, sampled
from pipeline.post.certificate.grids import Tree, grid, worst
from pipeline.report.numbers import number


def kinds(certificate: Tree) -> list[Tree]:
    """A row for each kind of prompts: how many, how long, and the deviation of G_LM over them. What the queries were measured
    over besides, such as rows that a search found, has no number."""
    measures = certificate["measures"]
    found = {name: tensors.get("G_LM", {}) for name, tensors in measures["deviations"].items()}
    query = (measures.get("query_deviation") or {}).get("by_kind", {})
    sizes: dict[str, Sequence[int | None]] = {**dict.fromkeys(query, (None, None)), **certificate["prompts"]["kinds"]}
    return [
        {"name": kind, "count": sizes[kind][0], "length": sizes[kind][1], "query": query.get(kind)}
        | {precision: of.get("by_kind", {}).get(kind) for precision, of in found.items()}
        | {f"rms_{precision}": of.get("rms_deviation_by_kind", {}).get(kind) for precision, of in found.items()}
        for kind in dict.fromkeys((*certificate["prompts"]["kinds"], *sizes))
    ]


def sample(certificate: Tree) -> list[str]:
    """What the prompts are a sample of, in sentences."""
    if "coverage" not in certificate["measures"]:
        return []
    coverage, context = certificate["measures"]["coverage"], certificate["model"]["context_length"]
    longest = max(length for _, length in certificate["prompts"]["kinds"].values())
    return [
        *([found] if not certificate["constant_by_construction"] and (found := sampled(certificate)) else []),
        f"The prompts hold {coverage['seen']:,} of the {coverage['ids']:,} ids of the vocabulary, and up to {longest:,} of "
        f"{context:,} tokens",
    ]


def every_row(certificate: Tree) -> Tree | None:
    """Search and proof over every row that a metric learner may be given; None where there is neither."""
    measures, allowed = certificate["measures"], certificate["thresholds"].get("max_worst_row_deviation")
    row, proof = measures.get("worst_row"), measures.get("proof")
    if not row:
        return None
    grids = [grid("Found by search", row["per_head"], worst(row), allowed=allowed)]
    if proof:
        bound = "not bounded" if proof["bound"] is None else f"at most {number(rounded_up(proof['bound']))}"
        per_head = [[None if x is None else rounded_up(x) for x in row] for row in proof["per_head"]]
        grids.append(grid("Proven bound", per_head, bound))
    return {
        "row": row,
        "proof": proof,
        "allowed": allowed,
        "units": list(range(1, 1 + max((len(units) for units in proof["by_unit"]), default=0))) if proof else [],
        "layers": [
            {
                "layer": layer,
                "found": largest(found),
                "units": proof["by_unit"][layer] if proof else [],
                "bound": largest(proof["per_head"][layer]) if proof else None,
                "score": proof["score_bound"][layer] if proof else None,
            }
            for layer, found in enumerate(row["per_head"])
        ],
        "grids": grids,
    }


def layers(certificate: Tree) -> list[Tree]:
    """What G_LM is worth in each layer alone."""
    effects = certificate["measures"].get("effects")
    if not effects:
        return []
    by_layer = effects["per_layer"]
    return [
        {"layer": layer, "alive": layer in effects["alive_layers"]} | {name: by_layer[name][layer] for name in by_layer}
        for layer in range(len(by_layer["zero"]))
    ]
