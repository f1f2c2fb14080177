"""`pldr import`, `export` and `parity`: checkpoints of the reference implementation to and from our safetensors folder, and
whether a model computes what the reference implementation does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.commands.verbs import Report, Result, Verbs
from pipeline.errors import ConfigError, UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from pldr_model.config import ModelConfig, RopeStyle

SCHEMA_VERSION = 1


def add_convert_verbs(verbs: Verbs) -> None:
    """The verbs `import`, `export` and `parity`."""
    sub = verbs.add("import", _import, "reference checkpoint (.pth, .safetensors) -> our safetensors")
    sub.add_argument("source", metavar="CHECKPOINT")
    sub.add_argument("target", metavar="FOLDER")
    sub.add_argument(
        "--model", metavar="CONFIG", help="JSON of the model, or the YAML of a run (else read off the shapes)"
    )
    sub.add_argument(
        "--context-length", type=int, default=1024, help="without --model: the shapes do not show it (1024)"
    )
    sub.add_argument(
        "--rope-style", choices=("interleaved", "half"), default="interleaved", help="without --model; v52: half"
    )
    sub = verbs.add("export", _export, "our safetensors -> reference checkpoint (.pth or .safetensors)")
    sub.add_argument("source", metavar="FOLDER")
    sub.add_argument("target", metavar="CHECKPOINT")
    sub = verbs.add("parity", _parity, "compare with golden cases, beside what rounding alone does to each number")
    sub.add_argument("directories", metavar="DIR", nargs="+", help="folders of golden cases")


def _import(arguments: Any, report: Report) -> Result:
    return import_reference(
        arguments.source,
        arguments.target,
        model=arguments.model,
        context_length=arguments.context_length,
        rope_style=arguments.rope_style,
        report=report,
    )


def _export(arguments: Any, report: Report) -> Result:
    return export_reference(arguments.source, arguments.target, report)


def _parity(arguments: Any, report: Report) -> Result:
    from pldr_model.parity import parity

    cases: Result = {}
    for directory in arguments.directories:
        try:
            cases[directory] = result = parity(directory)
        except (ValueError, OSError) as error:
            raise UserError(str(error)) from error
        report("\n".join([directory, *(f"  {line}" for line in _parity_lines(result)), ""]))
    failed = [directory for directory, result in cases.items() if result["failed"]]
    if failed:
        raise UserError(f"{', '.join(failed)}: ours and the reference's numbers differ", details={"cases": cases})
    report(f"{len(cases)} of {len(cases)} cases agree with the reference{_except(cases)}")
    return {"cases": cases}


def _parity_lines(result: dict[str, Any]) -> list[str]:
    """The table of one case and its verdict."""
    from pldr_model.parity import NUMBERS

    lines = [
        f"{'':<28}  difference  spread   (spread: ours with weights perturbed by {result['perturbation']:.0e}, relative)"
    ]
    for name in NUMBERS:
        verdicts = {"ill_conditioned": "ill-conditioned", "failed": "DIFFERS", "not_judged": "not judged"}
        mark = next((word for key, word in verdicts.items() if name in result[key]), "")
        lines.append(f"{name:<28}  {result[name]:<10.2g}  {result['spread'][name]:<7.2g}  {mark}".rstrip())
    for name in ("greedy_equal", "dag_overflowed_in_reference"):
        lines.append(f"{name:<28}  {result[name]}")
    if result["failed"]:
        return [*lines, f"DIFFERS in {', '.join(result['failed'])}"]
    if not result["ill_conditioned"]:
        return [*lines, "agrees with the reference"]
    sides = [f"{name} ({result[name]:.2g}, spread {result['spread'][name]:.2g})" for name in result["ill_conditioned"]]
    return [*lines, f"agrees with the reference, except that rounding decides: {', '.join(sides)}"]


def _except(cases: Result) -> str:
    unsure = [directory for directory, result in cases.items() if result["ill_conditioned"]]
    return f"; ill-conditioned, and no evidence below their spread: numbers of {', '.join(unsure)}" if unsure else ""


def import_reference(
    source: str,
    target: str,
    *,
    model: str | None,
    context_length: int,
    rope_style: RopeStyle,
    report: Report,
) -> Result:
    """Reference checkpoint -> FOLDER/{model.safetensors, config.json}. Raises UserError naming the file, key or shape."""
    from pipeline.io import storage
    from pldr_model.convert import from_reference, infer_config, load_checkpoint_file

    try:
        state = load_checkpoint_file(source)
        if model is not None:
            config = read_model_config(model)
        else:
            config = infer_config(state, context_length=context_length, rope_style=rope_style)
        weights = from_reference(state, config)
    except UserError:
        raise
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    origin = {"imported_from": Path(source).name, "sha256": storage.sha256_file(source)}
    return publish_folder(Path(target), weights, config, source=origin, report=report)


def publish_folder(
    folder: Path, weights: Mapping[str, Tensor], config: ModelConfig, *, source: dict[str, Any], report: Report
) -> Result:
    """Write FOLDER/{model.safetensors, config.json}, and g_lm.safetensors (what `model.g_file` names) where there is a G."""
    from safetensors.torch import save_file

    from pipeline.bundle.weights import FREE
    from pipeline.io import storage
    from pipeline.io.sealed import publish_sealed
    from pipeline.io.tensors import serialize, usual_mode

    def write(temporary: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary)
        usual_mode(temporary)

    storage.publish(folder / "model.safetensors", write)
    if "g_lm" in weights:
        storage.publish_bytes(folder / "g_lm.safetensors", serialize({"g_lm": weights["g_lm"]}))
    publish_sealed(
        folder / "config.json",
        {
            "schema_version": SCHEMA_VERSION,
            "model": config.to_dict(),
            "model_sha256": storage.sha256_file(folder / "model.safetensors"),
            "source": source,
        },
        free=FREE,
    )
    count = sum(tensor.numel() for tensor in weights.values())
    report(f"{folder}: {len(weights)} tensors, {count:,} numbers")
    return {"folder": str(folder), "tensors": len(weights), "numbers": count}


def export_reference(source: str, target: str, report: Report) -> Result:
    """FOLDER/{model.safetensors, config.json} -> a reference checkpoint (.pth or .safetensors, by the target's name)."""
    from safetensors.torch import load_file

    from pipeline.bundle.weights import FREE
    from pipeline.io import storage
    from pipeline.io.sealed import read_sealed
    from pipeline.io.tensors import usual_mode
    from pldr_model.config import ModelConfig
    from pldr_model.convert import save_checkpoint_file, to_reference

    folder = Path(source)
    record = read_sealed(folder / "config.json", schema_version=SCHEMA_VERSION, free=FREE)
    if Path(target).suffix not in (".pth", ".safetensors"):
        raise ConfigError(f"{target}: name a .pth or a .safetensors file")
    if storage.sha256_file(folder / "model.safetensors") != record.get("model_sha256"):
        raise UserError(f"{folder / 'model.safetensors'}: sha256 differs from config.json: damaged")
    try:
        weights = to_reference(load_file(folder / "model.safetensors"), ModelConfig.from_dict(record["model"]))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{folder}: {error}") from error
    suffix = Path(target).suffix

    def write(temporary: Path) -> None:
        named = temporary.with_name(temporary.name + suffix)  # the suffix chooses the format
        save_checkpoint_file(weights, named)
        usual_mode(named)
        named.replace(temporary)

    storage.publish(target, write)
    report(f"{target}: {len(weights)} tensors")
    return {"checkpoint": target, "tensors": len(weights)}


def read_model_config(path: str) -> ModelConfig:
    """A model's sizes from a run's YAML, our `config.json`, the reference's or the transformers port's JSON."""
    from pipeline.config.load import load_config
    from pipeline.io import storage
    from pldr_model.config import ModelConfig

    if Path(path).suffix in (".yaml", ".yml"):
        return load_config(path).model
    values = storage.read_json(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: not a model configuration")
    try:
        if "num_hidden_layers" in values:
            return ModelConfig.from_transformers(values)
        if "max_seq_len" in values:
            return ModelConfig.from_reference(values)
        return ModelConfig.from_dict(values.get("model", values))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {json.dumps(str(error))[1:-1]}") from error
