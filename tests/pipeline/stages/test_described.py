"""The sentence and the data sets that MLflow's page of a run shows."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from pipeline.config.load import parse_config
from pipeline.stages.described import data_sets, sentence

TREE = {
    "name": "t",
    "run_dir": "runs/t",
    "data": {"sources": ["http://host/x.txt?token=1", "y"]},
    "model": {"vocab_size": 300, "num_layers": 1, "num_heads": 2, "head_dim": 4, "context_length": 8},
    "train": {"steps": 10, "global_batch": 4, "warmup_steps": 0},
}
CONFIG = parse_config(TREE, where="test")
FAILED = [{"measure": "leak_gap"}, {"measure": "kl"}]


@pytest.mark.parametrize(
    ("certificate", "end"),
    [
        (None, ", 320 tokens planned: no verdict yet."),
        (
            {"verdict": "certified", "tier": "invariant", "failed": [], "lineage": {"tokens_consumed": 1234}},
            ", trained on 1,234 tokens: certified, G_LM is invariant.",
        ),
        (
            {"verdict": "failed", "tier": "variant", "failed": FAILED, "lineage": {}},
            ": not certified, failed leak_gap, kl.",
        ),
    ],
)
def test_a_description_is_a_sentence_on_model_tokens_and_verdict(certificate, end):
    text = sentence(CONFIG, certificate)
    assert (
        text.startswith("PLDR-LLM with a learned G_LM, ") and "(1 layers x 2 heads x 4)" in text and text.endswith(end)
    )


def test_a_description_names_what_g_is_constrained_to():
    model = {**TREE["model"], "g_source": "constant", "g_constraint": "low_rank", "g_rank": 2}
    text = sentence(parse_config({**TREE, "model": model}, where="test"))
    assert text.startswith("PLDR-LLM with a constant G_LM for each head (I + U V^T of rank 2), ")


def test_data_sets_have_fingerprint_counts_and_no_secrets(tmp_path):
    splits = {"train": {"sequences": 9, "tokens": 72, "bytes": 5}, "val": {"sequences": 2, "tokens": 16}, "test": {}}
    index = SimpleNamespace(
        folder=tmp_path / "shakespeare" / "tokens",
        fingerprint="f" * 64,
        dtype="uint16",
        context_length=8,
        splits=splits,
    )
    found = data_sets(CONFIG, index)
    assert {use: one["name"] for use, one in found.items()} == {
        "training": "shakespeare train",
        "validation": "shakespeare val",
    }
    training = found["training"]
    assert training["digest"] == "f" * 36 and training["source_type"] == "local"
    source, profile = json.loads(training["source"]), json.loads(training["profile"])
    assert source == {"uri": str(index.folder), "data.sources": ["http://host/x.txt", "y"]}
    assert (profile["sequences"], profile["tokens"], profile["fingerprint"]) == (9, 72, "f" * 64)
    index.folder = "s3://bucket/data/tokens"
    assert data_sets(CONFIG, index)["training"]["source_type"] == "s3"
