"""A tiny model whose held-out text is sampled from itself: its own G_LM is then the best one by construction, so that a
validator has something true to find without any training."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sentencepiece
import torch
import yaml

from pipeline.bundle.extracted import save_g
from pipeline.bundle.weights import save_weights
from pipeline.config.post import PostConfig
from pipeline.io.storage import render_json, sha256_file
from pipeline.post.extract import extract_g
from pipeline.post.package.bundle import build_bundle
from pipeline.post.validate import validate
from pldr_model.config import ModelConfig
from pldr_model.generation import generate
from pldr_model.model import PLDRModel

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
torch.set_num_threads(1)

CONFIG = ModelConfig(
    vocab_size=48,
    num_layers=2,
    num_heads=2,
    head_dim=8,
    context_length=32,
    A_dff=8,
    num_reslayerA=2,
    num_denseA=1,
)
POST = PostConfig(prompts=16, min_prompts=16, fp64_prompts=4, generate_tokens=12, generate_prompts=4)
LINEAGE = {"checkpoint": "step-000007", "data_fingerprint": "f00d", "step": 7, "git_commit": "c0de"}
TEXT = (
    "the quick brown fox jumps over the lazy dog and the lazy dog sleeps. pack my box with five dozen jugs of wine. "
    "how vexingly quick daft zebras jump! sphinx of black quartz, judge my vow. the end of the line is near, said she.\n"
)


def make_model(*, gain: float = 0.0, seed: int = 0, config: ModelConfig = CONFIG) -> PLDRModel:
    """`gain` is that of the metric learner's last norm: at 0 A is its bias, constant; at 1 A depends on the input."""
    torch.manual_seed(seed)
    model = PLDRModel(config).eval()
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.output.weight.mul_(3)
            if layer.attention.plga is not None:
                norm = layer.attention.plga.metric_learner[-1].norm
                norm.weight.fill_(gain)
                norm.bias.normal_()
                layer.attention.plga.b_a.normal_()
        model.output.weight.mul_(3)
        model.output.bias[config.pad_id] = -30.0  # padding is never sampled
    return model


def sample_text(model: PLDRModel, *, count: int = 24, seed: int = 0) -> torch.Tensor:
    """[count, context_length] ids drawn from the model itself, live G at every token."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(4, model.config.vocab_size, (count, 1), generator=generator).tolist()
    new = generate(
        model,
        first,
        max_new_tokens=model.config.context_length - 1,
        temperature=1.0,
        use_cache=False,
        seed=seed,
    )
    return torch.tensor([a + b for a, b in zip(first, new, strict=True)])


def certify(model: PLDRModel, text: torch.Tensor, *, post: PostConfig = POST, **kwargs: Any) -> dict[str, Any]:
    """Extract and validate."""
    return validate(model, extract_g(model, text[:, :-1], "mean").g_lm, text, post, **kwargs)


def failed(certificate: dict[str, Any]) -> set[str]:
    """The names of the checks that failed."""
    return {failure["measure"] for failure in certificate["failed"]}


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """The functions and constants above, for tests that do not import them."""
    helpers = {"make_model": make_model, "sample_text": sample_text, "certify": certify}
    return SimpleNamespace(config=CONFIG, post=POST, lineage=LINEAGE, **helpers)


@pytest.fixture(scope="session")
def invariant() -> PLDRModel:
    return make_model()


@pytest.fixture(scope="session")
def text(invariant: PLDRModel) -> torch.Tensor:
    return sample_text(invariant)


@pytest.fixture(scope="session")
def certificate(invariant: PLDRModel, text: torch.Tensor) -> dict[str, Any]:
    return certify(invariant, text, lineage=LINEAGE, budget=9.5)


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"), vocab_size=CONFIG.vocab_size)


@pytest.fixture(scope="session")
def larger_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Has 8 pieces more than the model has rows."""
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"), vocab_size=CONFIG.vocab_size + 8)


def train_tokenizer(folder: Path, *, vocab_size: int) -> Path:
    (folder / "text.txt").write_text(TEXT * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture
def make_bundle(
    invariant: PLDRModel, text: torch.Tensor, certificate: dict[str, Any], tokenizer_path: Path, tmp_path: Path
) -> Callable[..., Path]:
    def make(name: str = "bundle", **changes: Any) -> Path:
        arguments = {
            "certificate": certificate,
            "tokenizer": tokenizer_path,
            "out": tmp_path / name,
            "lineage": {**LINEAGE, "tokenizer_sha256": sha256_file(tokenizer_path)},
            **changes,
        }
        model = arguments.pop("model", invariant)
        build_bundle(model, extract_g(model, text[:, :-1], "mean").g_lm, **arguments)
        return tmp_path / name

    return make


@pytest.fixture
def make_finished(
    invariant: PLDRModel, text: torch.Tensor, certificate: dict[str, Any], tokenizer_path: Path, tmp_path: Path
) -> Callable[..., Path]:
    """The YAML of a run of this model (the invariant one): weights/, g_lm/, certificate/, tokenizer/."""

    def make(model: PLDRModel = invariant, **source: Any) -> Path:
        run = tmp_path / "finished"
        tree = {
            "name": "finished",
            "run_dir": str(run),
            "data": {"sources": [{"url": "none.jsonl"}]},
            "model": {key: value for key, value in model.config.to_dict().items() if value is not None},
        }
        save_weights(model.state_dict(), model.config, run / "weights", source=source)
        save_g(extract_g(model, text[:, :-1], "mean"), run / "g_lm")
        (run / "certificate").mkdir(parents=True)
        (run / "certificate" / "certificate.json").write_bytes(render_json(certificate))
        (run / "tokenizer").mkdir()
        (run / "tokenizer" / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
        path = tmp_path / "finished.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return make
