"""What MLflow's page of a run shows beside its numbers: a sentence about it, and the data sets it is trained and judged on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.batches import planned_sequences
from pipeline.config.run import RunConfig
from pipeline.io.urls import is_local, public_url
from pipeline.tracking.run_record import NOTE_BEGINS
from pldr_model.config import ModelConfig

if TYPE_CHECKING:
    from pipeline.data.tokens.index import TokenIndex

KINDS = {
    "learned": "a learned G_LM",
    "constant": "a constant G_LM for each head",
    "identity": "G_LM = identity (plain attention)",
}
CONSTRAINTS = {  # of a constant G_LM (model.g_constraint)
    "low_rank": "I + U V^T of rank {rank}",
    "rotary": "commuting with RoPE, which is plain attention in another parametrization",
    "nonrotary": "I + what is orthogonal to all that commutes with RoPE",
}
USES = {"training": "train", "validation": "val"}  # MLflow's word -> our split
MAX_DIGEST = 36  # characters, MLflow's limit


def sentence(config: RunConfig, certificate: dict[str, Any] | None = None) -> str:
    """A run's description: model, tokens, verdict. certificate: None before there is one."""
    train, model = config.train, config.model
    if certificate is None:
        planned = planned_sequences(train) * model.context_length
        return f"{NOTE_BEGINS} {_sizes(model)}, {planned:,} tokens planned: no verdict yet."
    trained_on = certificate["lineage"].get("tokens_consumed")  # older checkpoints may not know it
    tokens = "" if trained_on is None else f", trained on {trained_on:,} tokens"
    failed = ", ".join(failure["measure"] for failure in certificate["failed"])
    tier = "proven to be a constant" if certificate["tier"] == "proven" else certificate["tier"]
    verdict = f"not certified, failed {failed}" if failed else f"certified, G_LM is {tier}"
    return f"{NOTE_BEGINS} {_sizes(model)}{tokens}: {verdict}."


def _sizes(model: ModelConfig) -> str:
    kind = KINDS.get(model.g_source, "a fixed G_LM")
    if (constraint := constraint_of(model)) is not None:
        kind += f" ({constraint})"
    return (
        f"with {kind}, {model.num_parameters()['total']:,} parameters ({model.num_layers} layers x {model.num_heads} heads x "
        f"{model.head_dim})"
    )


def constraint_of(model: ModelConfig) -> str | None:
    """What a constant G_LM is kept to, None for any matrix."""
    text = CONSTRAINTS.get(model.g_constraint)
    return None if text is None else text.format(rank=model.g_rank)


def data_sets(config: RunConfig, index: TokenIndex) -> dict[str, dict[str, str]]:
    """MLflow's fields of what a run trains on and is validated with. The digest is the beginning of the data fingerprint: a
    data set of another run is the same one where name and digest are."""
    import numpy as np

    folder = public_url(Path(index.folder).absolute() if is_local(index.folder) else index.folder)
    home = Path(folder)
    stem = home.parent.name if home.name == "tokens" else home.name
    source = {"uri": folder, "data.sources": [public_url(one.url) for one in config.data.sources]}
    spec = {"dtype": np.dtype(index.dtype).name, "shape": [-1, index.context_length + 1]}
    schema = {"features": json.dumps([{"name": "tokens", "type": "tensor", "tensor-spec": spec}]), "targets": None}

    def of_split(split: str) -> dict[str, str]:
        facts = index.splits[split]
        counts = {key: facts[key] for key in ("sequences", "tokens", "documents", "text_bytes") if key in facts}
        return {
            "name": f"{stem} {split}",
            "digest": index.fingerprint[:MAX_DIGEST],
            "source_type": "local" if is_local(folder) else folder.partition("://")[0],
            "source": json.dumps(source),
            "schema": json.dumps({"mlflow_tensorspec": schema}),
            "profile": json.dumps({**counts, "context_length": index.context_length, "fingerprint": index.fingerprint}),
        }

    return {use: of_split(split) for use, split in USES.items() if split in index.splits}
