"""A run small enough for a test and real in every part: it trains in seconds and its certificate passes."""

import json
import random
from pathlib import Path

import pytest
import yaml


def write_corpus(path: Path, *, seed: int = 0, documents: int = 60) -> None:
    """Lines `a b a b.`: attention pays at once, so that a certificate can pass after a few hundred steps."""
    rng = random.Random(seed)
    words = ["".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 5))) for _ in range(120)]
    with open(path, "w", encoding="utf-8") as stream:
        for _ in range(documents):
            pairs = [" ".join(rng.choice(words) for _ in range(2)) for _ in range(120)]
            stream.write(json.dumps({"text": "\n".join(f"{pair} {pair}." for pair in pairs)}) + "\n")


def tiny_run(folder: Path, **train) -> Path:
    """A YAML in `folder`, with its corpus; returns its path."""
    write_corpus(folder / "corpus.jsonl")
    tree = {
        "name": "tiny",
        "run_dir": str(folder / "run"),
        "data": {
            # Relative: a document's name, and with it the data order, must not depend on where pytest keeps its folders.
            "sources": [{"url": "corpus.jsonl"}],
            "val_fraction": 0.2,
            "test_fraction": 0.1,
        },
        "tokens": {"block_sequences": 16},
        "model": {
            "vocab_size": 420, "context_length": 48, "num_layers": 2, "num_heads": 2, "head_dim": 16, "A_dff": 16,
        },
        "train": {
            "steps": 500, "global_batch": 8, "micro_batch": 4, "ranks": 2, "max_lr": 2e-3, "warmup_steps": 40,
            "metric_weight_decay": 40.0, "clip_by": "norm", "precision": "fp32", "zero_stage": 1, "log_every": 10,
            "validate_every": 250, "val_sequences": 16, "checkpoint_every": 100, **train,
        },
        "post": {
            "prompts": 8, "min_prompts": 8, "fp64_prompts": 2, "generate_tokens": 16, "generate_prompts": 4,
            "sample_prompt": "ab",
        },
    }  # fmt: skip
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="session")
def make_run():
    """`make_run(folder, **train)`: the YAML of a tiny run."""
    return tiny_run
