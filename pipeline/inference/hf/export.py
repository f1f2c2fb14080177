"""`pldr export hf`: a directory that stock transformers, vLLM and lm-eval load, and that certifies itself.

Decision: the directory is written beside its final name, loaded there by stock transformers in a fresh process and compared
with our own model (selfcheck.py), and gets its name only if they agree. What the check found stands in MANIFEST.json and in the
model card. The certificate is about fp32 weights and a cached G_LM, so that an export with rounded weights, or with its metric
learner, is not called certified.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import ConfigError, UserError
from pipeline.inference.hf.card import export_card
from pipeline.inference.hf.expectation import expect
from pipeline.inference.hf.manifest import KIND, SCHEMA_VERSION, is_export, why_uncertified
from pipeline.inference.hf.plugin import require_tested
from pipeline.inference.hf.selfcheck import MAX_DIFFERENCE, check_export
from pipeline.inference.hf.shards import parse_size, write_shards
from pipeline.inference.hf.sizes import hf_config
from pipeline.inference.hf.texts import checked_texts
from pipeline.inference.hf.tokenizer import save_tokenizer
from pipeline.inference.hf.weights import Dtype, Weights, measured_format, weights_of
from pipeline.inference.opened import OpenModel
from pipeline.io.sealed import publish_sealed
from pipeline.io.storage import (
    MANIFEST,
    manifest_of,
    publish_bytes,
    publish_dir,
    publish_json,
    require_free_space,
    require_unsealed,
)

CODE = ("configuration_pldr.py", "layers_pldr.py", "modeling_pldr.py")


def export_hf(
    opened: OpenModel,
    folder: str | Path,
    *,
    dtype: Dtype = "fp32",
    shard_size: str = "5GB",
    live: bool = False,
    pack_output: bool = False,
    texts: Sequence[str] | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Write, check and publish an export; returns its manifest.

    live: with the metric learner: G_LM of a full pass is that of its input, and a prompt's is kept for decoding. pack_output:
    with int8, the output layer too, which vLLM does not read. texts: held-out texts of the run for the tokenizer's check, if
    at hand. Raises UserError, and leaves nothing behind, when what
    stock transformers computes is not what our model computes.
    """
    require_tested()
    target = Path(folder).absolute()
    _require_replaceable(target)
    shard_bytes = parse_size(shard_size)
    model = opened.model
    if live:
        if opened.live is None:
            raise ConfigError(
                f"--live: {opened.path} has no metric learner; name a run whose model.g_source is learned"
            )
        model = opened.live
    measured = measured_format(opened)
    uncertified = why_uncertified(opened, dtype=dtype, live=live, measured=measured)
    weights = weights_of(opened, model, dtype, pack_output=pack_output)
    low_rank = weights.keys.get("key_ranks") is not None
    require_free_space(target.parent, weights.nbytes, "the export")
    with publish_dir(target) as temporary:
        report(f"writing {len(weights.tensors)} tensors, {weights.nbytes:,} bytes")
        _write_model(opened, weights, temporary, dtype=dtype, uncertified=uncertified, shard_bytes=shard_bytes)
        report("self-check: stock transformers in a fresh process against our model")
        passages, passages_from = checked_texts(texts)
        try:
            expected, logits = expect(
                weights.as_model(torch.float32) if dtype != "fp32" or low_rank else model,
                opened.tokenizer,
                seed=opened.sha256,
                texts=passages,
                wide=weights.as_model(torch.float64) if dtype == "int8" or low_rank else None,
            )
        except ValueError as error:  # logits that are not finite
            raise UserError(f"{opened.path}: {error}") from None
        selfcheck = check_export(
            temporary, expected, logits, rounded=dtype in ("bf16", "fp16"), stored_bytes=weights.nbytes
        )
        selfcheck["tokenizer"]["source"] = passages_from
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "bundle_sha256": opened.sha256,
            "source": opened.kind,
            "name": opened.name,
            "certified": uncertified is None,
            "uncertified": uncertified,
            "dtype": dtype,
            "rounded": opened.rounded or dtype != "fp32" or measured is not None,
            "weight_format": measured,
            "bytes": weights.nbytes,
            "bytes_fp32": 4 * sum(tensor.numel() for tensor in model.state_dict().values()),
            "key_ranks": weights.keys.get("key_ranks"),
            "transformers_only": weights.keys.get("transformers_only"),
            "live": live,
            "model": model.config.to_dict(),
            "selfcheck": selfcheck,
        }
        card = export_card(manifest, model.config, opened.certificate)
        publish_bytes(temporary / "README.md", card.encode())
        manifest["files"] = manifest_of(temporary)
        publish_sealed(temporary / MANIFEST, manifest)
    for line in summary(manifest):
        report(line)
    return manifest


def summary(manifest: dict[str, Any]) -> list[str]:
    """What the self-check found, one line each."""
    check = manifest["selfcheck"]
    logits, greedy, tokenizer = check["logits"], check["greedy"], check["tokenizer"]
    rounded = f" (both sides in fp32 with the {manifest['dtype']} weights)" if "native" in check else ""
    ties = "" if greedy["equal"] == greedy["prompts"] else f"; the others differ at a tie, by {greedy['gap']:.2g}"
    lines = [
        f"logits{rounded}: largest difference {logits['difference']:.2g}, in fp64 {check['exact']:.2g}; largest logit "
        f"{logits['largest']:.3g}",
        f"greedy tokens: equal for {greedy['equal']} of {greedy['prompts']} prompts ({greedy['tokens']} tokens){ties}",
        f"tokenizer: {tokenizer['other_ids']} of {tokenizer['texts']} texts get other ids ({tokenizer['source']})",
    ]
    if logits["difference"] > MAX_DIFFERENCE * max(1.0, logits["largest"]):
        lines.append(
            f"fp32 alone changes our own model's logits by up to {check['rounding']:.2g}: it is ill-conditioned"
        )
    if native := check.get("native"):
        lines.append(
            f"computed in {manifest['dtype']}: logits differ by up to {native['difference']:.2g}, and the best token is the "
            f"same at {native['top1']:.4f} of the positions (measured, no promise)"
        )
    return lines


def _require_replaceable(target: Path) -> None:
    """An export replaces an earlier export or an empty folder, and nothing else."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(f"{target}: exists and is no folder; name another one")
    if target.is_dir() and any(target.iterdir()) and not is_export(target):
        raise UserError(f"{target}: holds files that no export wrote; name a new folder, or empty it")
    require_unsealed(target.parent)


def _write_model(
    opened: OpenModel,
    weights: Weights,
    folder: Path,
    *,
    dtype: Dtype,
    uncertified: str | None,
    shard_bytes: int,
) -> None:
    from transformers import GenerationConfig

    config = weights.model
    hf_config(config, uncertified=uncertified, dtype=dtype, more=weights.keys).save_pretrained(folder)
    GenerationConfig(eos_token_id=config.eos_id, pad_token_id=config.pad_id, do_sample=False).save_pretrained(folder)
    write_shards(weights.tensors, folder, shard_bytes=shard_bytes, metadata=weights.metadata)
    for name in CODE:
        shutil.copyfile(str(files("pipeline.inference.hf") / name), folder / name)
    save_tokenizer(opened.tokenizer, folder, context_length=config.context_length)
    if opened.certificate is not None:
        publish_json(folder / "certificate.json", opened.certificate)
