"""configs/ablations/: one difference each, and the SDPA twin sees the same tokens in the same order."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipeline.config.load import load_config
from pipeline.config.paths import RunPaths
from pipeline.config.plan import plan
from pipeline.data.loading.loader import TrainLoader
from pipeline.data.loading.reader import open_split
from pipeline.data.tokens.index import TokenIndex
from pipeline.stages.runner import Pipeline
from pldr_model.model import PLDRModel

FOLDER = Path(__file__).resolve().parents[3] / "configs" / "ablations"
VARIANTS = {
    "learned": {"g_source": "learned"},
    "near_identity": {"g_source": "learned", "g_start": "identity"},
    "constant": {"g_source": "constant"},
    "random": {"g_source": "random"},
    "transferred": {"g_source": "file"},
    "sdpa": {"g_source": "identity"},
}


@pytest.fixture
def load(tmp_path):
    def load(name, *overrides):
        g_file = tmp_path / "g.safetensors"
        save_file({"g_lm": torch.zeros(2, 4, 16, 16)}, g_file)
        extra = [f"model.g_file={g_file}"] if name == "transferred" else []
        return load_config(FOLDER / f"{name}.yaml", [*extra, *overrides])

    return load


def test_every_variant_is_there_and_differs_from_its_twin_in_the_source_of_g_alone(load):
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*VARIANTS, "base"}
    twin = load("sdpa").as_dict()
    for name, variant in VARIANTS.items():
        config = load(name)
        tree = config.as_dict()
        assert tree["name"] == f"ablation-{name.replace('_', '-')}" and tree["run_dir"] == f"runs/ablations/{name}"
        differ = {key for key in tree["model"] if tree["model"][key] != twin["model"][key]}
        assert differ <= {"g_source", "g_start", "g_file"}
        assert all(tree["model"][key] == value for key, value in variant.items())
        for key in ("name", "run_dir", "model"):
            tree.pop(key)
        assert tree["post"].pop("twin") == (None if name == "sdpa" else twin["run_dir"])
        same = {key: value for key, value in load("sdpa").as_dict().items() if key in tree}
        same["post"].pop("twin")
        assert tree == same
        assert tree["train"]["deepspeed"]["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_the_base_but_for_the_keys_that_it_names(load, name):
    base = load("base").flat()
    ours = load(name).flat()
    assert ours.keys() == base.keys()
    differ = {key for key in ours if ours[key] != base[key]}
    named = {f"model.{key}" for key, value in VARIANTS[name].items() if (key, value) != ("g_source", "learned")}
    named |= {"name", "run_dir"} | (set() if name == "sdpa" else {"post.twin"})
    assert differ == named | ({"model.g_file"} if name == "transferred" else set())
    assert "extends: base.yaml" in (FOLDER / f"{name}.yaml").read_text()


def test_plan_counts_each_variant_exactly(load):
    for name in VARIANTS:
        config = load(name)
        report = plan(config)
        assert report["parameters"] == sum(p.numel() for p in PLDRModel(config.model).parameters())
        learned = config.model.g_source == "learned"
        assert (report["invariance_budget"] is not None) is learned
        assert learned or report["invariance_verdict"] == "G_LM is constant by construction"


@pytest.mark.slow
def test_the_twin_trains_on_the_same_sequences_in_the_same_order(load, tmp_path):
    """The data stages of two variants, each in a directory of its own: equal fingerprints, equal ids of the first batches."""
    with open(tmp_path / "corpus.jsonl", "w") as stream:
        for number in range(60):
            rng = random.Random(number)
            words = ["".join(rng.choices("abcdefghijklm", k=rng.randint(2, 6))) for _ in range(300)]
            stream.write(json.dumps({"text": " ".join(words)}) + "\n")
    seen = []
    for name in ("constant", "sdpa"):
        config = load(
            name,
            f"run_dir={tmp_path / name}",
            f"data.sources=[{{url: {tmp_path}/corpus.jsonl}}]",
            "model.vocab_size=320",
            "model.context_length=32",
        )
        pipeline = Pipeline(config, launch=lambda *_: None, report=lambda text: None)
        for stage in ("shard", "tokenizer", "tokenize"):
            pipeline.stage(stage)
        index = TokenIndex.load(RunPaths(config.run_dir).tokens)
        train = config.train
        reader = open_split(index, "train", cache_gigabytes=config.data.cache_gigabytes)
        loader = TrainLoader(
            reader,
            seed=config.seed,
            global_batch=train.global_batch,
            micro_batch=train.micro_batch,
            rank=0,
            world_size=1,
        )
        batches = [np.concatenate(micro) for micro, _ in loader.micro_batches(0, limit=3)]
        seen.append((index.fingerprint, index.tokenizer_sha256, np.stack(batches)))
    (fingerprint, tokenizer, ours), (other_fingerprint, other_tokenizer, theirs) = seen
    assert fingerprint == other_fingerprint and tokenizer == other_tokenizer
    assert ours.shape == (3, 4, 33) and np.array_equal(ours, theirs)
