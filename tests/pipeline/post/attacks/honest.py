"""Models whose G_LM is invariant and whose attention is alive. Each must be certified.

All are trained; some are then changed in ways that leave them what they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from pldr_model.model import to_constant_g
from tests.pipeline.post.attacks.surgery import cancel
from tests.pipeline.post.attacks.trained import BASE, POST, Lab, Recipe, language
from tests.pipeline.post.attacks.verdicts import Cases, Certified

HONEST = Cases()
ONE_LAYER = replace(BASE, lags=(2,)).sized(num_layers=1)
MANY_IDS = BASE.sized(vocab_size=1024)
LARGE_HEADS = {"num_heads": 2, "head_dim": 32, "num_layers": 1}


def _as_trained(lab: Lab, recipe: Recipe) -> dict[str, Any]:
    return lab.certify(lab.trained(recipe), recipe)


@HONEST.add(Certified())
def as_trained(lab: Lab) -> dict[str, Any]:
    """2 layers, 3 heads, K 16, 24 pieces, context 48."""
    return lab.certificate()


@HONEST.add(Certified())
def another_seed(lab: Lab) -> dict[str, Any]:
    """The same from other initial weights."""
    return _as_trained(lab, replace(BASE, seed=1))


@HONEST.add(Certified())
def a_third_seed(lab: Lab) -> dict[str, Any]:
    """The same from other initial weights."""
    return _as_trained(lab, replace(BASE, seed=2))


@HONEST.add(Certified())
def one_layer(lab: Lab) -> dict[str, Any]:
    """1 layer."""
    return _as_trained(lab, ONE_LAYER)


@HONEST.add(Certified())
def three_layers(lab: Lab) -> dict[str, Any]:
    """3 layers of K 8."""
    return _as_trained(lab, BASE.sized(num_layers=3, head_dim=8))


@HONEST.add(Certified())
def small_heads(lab: Lab) -> dict[str, Any]:
    """4 heads of K 8."""
    return _as_trained(lab, BASE.sized(num_heads=4, head_dim=8))


@HONEST.add(Certified())
def large_heads(lab: Lab) -> dict[str, Any]:
    """K 32."""
    recipe = replace(BASE, lr=5e-3, metric_decay=80.0, lags=(2,))
    return _as_trained(lab, recipe.sized(**LARGE_HEADS))


@HONEST.add(Certified())
def heads_as_in_the_papers(lab: Lab) -> dict[str, Any]:
    """1 head of K 64, as large as in the papers."""
    recipe = replace(BASE, lr=3e-3, metric_decay=150.0, lags=(2,), steps=300)
    return _as_trained(lab, recipe.sized(num_layers=1, num_heads=1, head_dim=64, context_length=32))


@HONEST.add(Certified())
def units_as_in_the_papers(lab: Lab) -> dict[str, Any]:
    """8 residual units of 2 GLUs."""
    return _as_trained(lab, ONE_LAYER.sized(num_denseA=2))


@HONEST.add(Certified())
def rotary_halves(lab: Lab) -> dict[str, Any]:
    """rope_style half, as in v52."""
    return _as_trained(lab, replace(BASE, metric_decay=30.0).sized(rope_style="half"))


@HONEST.add(Certified())
def start_at_the_identity(lab: Lab) -> dict[str, Any]:
    """g_start identity, 1 head: G_LM moves away from where it starts."""
    return _as_trained(lab, replace(BASE, lr=2e-2, metric_decay=12.0).sized(g_start="identity", num_heads=1))


@HONEST.add(Certified())
def trained_constant(lab: Lab) -> dict[str, Any]:
    """g_source constant: G is a parameter."""
    return _as_trained(lab, BASE.sized(g_source="constant"))


@HONEST.add(Certified())
def frozen(lab: Lab) -> dict[str, Any]:
    """A trained model whose G was frozen: no metric learner any more."""
    model = lab.trained()
    g_lm = lab.g_lm(model)
    return lab.certify(to_constant_g(model, g_lm), g_lm=g_lm)


@HONEST.add(Certified())
def near_dead_head(lab: Lab) -> dict[str, Any]:
    """One head of the last layer writes a thousandth of what it wrote."""
    model, K = lab.trained(), BASE.config.head_dim
    with torch.no_grad():
        model.layers[1].attention.output.weight[:, :K] *= 1e-3
    return lab.certify(model)


@HONEST.add(Certified())
def terms_that_cancel(lab: Lab) -> dict[str, Any]:
    """In one head a A_P and b_a cancel 500-fold: fp32 makes noise of 1e-5 of what is constant."""
    model = lab.trained()
    cancel(model, 1, 0, language(BASE, count=1, seed=1)[:, :-1], times=500.0)
    return lab.certify(model)


@HONEST.add(Certified())
def weights_rounded_to_bf16(lab: Lab) -> dict[str, Any]:
    """Every weight rounded to bf16 and kept in fp32."""
    model = lab.trained()
    return lab.certify(model.bfloat16().float())


@HONEST.add(Certified())
def long_context(lab: Lab) -> dict[str, Any]:
    """Context 128."""
    recipe = replace(BASE, batch=6, metric_decay=35.0).sized(context_length=128, num_heads=2)
    return _as_trained(lab, recipe)


@HONEST.add(Certified())
def many_ids(lab: Lab) -> dict[str, Any]:
    """A vocabulary of 1024, of which text has 24."""
    return _as_trained(lab, MANY_IDS)


@HONEST.add(Certified())
def odd_sizes(lab: Lab) -> dict[str, Any]:
    """61 ids, 3 heads of K 10, context 37."""
    return _as_trained(lab, BASE.sized(vocab_size=61, head_dim=10, context_length=37))


@HONEST.add(Certified(("from 2 documents",)))
def few_documents(lab: Lab) -> dict[str, Any]:
    """All prompts are from two documents; the statement says it."""
    return lab.certify(lab.trained(), text_NT=language(BASE, count=POST.prompts, seed=2), documents=2)


@HONEST.add(Certified(("up to 24 of 48 tokens",)))
def short_prompts(lab: Lab) -> dict[str, Any]:
    """Prompts of half a context; the statement says it."""
    text_NT = language(BASE, count=POST.prompts, seed=2)[:, :25]
    return lab.certify(lab.trained(), text_NT=text_NT, documents=POST.prompts)
