"""A trained model, wherever it lies: a bundle folder, a folder that `pldr export hf` wrote, or a run's YAML.

Decision: whatever is opened becomes the same thing, a model with a constant G_LM, and on demand the live model that it was made
of. What is done with a model (score, generate, export, serve) does not ask where it came from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.bundle.certificate.schema import read_certificate
from pipeline.bundle.extracted import load_g
from pipeline.bundle.format import certified_files, generation_config
from pipeline.bundle.read import constant_model, read_bundle
from pipeline.bundle.verify import check_tokenizer
from pipeline.bundle.weights import load_weights
from pipeline.config.load import load_config
from pipeline.config.paths import RunPaths, data_paths
from pipeline.config.run import RunConfig
from pipeline.errors import ConfigError, UserError
from pipeline.inference.opened import Kind, OpenModel
from pipeline.io.storage import MANIFEST, read_json, sha256_json
from pipeline.tokenizer import Tokenizer
from pldr_model.model import PLDRModel, to_constant_g

CERTIFICATE = "certificate.json"
RUN_RECORD = "run.json"
MAX_CONFIG = 1 << 20  # bytes of a config.json


def open_model(source: str | Path, overrides: list[str] | None = None, *, live: bool | None = False) -> OpenModel:
    """Open a bundle, an export, or a run by its YAML (with `key=value` overrides).

    live: whether the model with its metric learner is needed, too. True: an error where there is none; None: where there is
    one. Raises UserError, one line, for what is none of these, is damaged, or lacks a part.
    """
    path = Path(source)
    kind = _kind_of(path)
    if kind == "run":
        return _open_run(path, overrides or [], live=live)
    if overrides:
        raise ConfigError(f"{overrides[0]}: only a run's YAML takes overrides, and {path} is a folder; leave it out")
    opened = _open_bundle(path, live=live is not False) if kind == "bundle" else _open_export(path)
    if live and opened.live is None:
        raise UserError(
            f"{path}: holds no metric learner, so its G_LM cannot be live; name the run's YAML instead, or a bundle made with "
            "post.with_metric_learner=true"
        )
    return opened


def _kind_of(path: Path) -> Kind:
    """What a path is, judged by its files' names and one key."""
    if path.is_file():
        if path.suffix not in (".yaml", ".yml"):
            raise UserError(f"{path}: not a model; name a bundle folder, a folder of `pldr export hf`, or a run's YAML")
        return "run"
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; name a bundle, a folder of `pldr export hf`, or a run's YAML")
    file = path / "config.json"
    config = read_json(file) if file.is_file() and file.stat().st_size <= MAX_CONFIG else {}
    if isinstance(config, dict) and config.get("model_type") == "pldr":
        return "hf" if "architectures" in config else "bundle"
    if (path / MANIFEST).is_file():
        return "bundle"  # its reader says what is wrong with it
    if (path / RUN_RECORD).is_file():
        raise UserError(f"{path}: a run's folder; name the run's YAML, or its bundle {path / 'bundle'}")
    raise UserError(
        f"{path}: neither a bundle (make one with `pldr bundle CONFIG`) nor a folder that `pldr export hf` wrote"
    )


def _open_bundle(path: Path, *, live: bool) -> OpenModel:
    parts = read_bundle(path)
    sha256 = parts.manifest["bundle_sha256"]
    packed = parts.weight_format != "fp32"
    return OpenModel(
        kind="bundle",
        path=path,
        name=_name_of(path),
        config=parts.config,
        held=parts.packed_decoder() if packed else parts.model(),
        unpack=(lambda: _unpacked(path, sha256)) if packed else None,
        g_lm=parts.g_lm,
        key_ranks=parts.key_ranks,
        live=parts.live_model() if live else None,
        tokenizer=parts.tokenizer,
        certificate=parts.certificate,
        certified=parts.manifest["certified"],
        sha256=sha256,
        generation=parts.generation,
    )


def _unpacked(path: Path, sha256: str) -> PLDRModel:
    """The model of a bundle that was opened packed, read once more: its packed weights are not kept twice."""
    parts = read_bundle(path)
    if parts.manifest["bundle_sha256"] != sha256:
        raise UserError(f"{path}: has been replaced since it was opened; open it again")
    return parts.model()


def _open_export(path: Path) -> OpenModel:
    from pipeline.inference.hf.load import read_export

    parts = read_export(path)
    if "g_lm" not in parts.weights:
        raise UserError(f"{path}: a live export has no cached G_LM; name the run's YAML instead")
    sha256, dtype = parts.manifest["bundle_sha256"], parts.manifest["dtype"]
    return OpenModel(
        kind="hf",
        path=path,
        name=_name_of(path),
        config=parts.config,
        held=constant_model(parts.config, parts.weights, parts.weights["g_lm"]),
        g_lm=parts.weights["g_lm"],
        live=None,
        tokenizer=parts.tokenizer,
        certificate=parts.certificate,
        certified=parts.manifest["certified"],
        sha256=sha256 if dtype == "fp32" else sha256_json({"bundle": sha256, "dtype": dtype}),
        generation=generation_config(parts.config, parts.tokenizer),
        rounded=dtype != "fp32" or parts.manifest.get("rounded", False) is not False,
    )


def _open_run(path: Path, overrides: list[str], *, live: bool | None) -> OpenModel:
    config = load_config(path, overrides)
    paths = RunPaths(config.run_dir)
    for folder, make in ((paths.weights, "run"), (paths.g_lm, "extract")):
        if not folder.is_dir():
            command = " ".join((make, str(path), *overrides))
            raise UserError(f"{path}: {folder} does not exist; make it with `pldr {command}`")
    return open_weights(config, paths, path, live=live)


def open_weights(config: RunConfig, paths: RunPaths, path: Path, *, live: bool | None) -> OpenModel:
    """Open what `paths` has of a run: `weights/` and `g_lm/`, and its certificate where it is about them. path: what the user
    named, for messages."""
    whole, source = load_weights(paths.weights)
    extracted = load_g(paths.g_lm, whole.config)
    learned = whole.config.g_source == "learned"
    if live and not learned:
        raise UserError(f"{path}: model.g_source is {whole.config.g_source}: its G_LM is no function of the input")
    tokenizer = Tokenizer.load(data_paths(config).tokenizer)
    check_tokenizer(tokenizer, whole.config, source, where=tokenizer.path)
    model = to_constant_g(whole, extracted.g_lm)
    certificate = _own_certificate(paths, whole, extracted.g_lm)
    files = {
        "weights": read_json(paths.weights / "config.json")["model_sha256"],
        "g_lm": extracted.record["g_lm_sha256"],
    }
    return OpenModel(
        kind="run",
        path=path,
        name=config.name,
        config=model.config,
        held=model,
        g_lm=extracted.g_lm,
        live=whole if learned and live is not False else None,
        tokenizer=tokenizer,
        certificate=certificate,
        certified=certificate is not None and certificate["verdict"] == "certified",
        sha256=sha256_json(files),
        generation=generation_config(model.config, tokenizer),
    )


def _own_certificate(paths: RunPaths, model: PLDRModel, g_lm: Tensor) -> dict[str, Any] | None:
    """The run's certificate if it is about these weights and this G; one of earlier weights says nothing of them."""
    file = paths.certificate / CERTIFICATE
    if not file.is_file():
        return None
    certificate = read_certificate(file)
    return certificate if certificate["files"] == certified_files(model, g_lm) else None


def _name_of(folder: Path) -> str:
    """A bundle is called what its run's folder is called."""
    resolved = folder.resolve()
    return resolved.parent.name if resolved.name == "bundle" and resolved.parent.name else resolved.name
