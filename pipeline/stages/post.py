"""The stages after training but `validate`: newest checkpoint -> weights -> G_LM; certificate -> bundle -> registered version.

The work is done in `pipeline.post`; here each step is given its inputs from the run directory and its held-out tokens.
Decision: G_LM is extracted from one half of the held-out sequences and judged on the other, so that no prompt vouches for
itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.checkpoint.format import committed
from pipeline.config.paths import RunPaths, data_paths
from pipeline.config.run import RunConfig
from pipeline.errors import UserError
from pipeline.stages.trained import as_trained, held_out, lineage, notes
from pipeline.stages.validate import CERTIFICATE, require_own_run
from pipeline.tracking.run import run_named

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.bundle.formats import Packed
    from pldr_model.model import PLDRModel


def consolidate_newest(config: RunConfig, paths: RunPaths) -> dict[str, Any]:
    """ZeRO shards of the newest committed checkpoint -> `weights/`."""
    from pipeline.post.consolidate import consolidate

    found = committed(paths.checkpoints)
    if not found:
        raise UserError(f"{paths.checkpoints}: no committed checkpoint; run `pldr train` first")
    source = consolidate(found[-1], paths.weights)
    return {**source, "weights_sha256": source["model_sha256"]}


def extract(config: RunConfig, paths: RunPaths) -> dict[str, Any]:
    """G_LM of the weights over held-out prompts -> `g_lm/`."""
    return extract_into(config, paths, paths)


def extract_into(config: RunConfig, paths: RunPaths, model_paths: RunPaths) -> dict[str, Any]:
    """`extract` for weights that lie elsewhere, and its G_LM beside them."""
    from pipeline.bundle.extracted import save_g
    from pipeline.bundle.weights import load_weights
    from pipeline.devices import has_gpu
    from pipeline.post.extract import extract_g

    model, _ = load_weights(model_paths.weights)
    if has_gpu():
        model.cuda()
    prompts = held_out(config, paths, half=0).sequences_NT[: config.post.prompts, :-1]
    return save_g(extract_g(model, prompts, config.post.g_from), model_paths.g_lm)


def package(config: RunConfig, paths: RunPaths, *, uncertified: bool) -> dict[str, Any]:
    """The bundle folder, registered in MLflow with its lineage."""
    from pipeline.bundle.certificate.schema import read_certificate
    from pipeline.bundle.extracted import load_g
    from pipeline.bundle.weights import load_weights
    from pipeline.inference.register import register
    from pipeline.post.package.bundle import build_bundle
    from pipeline.post.package.measured_formats import pack_measured

    if config.post.register_as is not None:
        require_own_run(config, paths)
    model, source = load_weights(paths.weights)
    config = as_trained(config, paths, source)
    certificate = read_certificate(paths.certificate / CERTIFICATE)
    g_lm = load_g(paths.g_lm, model.config).g_lm
    packed = None
    if config.post.weight_format != "fp32":
        packed = pack_measured(
            model,
            g_lm,
            held_out(config, paths, half=1).sequences_NT,
            config.post.weight_format,
            max_loss_difference=config.post.max_format_loss,
            max_prompts=config.post.prompts,
        )
    ranks = None if config.post.key_rank is None else _low_rank_keys(config, paths, model, g_lm, packed)
    costs = [section for section in (packed and packed.section, ranks) if section]
    passed = certificate["verdict"] == "certified" and all(section["passed"] for section in costs)
    result = build_bundle(
        model,
        g_lm,
        certificate=certificate,
        tokenizer=data_paths(config).tokenizer,
        out=paths.bundle,
        lineage=lineage(source),
        notes=notes(config, source),
        uncertified=uncertified and not passed,
        packed=packed,
        key_rank_section=ranks,
        with_metric_learner=config.post.with_metric_learner,
    )
    if config.post.register_as is not None:
        run = run_named(config, paths, source["mlflow_run_id"])
        version = register(
            paths.bundle,
            tracking_uri=run.uri,
            run_id=run.id,
            name=config.post.register_as,
            certified=result["certified"],
        )
        result = {**result, "model_version": version["version"], "model_uri": version["uri"]}
    return result


def _low_rank_keys(
    config: RunConfig, paths: RunPaths, model: PLDRModel, g_lm: Tensor, packed: Packed | None
) -> dict[str, Any]:
    """The certificate's section `key_rank`: the ranks that `post.key_rank` asks for, chosen on one half of the held-out
    sequences and measured on the other, both with the weights that the bundle stores."""
    from pipeline.bundle.format import certified_files, state_shapes
    from pipeline.bundle.formats import unpack
    from pipeline.devices import has_gpu
    from pipeline.post.measure.prompts import held_out_text
    from pipeline.post.package.key_ranks import choose_ranks
    from pipeline.post.package.measured_keys import measure_keys
    from pldr_model.model import to_constant_g

    stored = to_constant_g(model, g_lm).eval()
    sha256 = certified_files(model, g_lm)["model.safetensors"]
    if packed is not None:
        shapes = {name: shape for name, shape in state_shapes(stored.config).items() if name != "g_lm"}
        stored.load_state_dict({**stored.state_dict(), **unpack(packed.tensors, shapes, config.post.weight_format)})
        sha256 = packed.section["sha256"]
    if has_gpu():
        stored.cuda()
    other_NT, judged_NT = (
        held_out_text(held_out(config, paths, half=half).sequences_NT, model.config, limit=config.post.prompts)[0]
        for half in (0, 1)
    )
    assert config.post.key_rank is not None, "asked for"
    rank_LH = choose_ranks(stored, g_lm, other_NT, config.post.key_rank, judged_tokens=judged_NT[:, 1:].numel())
    return measure_keys(stored, g_lm, rank_LH, judged_NT, config.post, sha256=sha256)
