"""The model card: README.md of an export. The front matter is what the Hugging Face hub reads; only what is known is in it."""

from __future__ import annotations

from typing import Any

from pipeline.bundle.formats import describe_format
from pldr_model.config import ModelConfig

FRONT = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- pldr-llm
- custom_code
---
"""
LIVE = (
    "LIVE: G_LM is deduced by the metric learner, from all tokens of a full pass, and a prompt's is kept for decoding"
)


def export_card(manifest: dict[str, Any], config: ModelConfig, certificate: dict[str, Any] | None) -> str:
    """Markdown: what it is, whether it is certified, use, self-check, origin."""
    from pipeline.inference.hf.export import summary

    sizes = (
        f"{config.num_layers} layers x {config.num_heads} heads x {config.head_dim}, width {config.d_model}, vocabulary "
        f"{config.vocab_size}, context {config.context_length} tokens; weights {manifest['dtype']}"
    )
    statement = f"{certificate['statement']}." if certificate else "There is no certificate for these weights."
    if certificate and (manifest["live"] or manifest["rounded"]):
        statement = (
            f"The certificate is about the fp32 weights with a cached G_LM, and not about this directory: {statement}"
        )
    parts = [
        FRONT,
        title(manifest),
        "",
        _about(manifest),
        "",
        statement,
        "",
        f"- Model: {sizes}.",
        *_packed(manifest),
        *_low_rank(manifest, config),
        f"- Made from: {manifest['source']} `{manifest['name']}`, sha256 {manifest['bundle_sha256']}.",
        "- Prompts are encoded without bos, which was never trained. Evaluators that need a first token take eos.",
        "- The generated text is unfiltered, and no better than the training data.",
        "",
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)',
        'model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)',
        'inputs = tokenizer("To be", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))",
        "```",
        "",
        *_vllm(manifest),
        "## Self-check",
        "",
        "Made when this directory was written: stock transformers, in a fresh process and with this directory's own code, "
        "against the model that it was exported from.",
        "",
        *(f"- {line}" for line in summary(manifest)),
        f"- versions: {', '.join(f'{k} {v}' for k, v in manifest['selfcheck']['versions'].items())}",
        "",
        "All measures of the certificate: `certificate.json`. Files and their sha256: `MANIFEST.json`.",
    ]
    return "\n".join(parts) + "\n"


def title(manifest: dict[str, Any]) -> str:
    """The first line of the text: certified, or why not."""
    why = manifest["uncertified"]
    return f"# {manifest['name']}: PLDR-LLM, {f'UNCERTIFIED: {why}' if why else 'certified: G_LM may be cached'}"


def _about(manifest: dict[str, Any]) -> str:
    if manifest["live"]:
        return f"Power-law decoder language model (arXiv 2410.16703). {LIVE}. It needs attention `sdpa` or `eager`, not vLLM."
    return (
        "Power-law decoder language model with a constant energy-curvature tensor G_LM (PLDR-LLM v510Gi, arXiv 2502.13502): "
        "a decoder whose attention scores are (q G_LM) k^T / sqrt(K), so that decoding needs only a KV-cache."
    )


def _low_rank(manifest: dict[str, Any], config: ModelConfig) -> list[str]:
    if manifest["key_ranks"] is None:
        return []
    ranks, K = manifest["key_ranks"], config.head_dim
    share, sizes = (sum(ranks) / len(ranks) + K) / (2 * K), ", ".join(map(str, ranks))
    return [
        f"- Low-rank keys: with attention `sdpa` or `eager` the cache holds {sizes} of {K} numbers of a key "
        f"(by layer), keys and values {share:.2f} of the full ones. Elsewhere (vLLM, `generate_batch`) it is full."
    ]


def _packed(manifest: dict[str, Any]) -> list[str]:
    """What smaller weights are, and what is known of their cost."""
    lines = []
    if manifest["dtype"] == "int8":
        ratio = manifest["bytes"] / manifest["bytes_fp32"]
        lines.append(
            f"- int8 weights stay packed in memory: {manifest['bytes']:,} bytes, {ratio:.2f} of fp32. Loading them needs "
            "`pip install torchao`."
        )
    if section := manifest["weight_format"]:
        same = section["format"] == manifest["dtype"] or manifest["dtype"] == "fp32"
        about = "these very values" if same else "the bundle's weights, which are rounded once more here"
        lines.append(f"- Measured when the bundle was made, of {about}: {describe_format(section)}.")
    return lines


def _vllm(manifest: dict[str, Any]) -> list[str]:
    if manifest["live"]:
        return []
    if manifest["transformers_only"]:
        return [f"Not for vLLM: {manifest['transformers_only']}.", ""]
    dtype = "float32" if manifest["dtype"] in ("fp32", "int8") else "auto"
    return [
        "```sh",
        f"vllm serve PATH --trust-remote-code --model-impl transformers --dtype {dtype}",
        "```",
        "",
    ]
