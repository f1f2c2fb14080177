"""RunConfig: the typed tree behind a YAML. One YAML is one whole run.

Every key is checked before anything starts: an unknown key is an error that names the nearest known one, a bad value is
an error that names the key. `key=value` overrides use dots (`train.steps=100`) and YAML values (`model.num_heads=8`,
`tokenizer.model=null`). Pydantic stands here, at the border; inside the stages these objects are only read.

Decision: defaults are the paper's recipe where it has one, so that a short YAML is a paper run.
"""

from __future__ import annotations

import contextlib
import difflib
import json
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.config.data import DataConfig, Section, TokenizerConfig, TokensConfig
from pipeline.config.post import PostConfig
from pipeline.errors import ConfigError, UserError
from pipeline.io.storage import sha256_json
from pipeline.io.urls import check_url, is_http, without_secrets
from pldr_model.config import ModelConfig
from pldr_model.model import ActivationCheckpointing, load_g_file

# A stdlib dataclass as a pydantic field: unknown keys in `model:` must be errors like everywhere else.
ModelConfig.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]


class FreezeConfig(Section):
    """When G_LM is frozen to its mean and the metric learner dropped (pipeline/train/freeze.py). At least one of the two."""

    below: float | None = Field(
        None, gt=0
    )  # order parameter of G (RMS, relative), for `evaluations` validations in a row
    evaluations: int = Field(3, ge=1)
    at_step: int | None = Field(None, ge=1)
    become: Literal["constant", "parameter"] = "constant"  # a fixed tensor, or one that trains on from there
    sequences: int = Field(128, ge=1)  # training sequences that the mean is over, rounded up to whole global batches

    @model_validator(mode="after")
    def _check(self) -> FreezeConfig:
        if self.below is None and self.at_step is None:
            raise ValueError("set below (an order parameter, 1e-5 say) or at_step")
        return self


class TrainConfig(Section):
    """Pretraining (stage `train`). Sizes count sequences of `model.context_length` tokens."""

    steps: int = Field(250_000, ge=1)
    global_batch: int = Field(32, ge=1)
    micro_batch: int = Field(4, ge=1)  # per rank and forward pass
    ranks: int | None = Field(None, ge=1)  # processes on this node; null: every GPU, or 2 on a CPU
    max_lr: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(2000, ge=0)
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-5, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    metric_weight_decay: float | None = Field(None, ge=0)  # of the metric learner's residual units; null: the same
    clip_by: Literal["value", "norm"] = "value"
    clip: float = Field(1.0, gt=0)
    precision: Literal["fp32", "bf16"] = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = 1
    deepspeed: str | None = None  # JSON with DeepSpeed's own keys; {stage} in the name is zero_stage
    compile: bool = False  # torch.compile of each decoder layer; on a CPU this needs a C++ compiler
    activation_checkpointing: ActivationCheckpointing = "none"  # what the backward pass computes again
    offload: Literal["none", "optimizer", "parameters"] = (
        "none"  # kept in CPU memory; parameters (stage 3): with the optimizer
    )
    log_every: int = Field(10, ge=1)
    validate_every: int = Field(1000, ge=1)
    val_sequences: int = Field(64, ge=1)
    checkpoint_every: int = Field(1000, ge=1)
    keep_checkpoints: int = Field(2, ge=2)  # the last ones stay
    keep_every: int | None = Field(None, ge=1)  # checkpoints at multiples of this step stay for ever; null: none
    keep_best: bool = True  # the best by val/loss_cached stays; only a checkpoint that was validated at its step counts
    staging: str | None = None  # a folder on each node's own disk that checkpoints are written to first; null: run_dir
    publish_to: str | None = None  # URL for checkpoints of any fsspec kind (s3://…, a path); null: MLflow artifacts
    publish_wait_s: float = Field(600.0, ge=0)  # how long the end of training waits for the last upload
    timeout_s: float = Field(
        60.0, gt=0
    )  # a rank that another waits for longer, or whose data take longer, fails the job
    max_skipped_steps: int = Field(10, ge=1)  # in a row, whose loss or gradients are not finite: the run stops
    on_spike: Literal["warn", "rollback", "stop"] = "warn"  # what a loss spike does (pipeline/train/spikes.py)
    spike_window: int = Field(200, ge=20)  # losses that its bound comes from, median + spike_threshold * 1.4826 MAD
    spike_threshold: float = Field(8.0, gt=0)
    freeze_g: FreezeConfig | None = None  # null: the metric learner trains to the end
    max_restarts: int = Field(0, ge=0)  # after a crash, from the last commit; not after a stop or a user's mistake
    profile_steps: tuple[int, int] | None = None  # [first, last]: traced on every rank (pipeline/train/profiling.py)
    memory_history: bool = False  # on a GPU: which code asked for each block, in the snapshot of a rank out of memory
    peak_tflops: float | None = Field(None, gt=0)  # of one device, for MFU; null: the data sheet of a known GPU

    @field_validator("publish_to")
    @classmethod
    def _writable_url(cls, url: str | None) -> str | None:
        if url is not None and (not check_url(url) or is_http(url)):
            raise ValueError(f"{url!r} cannot be written to: name a folder or an object store (s3://, gs://)")
        return url

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be smaller than steps {self.steps}")
        if self.global_batch % self.micro_batch:
            raise ValueError(f"global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_batch}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must be in [0, 1)")
        if self.offload != "none" and self.zero_stage < (3 if self.offload == "parameters" else 1):
            raise ValueError(
                f"offload {self.offload!r} needs zero_stage {'3' if self.offload == 'parameters' else '1, 2 or 3'}, "
                f"not {self.zero_stage}"
            )
        at_step = self.freeze_g.at_step if self.freeze_g is not None else None
        if at_step is not None and at_step >= self.steps:
            raise ValueError(
                f"freeze_g.at_step {at_step} must be smaller than steps {self.steps}: G would never be frozen"
            )
        if self.profile_steps is not None and not 1 <= self.profile_steps[0] <= self.profile_steps[1] <= self.steps:
            raise ValueError(
                f"profile_steps {list(self.profile_steps)}: [first, last] with 1 <= first <= last <= steps"
            )
        return self

    @property
    def metric_decay(self) -> float:
        """The weight decay that the metric learner gets."""
        return self.weight_decay if self.metric_weight_decay is None else self.metric_weight_decay


class TrackingConfig(Section):
    """MLflow. `uri: null` is SQLite inside the run directory; any server by URI."""

    uri: str | None = None
    experiment: str = "pldr"
    parent_run: str | None = None  # MLflow id of the run that a new one is a child of; `pldr sweep` sets it

    @field_validator("uri")
    @classmethod
    def _no_file_store(cls, uri: str | None) -> str | None:
        if uri is not None and ("://" not in uri or uri.startswith("file:")):
            raise ValueError(f"{uri!r} is no MLflow URI: use sqlite:///PATH or http(s)://HOST:PORT")
        try:
            return uri if uri is None else check_url(uri)
        except UserError as error:
            raise ValueError(
                f"{error}: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD; for a database PGPASSWORD or ~/.my.cnf"
            ) from None


class RunConfig(Section):
    """A whole run: data, tokenizer, model, training, post-training, tracking.

    File names are relative to the working directory, as on the command line; `train.deepspeed`, which goes with the
    YAML, is relative to the YAML.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    run_dir: str = Field(min_length=1)  # everything the run writes; relative to the working directory
    seed: int = Field(1, ge=0, lt=2**63)
    data: DataConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    tokens: TokensConfig = TokensConfig()
    model: ModelConfig
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
        return self

    def trained_model(self, *, frozen: bool) -> ModelConfig:
        """The model that is trained before, or after `train.freeze_g` has frozen its G."""
        if not frozen:
            return self.model
        assert self.train.freeze_g is not None
        if self.train.freeze_g.become == "parameter":
            return self.model.with_trained_constant_g()
        return self.model.with_constant_g()

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


class RunPaths:
    """Where a run keeps what (architecture.md, contracts). All under `run_dir`."""

    def __init__(self, run_dir: str | Path) -> None:
        self.root = Path(run_dir).expanduser().absolute()
        self.documents = self.root / "documents"
        self.tokenizer = self.root / "tokenizer" / "tokenizer.model"
        self.tokens = self.root / "tokens"
        self.checkpoints = self.root / "checkpoints"
        self.weights = self.root / "weights"
        self.g_lm = self.root / "g_lm"
        self.certificate = self.root / "certificate"
        self.bundle = self.root / "bundle"
        self.stages = self.root / "stages"
        self.logs = self.root / "logs"
        self.profiles = self.logs / "profile"
        self.memory = self.logs / "memory"

    @staticmethod
    def ranks_of(job_file: Path) -> Path:
        """Where the ranks of a job leave their signs of life: beside its file, in logs/."""
        return job_file.parent / "ranks"


def documents_folder(config: RunConfig) -> str:
    """Where the document tars are: a path, or the URL `data.output`."""
    return config.data.output or str(RunPaths(config.run_dir).documents)


def tokens_folder(config: RunConfig) -> str:
    """Where the token tars are: a path, or the URL `tokens.output`."""
    return config.tokens.output or str(RunPaths(config.run_dir).tokens)


def staging_folder(config: RunConfig) -> Path | None:
    """Where this run's checkpoints are written first on each node, below `train.staging`: its own folder, or None."""
    if config.train.staging is None:
        return None
    root = str(RunPaths(config.run_dir).root)
    return Path(config.train.staging).expanduser().absolute() / f"{config.name}-{sha256_json(root)[:12]}"


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML, apply `key=value` overrides, check everything.

    Raises ConfigError: one line that names the file, the key and the mend.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; name a YAML such as configs/quickstart.yaml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping of sections (name, run_dir, data, model, ...)")
    for override in overrides or []:
        _apply_override(tree, override)
    return parse_config(tree, where=str(path), base=path.absolute().parent)


def parse_config(tree: dict[str, Any], *, where: str, base: Path | None = None) -> RunConfig:
    """Check a tree of plain values. `base`: what relative file names in it are relative to (the YAML's folder)."""
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(_explain(e) for e in error.errors())) from None
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from None
    return _resolve(config, base) if base is not None else config


def _resolve(config: RunConfig, base: Path) -> RunConfig:
    """`train.deepspeed` becomes absolute; a `model.g_file` has to be there and to fit."""
    updates: dict[str, Any] = {}
    if config.train.deepspeed is not None:
        name = config.train.deepspeed.replace("{stage}", str(config.train.zero_stage))
        updates["train"] = config.train.model_copy(update={"deepspeed": str((base / name).resolve())})
    if config.model.g_source == "file":
        if config.model.g_file is None:
            raise ConfigError(
                "model.g_file: missing; model.g_source=file needs a safetensors file with one G_LM tensor"
            )
        try:
            load_g_file(config.model.g_file, config.model)
        except ValueError as error:
            raise ConfigError(f"model.g_file: {error}") from None
    return config.model_copy(update=updates)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write key=value, for example train.steps=100")
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not YAML; quote it") from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        with contextlib.suppress(ValueError):
            value = float(value) if any(c.isdigit() for c in value) else value
    node = tree
    *parents, last = key.split(".")
    for part in parents:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {part} is a value, not a section")
    node[last] = value


def known_keys(path: tuple[str | int, ...] = ()) -> list[str]:
    """The keys of the section at `path`, for suggestions."""
    section: Any = RunConfig
    for part in path:
        if isinstance(part, int):  # an entry of a list
            continue
        field = getattr(section, "model_fields", {}).get(part)
        section = None if field is None else _section_in(field.annotation)
    if section is ModelConfig:
        return list(ModelConfig.__dataclass_fields__)
    return list(getattr(section, "model_fields", {}))


def _section_in(annotation: Any) -> Any:
    """The section that an annotation such as `list[Source]` or `LanguageFilter | None` is about; else the annotation."""
    for inner in get_args(annotation):
        found = _section_in(inner)
        if found is ModelConfig or (isinstance(found, type) and issubclass(found, BaseModel)):
            return found
    return annotation


def _explain(error: Any) -> str:
    """One pydantic error in words: the key, what is wrong, the nearest known key."""
    location = tuple(part for part in error["loc"] if part not in get_args(Literal["ModelConfig"]))
    key = ".".join(str(part) for part in location)
    kind = error["type"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        known = known_keys(location[:-1])
        section = "".join(f"{part}." for part in location[:-1])
        near = [section + name for name in difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)]
        if not near:  # right name, wrong section
            near = [f"{s}.{location[-1]}" for s in RunConfig.model_fields if str(location[-1]) in known_keys((s,))][:1]
        return f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}")
    if kind in ("missing", "missing_keyword_only_argument", "missing_argument"):
        return f"key {key} is missing"
    got = "" if isinstance(error.get("input"), dict | list) else without_secrets(f" (got {error.get('input')!r})")
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message}{got}" if key else message
