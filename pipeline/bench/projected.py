"""`python -m pipeline.bench.projected RUN_DIR`: what of a trained G_LM is more than attention, in held-out nats.

The loss with the cached G_LM of a finished run, and with parts of it in its place in all layers:

    full          G_LM as it was extracted
    rotary        its part that commutes with RoPE, which is plain attention (pldr_model/rotary_part.py)
    nonrotary     I + the rest: plain attention, and what G_LM adds to it
    rank-1e-01 …  its largest singular values that keep all but this share of their squares, in each head
    identity      plain attention

on the held-out sequences that the certificate is judged on. `cost` is the loss less that of `full`, with its standard error
over sequences: paired, so that few sequences resolve a small one. Prints a table, and last one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.bundle.extracted import load_g
from pipeline.bundle.weights import load_weights
from pipeline.config.load import parse_config
from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.devices import has_gpu
from pipeline.errors import ConfigError, UserError
from pipeline.io.sealed import read_sealed
from pipeline.post.measure.downstream import nll_of_hidden
from pipeline.post.measure.observe import batches
from pipeline.post.measure.prompts import held_out_text
from pipeline.stages.trained import held_out
from pldr_model.config import ModelConfig
from pldr_model.decode.low_rank import ranks_by_energy, truncate_g
from pldr_model.model import PLDRModel, to_constant_g
from pldr_model.rotary_part import rotary_part, rotary_share

ENERGIES = (1e-1, 1e-2, 1e-3)


def main(words: list[str] | None = None) -> int:
    """Measure a run; print the table and the JSON."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.bench.projected", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "run", type=Path, metavar="RUN_DIR", help="of a run with weights/ and g_lm/ (pldr run or extract)"
    )
    parser.add_argument(
        "--sequences", type=int, default=100, metavar="N", help="held-out sequences, 2 or more (%(default)s)"
    )
    arguments = parser.parse_args(words)
    try:
        result = measure(arguments.run, sequences=arguments.sequences)
    except (UserError, ConfigError) as error:
        print(f"pipeline.bench.projected: {error}", file=sys.stderr)
        return 1
    print("\n".join(table(result)))
    print(json.dumps(result))
    return 0


def measure(run_dir: Path, *, sequences: int) -> dict[str, Any]:
    """The JSON: losses by what takes G_LM's place; share and ranks by layer. Raises UserError for a run that lacks a part."""
    if sequences < 2:
        raise UserError(f"--sequences {sequences}: a standard error needs 2 or more")
    config, paths = _config_of(run_dir), RunPaths(run_dir)
    for folder, stage in ((paths.weights, "consolidate"), (paths.g_lm, "extract")):
        if not folder.is_dir():
            raise UserError(f"{folder}: missing; the run is not finished: `pldr {stage} CONFIG` makes it")
    trained, source = load_weights(paths.weights)
    g_LHKK = load_g(paths.g_lm, trained.config).g_lm
    found = held_out(config, paths, half=1, limit=sequences)
    text_NT, _ = held_out_text(found.sequences_NT, trained.config, limit=sequences)
    model = to_constant_g(trained, g_LHKK).eval()
    if has_gpu():
        model.cuda()
    nll = losses(model, replacements(g_LHKK, model.config), text_NT)
    return {
        "run_dir": str(run_dir),
        "step": source.get("step"),
        "g_source": trained.config.g_source,
        "sequences": len(text_NT),
        "documents": found.documents,
        "tokens": text_NT[:, 1:].numel(),
        "losses": {name: _summary(nll_N, nll["full"]) for name, nll_N in nll.items()},
        "per_layer": {
            "rotary_share": rotary_share(g_LHKK, model.config).mean(-1).tolist(),
            **{f"rank-{energy:.0e}": _mean_ranks(g_LHKK, energy) for energy in ENERGIES},
        },
    }


def replacements(g_LHKK: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """What takes the place of G_LM, each [L,H,K,K]."""
    rotary, identity = rotary_part(g_LHKK, config), torch.eye(config.head_dim).expand_as(g_LHKK)
    return {
        "full": g_LHKK,
        "rotary": rotary,
        "nonrotary": identity + (g_LHKK - rotary),
        **{f"rank-{energy:.0e}": truncate_g(g_LHKK, ranks_by_energy(g_LHKK, energy)) for energy in ENERGIES},
        "identity": identity,
    }


@torch.inference_mode()
def losses(model: PLDRModel, given: dict[str, Tensor], text_NT: Tensor) -> dict[str, Tensor]:
    """Nats per token of each sequence [N], fp64, with each G. text_NT: sequences [N,S+1] without padding."""
    weight = model.embedding.weight
    on_device = {name: g_LHKK.to(weight) for name, g_LHKK in given.items()}
    found: dict[str, list[Tensor]] = {name: [] for name in given}
    for ids_BT in batches(text_NT, model):
        for name, g_LHKK in on_device.items():
            x_BSD = model.hidden(ids_BT[:, :-1], g_lm=g_LHKK, padded=False)
            found[name].append(nll_of_hidden(model, x_BSD, ids_BT[:, 1:]).mean(-1).cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def table(result: dict[str, Any]) -> list[str]:
    """Losses, then share and ranks by layer, as lines."""
    lines = [f"{'G_LM':<12} {'loss':>8} {'cost':>9} {'standard error':>15}"]
    for name, found in result["losses"].items():
        lines.append(f"{name:<12} {found['loss']:>8.4f} {found['cost']:>9.5f} {found['standard_error']:>15.5f}")
    lines.append(f"{'layer':<12} " + " ".join(f"{name:>12}" for name in result["per_layer"]))
    for layer, row in enumerate(zip(*result["per_layer"].values(), strict=True)):
        lines.append(f"{layer:<12} " + " ".join(f"{value:>12.3f}" for value in row))
    return lines


def _config_of(run_dir: Path) -> RunConfig:
    """The configuration that a run directory was last trained with."""
    job = RunPaths(run_dir).logs / "job.json"
    if not job.exists():
        raise UserError(f"{job}: missing; name the run directory of a run that was trained")
    config = parse_config(read_sealed(job, schema_version=1).get("config") or {}, where=str(job))
    return config.model_copy(update={"run_dir": str(run_dir)})


def _summary(nll_N: Tensor, full_N: Tensor) -> dict[str, float]:
    cost_N = nll_N - full_N
    error = float(cost_N.std()) / len(cost_N) ** 0.5
    return {"loss": float(nll_N.mean()), "cost": float(cost_N.mean()), "standard_error": error}


def _mean_ranks(g_LHKK: Tensor, energy: float) -> list[float]:
    means: list[float] = ranks_by_energy(g_LHKK, energy).double().mean(-1).tolist()
    return means


if __name__ == "__main__":
    sys.exit(main())
