"""The model card: README.md of a bundle. For people; everything in it is in the JSON files too.

Decision: the first line of an uncertified bundle's card marks it as such, and a loader checks that line. How the model was
trained, and what to compare its loss with, is passed in as `notes` by the caller, who knows the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.bundle.format import UNCERTIFIED_LINE
from pipeline.post.certificate.build import summary_lines
from pldr_model.config import ModelConfig

CERTIFIED_LINE = "# PLDR-LLM bundle, certified: G_LM may be cached"
CONSTANT_LINE = "# PLDR-LLM bundle, certified: G_LM is constant by construction, so caching it is exact"

# What the model is, by the source of its G_LM. Only a deduced G_LM can be *measured* to be invariant.
ABOUT = {
    "learned": "Power-law decoder language model (PLDR-LLM v510Gi, arXiv 2502.13502): the metric learner is removed, its "
    "energy-curvature tensor G_LM is the constant in `g_lm.safetensors`, and decoding needs only a KV-cache.",
    "constant": "PLDR-LLM whose G_LM is a trained parameter of each head, without a metric learner. It is invariant by "
    "construction. This was not measured, and implies nothing about models with a metric learner.",
    "identity": "Plain attention (SDPA): a PLDR-LLM whose G_LM is the identity, by construction.",
}
FIXED = "PLDR-LLM (v510G) whose G_LM is a fixed tensor: constant by construction, not by measurement."


def model_card(
    certificate: dict[str, Any],
    config: ModelConfig,
    *,
    certified: bool,
    weight_format: str = "fp32",
    lineage: dict[str, Any],
    notes: Sequence[str],
) -> str:
    """Markdown: verdict, sizes, usage, checks, origin."""
    sizes = (
        f"{config.num_layers} layers x {config.num_heads} heads x {config.head_dim}, width {config.d_model}, "
        f"vocabulary {config.vocab_size}, context {config.context_length} tokens, "
        f"{config.num_parameters()['total']:,} parameters without G_LM"
    )
    certified_line = CONSTANT_LINE if certificate["constant_by_construction"] else CERTIFIED_LINE
    parts = [
        certified_line if certified else UNCERTIFIED_LINE,
        "",
        certificate["statement"] + ".",
        "",
        ABOUT.get(certificate["model"]["g_source"], FIXED),
        "",
        f"- Model: {sizes}; weights {weight_format}.",
        *(f"- {note}" for note in notes),
        "",
        "## Use",
        "",
        "```python",
        "from pldr import load",
        'load("PATH").generate(["The "], max_new_tokens=64)',
        "```",
        "",
        "Prompts are encoded without bos: training joined documents by eos alone. A prompt and its continuation share the",
        "context; a longer prompt is an error. The generated text is unfiltered, and no better than the training data.",
        "",
        "## Certificate",
        "",
        "Measures, thresholds and their reasons: docs/certificate.md of the project. All numbers: `certificate.json`.",
        "",
        "```",
        *summary_lines(certificate),
        "```",
        "",
        "## Lineage",
        "",
        *(f"- {key}: {value}" for key, value in sorted(lineage.items())),
    ]
    return "\n".join(parts).rstrip() + "\n"
