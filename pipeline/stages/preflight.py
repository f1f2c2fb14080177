"""What can be known before anything starts: `pldr check`, and the first act of `pldr run`.

All findings are reported together, each with its fix. It must be quick: no document is read, and what takes longer is left to
the stages, which check it again. What a finished stage needed is not asked for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sqlite3
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from pipeline.checkpoint.format import checkpoint_bytes, newest_in, read_state
from pipeline.config.continued import budget_after
from pipeline.config.contraction import expected, verdict
from pipeline.config.leak import around_the_circle
from pipeline.config.paths import RunPaths, documents_folder, staging_folder, tokens_folder
from pipeline.config.rank_memory import activation_bytes, stages_of, state_bytes
from pipeline.config.run import RunConfig
from pipeline.config.schedule import planned_budget
from pipeline.config.source_names import require_sources
from pipeline.config.train_evaluate import EvaluateConfig
from pipeline.devices import gpu_bytes
from pipeline.errors import UserError
from pipeline.io.storage import Need, require_space
from pipeline.io.urls import is_http, is_local, local_path, without_secrets
from pipeline.stages.borrow import DATA_STAGES, lender, require
from pipeline.stages.extra_prompts import texts_of
from pipeline.stages.table import require_given
from pipeline.stages.train import disk_needed, ranks_on_this_node
from pipeline.tracking.client import tracking_uri, why
from pipeline.tracking.sqlite_store import file_of, require_usable

TEXT_PER_TOKEN = 2.5  # bytes of text, at least; a token takes 2 bytes up to 65,536 pieces, else 4
SPOOL = 0.5  # bytes of cleaned documents that wait to be written, per byte of text
MLFLOW_S = 1.0
MLFLOW_KINDS = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
FIXED_PIECES = 260  # of a vocabulary that is trained: 256 bytes, four special pieces


@dataclass(frozen=True)
class Finding:
    """What was found about one thing. FAIL: the run cannot end well; warn: it may not."""

    about: str
    status: Literal["ok", "warn", "FAIL"]
    text: str


def preflight(
    config: RunConfig,
    *,
    done: Mapping[str, dict[str, Any]] | None = None,
    begins: Path | None = None,
    goes_on: bool = False,
) -> list[Finding]:
    """Every finding about a run. done: the results of its stages that are complete, by name. begins: what `--resume PATH`
    names. goes_on: `--resume` names a run or a checkpoint."""
    done = done or {}
    found: list[Finding] = []

    def check(about: str, work: Callable[[], Iterator[Finding]]) -> None:
        try:
            found.extend(work())
        except (UserError, OSError) as error:
            found.append(Finding(about, "FAIL", str(error)))

    text_bytes = sum(split["text_bytes"] for split in done.get("shard", {}).get("splits", {}).values())

    def sources() -> Iterator[Finding]:
        nonlocal text_bytes
        files, text_bytes = _files_and_text(config)
        yield Finding(
            "sources", "ok", f"{files:,} {'file' if files == 1 else 'files'}, about {_size(text_bytes)} of text"
        )

    if lender(config) is not None:
        check("data", lambda: _borrowed(config))
    if "shard" not in done:
        check("sources", sources)
    if "tokenizer" not in done:
        check("tokenizer", lambda: _tokenizer(config))
    if "train" not in done:
        check("batch", lambda: _batch(config))
        check("memory", lambda: _memory(config))
        check("budget", lambda: _budget(config, begins))
        # Read for step 0 only: the folder may be gone when a run goes on.
        if config.train.init_from is not None and not goes_on and newest_in(RunPaths(config.run_dir).root) is None:
            check("init_from", lambda: _initial(config))
        if (settings := config.train.evaluate) is not None:
            check("evaluate", lambda: _evaluate(settings))
    if config.post.extra_prompts and "validate" not in done:
        check("prompts", lambda: _prompts(config))
    check("disk", lambda: _disk(config, text_bytes, done))
    check("MLflow", lambda: _mlflow(config))
    return found


def _files_and_text(config: RunConfig) -> tuple[int, int]:
    """The number of files that the sources name, and estimated bytes of text in them."""
    from pipeline.data.readers.sources import list_sources
    from pipeline.data.readers.units import plan_units

    files = list_sources(config.data.sources, outputs=[config.run_dir]).files
    require_sources(config.data.phases, {file.source_name for file in files})
    return len(files), sum(unit.size for unit in plan_units(files))


def _borrowed(config: RunConfig) -> Iterator[Finding]:
    theirs = lender(config)
    assert theirs is not None
    for stage in DATA_STAGES:
        require(config, theirs, stage)
    yield Finding("data", "ok", f"documents, tokenizer and tokens of {theirs.root}, used in place")


def _tokenizer(config: RunConfig) -> Iterator[Finding]:
    given, wanted = config.tokenizer.model, config.model.vocab_size
    if given is None:
        if wanted <= FIXED_PIECES:
            needed = f"bytes and special pieces are {FIXED_PIECES}, and each character needs one more"
            yield Finding(
                "tokenizer", "FAIL", f"model.vocab_size {wanted} is too small: {needed}; set it to 400 or more"
            )
        else:
            yield Finding("tokenizer", "ok", f"SentencePiece with {wanted:,} pieces is trained on the corpus")
        return
    from pipeline.tokenizer import Tokenizer

    require_given(config)
    has = Tokenizer.load(given).vocab_size
    if has > wanted:
        fix = f"set model.vocab_size={has}"
        yield Finding("tokenizer", "FAIL", f"{given} has {has:,} pieces, model.vocab_size is {wanted:,}; {fix}")
    else:
        unused = f", {wanted - has:,} ids of the model are unused" if has < wanted else ""
        yield Finding("tokenizer", "ok", f"{given} with {has:,} pieces{unused}")


def _initial(config: RunConfig) -> Iterator[Finding]:
    from pipeline.tokenizer import Tokenizer
    from pipeline.train.initial import require_fitting

    given = config.tokenizer.model
    source = require_fitting(config, tokenizer_sha256=None if given is None else Tokenizer.load(given).sha256)
    yield Finding("init_from", "ok", f"{config.train.init_from} ({source.get('checkpoint', 'unknown checkpoint')})")


def _prompts(config: RunConfig) -> Iterator[Finding]:
    found = texts_of(config.post.extra_prompts)
    yield Finding("prompts", "ok", ", ".join(f"{len(texts):,} of kind {name}" for name, texts in found.items()))


def _batch(config: RunConfig) -> Iterator[Finding]:
    from pipeline.train.deepspeed_config import accumulation_steps, deepspeed_config

    train, ranks = config.train, ranks_on_this_node(config)
    deepspeed_config(train, ranks)
    steps = accumulation_steps(train, ranks)
    text = f"{train.global_batch} sequences a step: {_ranks(ranks)} x micro batch {train.micro_batch} x {steps}"
    yield Finding("batch", "ok", text)
    if (leak := around_the_circle(config)) is not None:
        yield Finding("g_from", "warn", leak)


def _memory(config: RunConfig) -> Iterator[Finding]:
    """Model states and activations of the ranks on this node against its GPUs, or its memory."""
    ranks, stage = ranks_on_this_node(config), config.train.zero_stage
    gpu = gpu_bytes()
    has, each, where = (psutil.virtual_memory().total, ranks, "this machine") if gpu is None else (gpu, 1, "a GPU")
    kept = activation_bytes(config, "cpu" if gpu is None else "cuda")
    needs = {zero: each * (state_bytes(config, zero, ranks) + kept) for zero in stages_of(config.train)}
    text = f"about {_size(needs[stage])} of {_size(has)} of {where} ({_ranks(ranks)}, ZeRO {stage})"
    if needs[stage] <= 0.8 * has:
        yield Finding("memory", "ok", text)
        return
    smaller = [zero for zero in needs if zero > stage and needs[zero] <= 0.8 * has]
    fixes = [f"train.zero_stage={smaller[0]}"] if smaller else []
    fixes += ["train.activation_checkpointing=layer", "a smaller train.micro_batch", "more GPUs or nodes"]
    status: Literal["warn", "FAIL"] = "FAIL" if needs[stage] > has else "warn"
    yield Finding("memory", status, f"{text}; try {', '.join(fixes)}")


def _budget(config: RunConfig, begins: Path | None) -> Iterator[Finding]:
    if config.model.g_source != "learned":
        return
    budget = planned_budget(config.train)
    newest = newest_in(RunPaths(config.run_dir).root) or (begins and newest_in(begins))
    if newest:
        with contextlib.suppress(UserError, OSError, KeyError):  # damaged: training says so
            budget = budget_after(config.train, read_state(newest))
    found = expected(config.train, config.model.num_reslayerA, budget)
    status: Literal["ok", "warn"] = "ok" if found.word == "invariant expected" else "warn"
    yield Finding("budget", status, f"invariance budget {budget:.2f}: {verdict(found)}")


def _evaluate(settings: EvaluateConfig) -> Iterator[Finding]:
    """What `train.evaluate` needs. Nothing is imported: lm-eval takes seconds."""
    from pipeline.inference.evaluate.tasks import file_of

    for module in ("lm_eval", "datasets"):
        if importlib.util.find_spec(module) is None:
            raise UserError(f"train.evaluate: {module} is not installed; pip install 'pldr[eval]'")
    if settings.data is None:
        yield Finding(
            "evaluate", "ok", f"{len(settings.tasks)} tasks every {settings.every:,} steps, documents of the hub"
        )
        return
    folder = Path(settings.data).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"train.evaluate.data {folder}: no such folder; name one with JSONL files such as arc_easy.jsonl"
        )
    for task in settings.tasks:
        file_of(task, folder)
    yield Finding(
        "evaluate", "ok", f"{len(settings.tasks)} tasks every {settings.every:,} steps, documents of {folder}"
    )


def _disk(config: RunConfig, text_bytes: int, done: Mapping[str, dict[str, Any]]) -> Iterator[Finding]:
    """Space for each stage that is left, on the disk that it writes to."""
    paths = RunPaths(config.run_dir)
    weights = 4 * config.model.num_parameters()["total"]
    token = 2 if config.model.vocab_size <= 1 << 16 else 4
    needs = []

    def need(stage: str, folder: str | Path, size: float, what: str, key: str = "run_dir") -> None:
        if stage not in done and is_local(folder):
            needs.append(Need(local_path(folder).absolute(), int(size), what, f"set {key} to another disk"))

    need("shard", paths.logs, SPOOL * text_bytes, "cleaned text until it is written")
    need("shard", documents_folder(config), 1.1 * text_bytes, "documents", "data.output")
    need("tokenize", tokens_folder(config), text_bytes / TEXT_PER_TOKEN * token, "tokens", "tokens.output")
    if "train" not in done:
        need("train", paths.root, disk_needed(config, paths), "checkpoints")
        if (staging := staging_folder(config)) is not None:
            need("train", staging, checkpoint_bytes(config.model), "a checkpoint in train.staging", "train.staging")
    need("consolidate", paths.root, weights, "weights")
    need("bundle", paths.root, 3 * weights, "the bundle")  # while it is written, and its copy in MLflow
    require_space(needs)
    yield Finding("disk", "ok", f"about {_size(sum(one.bytes for one in needs))} will be written")


def _mlflow(config: RunConfig) -> Iterator[Finding]:
    uri = tracking_uri(config)
    shown = without_secrets(uri)
    if (file := file_of(uri)) is not None:
        try:
            require_usable(file)
        except sqlite3.Error as error:
            yield Finding("MLflow", "FAIL", f"{shown}: {why(uri, error)}")
            return
    if uri.partition(":")[0].partition("+")[0] not in MLFLOW_KINDS:
        kinds = ", ".join(f"{kind}:" for kind in MLFLOW_KINDS)
        yield Finding("MLflow", "FAIL", f"{shown}: no store that MLflow knows; set tracking.uri to one of {kinds}")
        return
    if not is_http(uri):
        yield Finding("MLflow", "ok", shown)
        return
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=MLFLOW_S):
            pass
    except urllib.error.HTTPError:
        pass  # it wants a login, or an older server: it answers
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "reason", error))
        text = f"{shown} is not reachable ({reason}); training would start, and send its metrics later: `pldr track replay`"
        yield Finding("MLflow", "warn", text)
        return
    yield Finding("MLflow", "ok", f"{shown} answers")


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def _size(value: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value / 1e3:.3g} kB"


def lines(findings: list[Finding]) -> list[str]:
    """The findings for a terminal."""
    return [f"{finding.status:<5} {finding.about:<10} {finding.text}" for finding in findings]
