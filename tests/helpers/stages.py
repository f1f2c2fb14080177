"""Data stages of a run that trains nothing: its corpus, its pipeline, and what it has made."""

import json
import random


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
