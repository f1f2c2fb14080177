"""Data stages of a run that trains nothing: its corpus, its pipeline, and what it has made."""

import json
import random

import yaml

from pipeline.config.load import load_config
from pipeline.stages.runner import Pipeline


def corpus(path, word, documents=40):
    with open(path, "w") as stream:
        for number in range(documents):
            rng = random.Random(f"{word}{number}")
            words = ["".join(rng.choices("abcdefghijklm", k=rng.randint(2, 6))) for _ in range(200)]
            text = f"{word} " + " ".join(words)
            stream.write(json.dumps({"text": text}) + "\n")


def no_launch(config, job_file, ranks):
    raise AssertionError("nothing here trains")


def data_stages(pipeline, *, replace=False):
    return {name: pipeline.stage(name, replace=replace)["skipped"] for name in ("shard", "tokenizer", "tokenize")}


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def trained(root, step=4):
    """As if a model had been trained there."""
    checkpoint = root / "checkpoints" / f"step-{step:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMMITTED").write_text("x")


def make_in(folder):
    """A function that makes a pipeline of one configuration, with its corpus in this folder, and what the pipeline reports."""
    corpus(folder / "corpus.jsonl", "alpha")
    tree = {
        "name": "t",
        "run_dir": str(folder / "run"),
        "data": {"sources": [{"url": str(folder / "corpus.jsonl")}], "val_fraction": 0.2, "test_fraction": 0.1},
        "model": {"vocab_size": 320, "num_layers": 1, "num_heads": 1, "head_dim": 4, "context_length": 16},
        "train": {"steps": 4, "warmup_steps": 1, "global_batch": 4, "micro_batch": 2, "ranks": 2, "precision": "fp32"},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))

    def make(*overrides, launch=no_launch):
        reported = []
        return Pipeline(load_config(path, list(overrides)), launch=launch, report=reported.append), reported

    return make
