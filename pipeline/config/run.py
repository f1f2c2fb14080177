"""RunConfig: the typed tree behind a YAML. One YAML, with the one it extends, is one complete run.

Every key is checked before anything starts: an unknown key is an error that names the nearest known one, a bad value is
an error that names the key. `key=value` overrides use dots (`train.steps=100`) and YAML values (`model.num_heads=8`,
`tokenizer.model=null`). Pydantic is used here, at the border; inside the stages these objects are only read.

Decision: defaults are the paper's recipe where it has one, so that a short YAML is a paper run.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from pydantic import ConfigDict, field_validator, model_validator

from pipeline.config.data import DataConfig, TokenizerConfig, TokensConfig
from pipeline.config.post import PostConfig
from pipeline.config.section import Kind, Section
from pipeline.config.train import TrainConfig
from pipeline.errors import UserError
from pipeline.io.urls import check_url, without_secrets
from pldr_model.config import ADDED_KEYS, ModelConfig
from pldr_model.rope_scaling import RopeScaling

# Stdlib dataclasses as pydantic fields: unknown keys in `model:` must be errors like everywhere else, and the docstrings
# below its fields are their meanings.
CLOSED = ConfigDict(extra="forbid", use_attribute_docstrings=True)
ModelConfig.__pydantic_config__ = RopeScaling.__pydantic_config__ = CLOSED  # type: ignore[attr-defined]

about_the_run = Kind("may change", (), result=False)  # what it is called and where it is
randomness = Kind("fixed", ("train", "validate"), result=("train",))
weights = Kind("needs force", ("train", "validate"), result=True)
registry = Kind("may change", ("bundle",), result=True)  # training logs there too, which changes nothing of it
# pldr_model knows no pydantic, so the kinds of its keys stand here: a key is one of `weights`, unless it is named.
MODEL_KEYS = {
    "vocab_size": replace(weights, stages=("tokenizer", *weights.stages)),
    "context_length": replace(weights, stages=("tokenize", *weights.stages)),
    **{key: replace(weights, added=True) for key in ADDED_KEYS},
}


class TrackingConfig(Section):
    """MLflow. `uri: null` is SQLite beside the run directory; any server by URI."""

    uri: str | None = registry(None, "SQLite or a server; null: MLFLOW_TRACKING_URI, or SQLite beside run_dir")
    experiment: str = registry("pldr", "MLflow experiment")
    parent_run: str | None = registry(None, "MLflow id of the run that a new one is a child of; `pldr sweep` sets it")

    @field_validator("uri")
    @classmethod
    def _no_file_store(cls, uri: str | None) -> str | None:
        if uri is not None and ("://" not in uri or uri.startswith("file:")):
            raise ValueError(f"{uri!r} is not an MLflow URI: use sqlite:///PATH or http(s)://HOST:PORT")
        try:
            return uri if uri is None else check_url(uri)
        except UserError as error:
            raise ValueError(
                f"{error}: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD; for a database PGPASSWORD or ~/.my.cnf"
            ) from None


class RunConfig(Section):
    """A complete run: data, tokenizer, model, training, post-training, tracking.

    File names are relative to the working directory, as on the command line. Only `extends`, which names another YAML, is
    relative to the YAML that has it (pipeline/config/load.py).
    """

    name: str = about_the_run(..., "of the MLflow run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    run_dir: str = about_the_run(..., "folder for everything the run writes", min_length=1)
    seed: int = randomness(1, "of weights, data order and prompts", ge=0, lt=2**63)
    data: DataConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    tokens: TokensConfig = TokensConfig()
    model: ModelConfig = weights(..., "sizes and variant")
    train: TrainConfig = TrainConfig()
    post: PostConfig = PostConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _check_special_ids(self) -> RunConfig:
        ids = (self.model.pad_id, self.model.unk_id, self.model.bos_id, self.model.eos_id)
        if ids != (0, 1, 2, 3):
            raise ValueError(
                f"model.pad_id, unk_id, bos_id, eos_id are {ids}; the tokenizer's are 0, 1, 2, 3: remove these keys"
            )
        if self.train.freeze_g is not None and self.model.g_source != "learned":
            raise ValueError(
                f"train.freeze_g: model.g_source {self.model.g_source!r} has no learned G to freeze; remove it"
            )
        skips = self.data.on_bad_shard == "skip" and self.train.on_spike == "rollback"
        if self.train.batch_warmup is not None and skips:
            raise ValueError(
                "train.batch_warmup: with on_spike rollback and data.on_bad_shard skip the ranks could not agree on the "
                "batches after a rollback; change one of the three"
            )
        if self.train.document_masks and not self.tokens.boundaries:
            raise ValueError(
                "train.document_masks: needs to know which document a token is of; set tokens.boundaries=true"
            )
        if self.train.document_masks and self.tokens.packing == "pad":
            raise ValueError(
                "train.document_masks: with tokens.packing pad a sequence holds one document, so nothing is masked; remove it"
            )
        for key in ("g_from", "share_g_below") if self.model.g_source != "learned" else ():
            if getattr(self.train, key) != TrainConfig.model_fields[key].default:
                raise ValueError(f"train.{key}: model.g_source {self.model.g_source!r} has no learned G; remove it")
        if self.train.metric_decay_on == "glus" and self.model.g_source == "learned" and not self.model.num_denseA:
            raise ValueError(
                "train.metric_decay_on glus: model.num_denseA 0 has no GLUs that could decay; set norms, or remove it"
            )
        if self.post.key_rank is not None and (wrong := self.post.key_rank.unfit(self.model)):
            raise ValueError(f"post.key_rank.ranks: {wrong}")
        return self

    def trained_model(self, *, frozen: bool) -> ModelConfig:
        """The model that is trained before, or after `train.freeze_g` has frozen its G."""
        if not frozen:
            return self.model
        assert self.train.freeze_g is not None
        return self.model.with_frozen_g(self.train.freeze_g.become)

    def as_dict(self) -> dict[str, Any]:
        """Plain values only: what is written to JSON, hashed, and logged."""
        return self.model_dump(mode="json")

    def flat(self) -> dict[str, str]:
        """`section.key` -> text, as MLflow parameters."""
        return flatten(self.as_dict())


def flatten(tree: dict[str, Any]) -> dict[str, str]:
    """`section.key` -> text of a tree of plain values."""
    out: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            out[prefix] = without_secrets(value if isinstance(value, str) else json.dumps(value))  # signed URLs

    walk("", tree)
    return out
