"""Models that are really trained, in seconds, on a language that cannot be predicted without attention; and their validation.

The language: in each sequence a token follows from the one `lag` before it (a fixed permutation), with one lag for the whole
sequence, and one token in ten is drawn at random. Without attention a model learns the frequencies, about 3 nats; with it, it
loses about 1. The metric learner's weight decay gives an invariance budget of about 30.

Shapes: N sequences, T = S+1 tokens, L layers, H heads, K head dim.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.config.post import PostConfig
from pipeline.io.storage import sha256_file
from pipeline.post.extract import extract_g
from pipeline.post.package.bundle import build_bundle
from pipeline.post.validate import validate
from pldr_model.config import ModelConfig
from pldr_model.loss import total_loss
from pldr_model.model import PLDRModel, is_metric_parameter

SIZES = ModelConfig(
    vocab_size=48,
    num_layers=2,
    num_heads=3,
    head_dim=16,
    context_length=48,
    A_dff=16,
    num_reslayerA=8,
    num_denseA=1,
)
POST = PostConfig(prompts=100, fp64_prompts=4, generate_tokens=16, generate_prompts=4)
FIRST_ID = 4  # after padding, unknown, beginning and end
LINEAGE = {"checkpoint": "step-000250", "git_commit": "c0de"}


@dataclass(frozen=True)
class Recipe:
    """Everything that a training depends on. `pieces`: how many ids occur in text, from FIRST_ID on."""

    config: ModelConfig = SIZES
    steps: int = 250
    batch: int = 16
    lr: float = 1e-2
    metric_decay: float = 25.0
    pieces: int = 24
    lags: tuple[int, ...] = (2, 3)
    seed: int = 0

    @property
    def budget(self) -> float:
        """Roughly: the schedule's mean is half of its peak."""
        return self.lr * self.metric_decay * self.steps / 2

    def sized(self, **sizes: Any) -> Recipe:
        """With other values of the model's configuration."""
        return replace(self, config=replace(self.config, **sizes))


BASE = Recipe()


def language(recipe: Recipe, *, count: int, seed: int) -> Tensor:
    """[count, context + 1] ids."""
    chance, length = torch.Generator().manual_seed(seed), recipe.config.context_length + 1
    following = torch.randperm(recipe.pieces, generator=torch.Generator().manual_seed(7))
    x_NT = torch.randint(recipe.pieces, (count, length), generator=chance)
    lag_N = torch.tensor(recipe.lags)[torch.randint(len(recipe.lags), (count,), generator=chance)]
    keeps_NT = torch.rand(count, length, generator=chance) > 0.1
    for t in range(max(recipe.lags), length):
        x_NT[:, t] = torch.where(keeps_NT[:, t], following[x_NT[torch.arange(count), t - lag_N]], x_NT[:, t])
    return x_NT + FIRST_ID


def train(recipe: Recipe) -> PLDRModel:
    """A trained model: AdamW, with a weight decay of its own for the metric learner, warm-up and cosine."""
    torch.manual_seed(recipe.seed)
    model = PLDRModel(recipe.config)
    groups: dict[bool, list[Tensor]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        groups[is_metric_parameter(name)].append(parameter)
    decays = {False: 0.1, True: recipe.metric_decay}
    optimizer = torch.optim.AdamW(
        [{"params": params, "weight_decay": decays[metric]} for metric, params in groups.items()], betas=(0.9, 0.95)
    )
    deduces = any(recipe.config.dag_coefficients)
    for step in range(recipe.steps):
        cosine = 0.03 + 0.97 * (1 + math.cos(math.pi * step / recipe.steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * min(1.0, (step + 1) / 20) * cosine
        ids_NT = language(recipe, count=recipe.batch, seed=1_000_000 + step)
        answer = model(ids_NT[:, :-1], targets=ids_NT[:, 1:], padded=False, return_outputs=deduces)
        tokens, outputs = answer if deduces else (answer, None)
        optimizer.zero_grad()
        total_loss(tokens, recipe.config, outputs=outputs).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@dataclass(frozen=True)
class Lab:
    """Trains each recipe once, and validates and packages with few and short prompts. `folder`: for what it makes."""

    folder: Path
    tokenizer: Path

    def trained(self, recipe: Recipe = BASE) -> PLDRModel:
        """A copy of the recipe's model, the caller's to change."""
        path = self.folder / f"{hashlib.sha256(repr(recipe).encode()).hexdigest()[:16]}.safetensors"
        if not path.exists():
            save_file(train(recipe).state_dict(), path)
        model = PLDRModel(recipe.config)
        model.load_state_dict(load_file(path))
        return model.eval()

    def g_lm(self, model: PLDRModel, recipe: Recipe = BASE) -> Tensor:
        """G_LM as the extract stage takes it: the mean over text that does not judge it."""
        return extract_g(model, language(recipe, count=50, seed=1)[:, :-1], "mean").g_lm

    def certify(
        self,
        model: PLDRModel,
        recipe: Recipe = BASE,
        *,
        g_lm: Tensor | None = None,
        text_NT: Tensor | None = None,
        post: PostConfig = POST,
        **options: Any,
    ) -> dict[str, Any]:
        """The model's certificate, over 100 prompts of the recipe's language unless `text_NT` has others."""
        g_lm = self.g_lm(model, recipe) if g_lm is None else g_lm
        if text_NT is None:
            text_NT = language(recipe, count=post.prompts, seed=2)
            options = {"documents": post.prompts} | options
        lineage = {**LINEAGE, "tokenizer_sha256": sha256_file(self.tokenizer)}
        return validate(model, g_lm, text_NT, post, lineage=lineage, budget=recipe.budget, seed=recipe.seed, **options)

    def certificate(self, recipe: Recipe = BASE) -> dict[str, Any]:
        """Of the recipe's model as it was trained."""
        return _certificate(self, recipe)

    def bundle(self, model: PLDRModel, certificate: dict[str, Any], name: str, **options: Any) -> Path:
        """A bundle of the model with this certificate."""
        path = self.folder / name
        lineage = {**LINEAGE, "tokenizer_sha256": sha256_file(self.tokenizer)}
        arguments = {"certificate": certificate, "tokenizer": self.tokenizer, "lineage": lineage, **options}
        build_bundle(model, self.g_lm(model), out=path, **arguments)
        return path


@cache
def _certificate(lab: Lab, recipe: Recipe) -> dict[str, Any]:
    return lab.certify(lab.trained(recipe), recipe)
