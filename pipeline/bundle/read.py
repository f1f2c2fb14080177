"""Reading a bundle: verify everything first, then load."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.bundle.certificate.key_rank import SECTION
from pipeline.bundle.certificate.schema import read_certificate
from pipeline.bundle.format import (
    METRIC_LEARNER,
    RANKS,
    SCHEMA_VERSION,
    WithoutInit,
    generation_config,
    state_shapes,
)
from pipeline.bundle.formats import StoredWeights, packed_shapes, unpack
from pipeline.bundle.metric_learner import WITHOUT_FP32, assemble, model_of, read_metric_learner
from pipeline.bundle.verify import (
    check_certificate,
    check_certified_model,
    check_folder,
    check_lineage,
    check_tokenizer,
    read_config,
    read_manifest,
)
from pipeline.config.post import WeightFormat
from pipeline.errors import UserError
from pipeline.io.storage import (
    read_json,
    verify_manifest,
)
from pipeline.io.tensors import load_tensors
from pipeline.tokenizer import Tokenizer
from pldr_model.config import ModelConfig
from pldr_model.decode.decoder import Decoder
from pldr_model.decode.low_rank import truncate_g
from pldr_model.model import PLDRModel, g_shape

ATTEMPTS = 5


class BundleParts(NamedTuple):
    """A verified bundle's contents; `weights` as they are stored. `metric_learner`: its tensors, None without the file.
    `key_ranks` [L,H]: how many numbers of a key the cache holds; None: all. `g_lm` is the full G_LM."""

    config: ModelConfig
    weight_format: WeightFormat
    weights: dict[str, Tensor]
    g_lm: Tensor
    tokenizer: Tokenizer
    generation: dict[str, Any]
    certificate: dict[str, Any]
    manifest: dict[str, Any]
    metric_learner: dict[str, Tensor] | None = None
    key_ranks: Tensor | None = None

    def g_in_force(self) -> Tensor:
        """The G_LM that the bundle decodes with: `g_lm`, of the ranks that its keys have."""
        return self.g_lm if self.key_ranks is None else truncate_g(self.g_lm, self.key_ranks)

    def model(self) -> PLDRModel:
        """The fp32 model, in evaluation mode. It shares fp32 weights and does not copy them; others are unpacked."""
        weights = self.weights
        if self.weight_format != "fp32":
            weights = unpack(weights, _weight_shapes(self.config), self.weight_format)
        return constant_model(self.config, weights, self.g_in_force())

    def packed_decoder(self) -> Decoder:
        """What decodes with packed weights as they are: it takes them out of `weights`, which is of no use after that."""
        assert self.weight_format != "fp32", "fp32 weights are a model's"
        weights = StoredWeights(self.weights, _weight_shapes(self.config), self.weight_format)
        return Decoder(self.config, weights, self.g_lm, self.key_ranks)

    def live_model(self) -> PLDRModel | None:
        """The model with its metric learner, in evaluation mode; None without one. It shares the tensors of `weights`."""
        if self.metric_learner is None:
            return None
        return assemble(model_of(self.certificate, where=Path("certificate.json")), self.weights, self.metric_learner)


def constant_model(config: ModelConfig, weights: dict[str, Tensor], g_lm: Tensor) -> PLDRModel:
    """The model with these fp32 weights and this G, which it shares and does not copy."""
    with torch.device("meta"), WithoutInit():
        model = PLDRModel(config, g_lm_LHKK=g_lm)
    model.load_state_dict({**weights, "g_lm": g_lm}, assign=True)
    return model.eval().requires_grad_(False)


def verify_bundle(path: str | Path) -> dict[str, Any]:
    """Check everything that a reader relies on; returns {"path", "bundle_sha256", "certified", "verdict", "tier",
    "weight_format", "numbers_per_key" (None: keys are full), "metric_learner", "files"}.

    Raises UserError, one line, for anything that is missing, extra, changed, too large, or does not belong together.
    """
    parts = read_bundle(Path(path))
    return {
        "path": str(path),
        "bundle_sha256": parts.manifest["bundle_sha256"],
        "certified": parts.manifest["certified"],
        "verdict": parts.certificate["verdict"],
        "tier": parts.certificate["tier"],
        "weight_format": parts.weight_format,
        "numbers_per_key": parts.certificate[SECTION]["numbers_per_key"] if parts.key_ranks is not None else None,
        "metric_learner": parts.metric_learner is not None,
        "files": len(parts.manifest["files"]) + 1,
    }


def read_bundle(path: Path) -> BundleParts:
    """Verify a bundle and read it. Raises UserError as `verify_bundle` does.

    `pldr bundle` may put a new bundle in its place meanwhile: then it is read again, so that all parts are of one.
    """
    for _ in range(ATTEMPTS - 1):
        before = _folder(path)
        try:
            parts = _read(path)
        except (UserError, OSError):
            if _folder(path) == before:
                raise
        else:
            if _folder(path) == before:
                return parts
    return _read(path)


def _folder(path: Path) -> tuple[int, ...] | None:
    """Which folder has this name now. A new bundle is a new folder."""
    for _ in range(ATTEMPTS):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            facts = path.stat()
            return facts.st_dev, facts.st_ino, facts.st_mtime_ns
        if not any(path.parent.glob(f".{path.name}.*.old")):  # else the new one gets its name in a moment
            return None
        time.sleep(0.02)
    return None


def _read(path: Path) -> BundleParts:
    if not path.is_dir():
        raise UserError(f"{path}: no such bundle folder; make one with `pldr bundle CONFIG`")
    manifest = read_manifest(path)
    check_folder(path, manifest)
    verify_manifest(path, manifest["files"])
    record = read_json(path / "config.json", schema_version=SCHEMA_VERSION)
    generation = read_json(path / "generation_config.json", schema_version=SCHEMA_VERSION)
    certificate = read_certificate(path / "certificate.json")
    config, weight_format = read_config(path, manifest, record)
    check_certificate(path, manifest, record, certificate)
    check_certified_model(path / "certificate.json", config, record, certificate)
    shapes, dtypes = packed_shapes(_weight_shapes(config), weight_format)
    weights = load_tensors(path / "model.safetensors", shapes, dtypes=dtypes)
    g_lm = load_tensors(path / "g_lm.safetensors", {"g_lm": g_shape(config)})["g_lm"]
    learner = None
    if METRIC_LEARNER in manifest["files"]:
        if weight_format != "fp32":
            raise UserError(f"{path / METRIC_LEARNER}: {WITHOUT_FP32.format(weight_format)}")
        learner = read_metric_learner(
            path / METRIC_LEARNER, certificate, weights, g_lm, certified=manifest["certified"]
        )
    tokenizer = Tokenizer.load(path / "tokenizer.model")
    check_lineage(path, manifest, certificate)
    check_tokenizer(tokenizer, config, manifest["lineage"], certificate["lineage"], where=path / "tokenizer.model")
    if generation != generation_config(config, tokenizer):
        raise UserError(
            f"{path / 'generation_config.json'}: does not match this model and tokenizer.model; make the bundle again"
        )
    ranks = None if record.get(RANKS) is None else torch.tensor(record[RANKS])
    return BundleParts(
        config, weight_format, weights, g_lm, tokenizer, generation, certificate, manifest, learner, ranks
    )


def _weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in state_shapes(config).items() if name != "g_lm"}
