"""The stages in order, one row each: what it reads of the configuration, what it writes, and what it runs.

    shard -> tokenizer -> tokenize -> train -> consolidate -> extract -> validate -> bundle

A row names functions of this file. They import what they need when they are called: the
command line reads the table for `pldr --help`, which must not wait for torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, UserError

if TYPE_CHECKING:
    from pipeline.config.paths import RunPaths
    from pipeline.config.run import RunConfig
    from pipeline.stages.compatible import Report
    from pipeline.stages.records import Facts
    from pipeline.stages.train import Launch

Result = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What a stage's `run` is given: the run, how to start ranks and report, and the options of the command line."""

    config: RunConfig
    paths: RunPaths
    launch: Launch  # starts a training job's ranks
    report: Report  # gets a line for the user now and then
    ranks: int | None = None  # how many train, on all nodes; None: what this node has
    resume: str = "auto"
    force: bool = False
    uncertified: bool = False
    dry_run: bool = False


def no_check(paths: RunPaths, result: Result) -> None:
    """The `check` of a stage whose result cannot be a bad one."""


@dataclass(frozen=True)
class Stage:
    """One row of the table.

    inputs: everything that decides the output, beside the results of the stages before; its digest goes into the record.
    outputs: each output file's facts, by its path (below run_dir: relative to it) or URL.
    check: raises UserError when the result, new or of an earlier start, must end the run.
    needs: keys that a record's result must have.
    untouched: earlier stages whose outputs must be as they were written.
    data: what the stage makes for training, which is replaced only with `--replace` (replace.py).
    has_dry_run: whether the work can be a job of `data.executor`, which `--dry-run` only writes.
    is_silent: whether the work reports nothing itself.
    """

    name: str
    help: str
    inputs: Callable[[RunConfig], dict[str, Any]]
    outputs: Callable[[RunConfig, RunPaths], dict[str, Facts]]
    run: Callable[[Work], Result]
    check: Callable[[RunPaths, Result], None] = no_check
    needs: tuple[str, ...] = ()
    untouched: tuple[str, ...] = ()
    data: str | None = None
    has_dry_run: bool = False
    is_silent: bool = False


def settings_inputs(stage: str, form: int | None = None) -> Callable[[RunConfig], dict[str, Any]]:
    """The `inputs` of a stage that the configuration alone decides.

    form: of what the stage writes; raised when a later stage needs something new in it, so that older outputs are made again.
    """

    def inputs(config: RunConfig) -> dict[str, Any]:
        from pipeline.config.keys import of_stage

        return {"config": of_stage(config, stage), **({} if form is None else {"form": form})}

    return inputs


def files_in(folder: str | Path, paths: RunPaths) -> dict[str, Facts]:
    """The outputs of a stage that writes one folder, local or an object store's."""
    from pipeline.io.urls import is_local, local_path
    from pipeline.stages.records import remote_outputs

    if not isinstance(folder, Path):
        if not is_local(folder):
            return remote_outputs(folder)
        folder = local_path(folder).absolute()
    return _facts_by_name(sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")), paths)


def _facts_by_name(files: list[Path], paths: RunPaths) -> dict[str, Facts]:
    from pipeline.stages.records import facts_of

    names = [str(p.relative_to(paths.root)) if p.is_relative_to(paths.root) else str(p) for p in files]
    return {name: facts_of(path) for name, path in zip(names, files, strict=True)}


def _shard_inputs(config: RunConfig) -> dict[str, Any]:
    from pipeline.data.documents.shard import stage_inputs

    return stage_inputs(config)


def _shard(work: Work) -> Result:
    from pipeline.data.documents.shard import shard_documents

    return shard_documents(work.config, work.paths, dry_run=work.dry_run)


def _documents(config: RunConfig, paths: RunPaths) -> dict[str, Facts]:
    from pipeline.config.paths import documents_folder

    return files_in(documents_folder(config), paths)


def _tokenizer_inputs(config: RunConfig) -> dict[str, Any]:
    from pipeline.config.keys import of_stage
    from pipeline.io.storage import sha256_file

    inputs = {"config": of_stage(config, "tokenizer")}
    if config.tokenizer.model is None:
        return inputs
    require_given(config)
    return {**inputs, "given": sha256_file(config.tokenizer.model)}


def require_given(config: RunConfig) -> None:
    """Raise ConfigError unless `tokenizer.model` is a file."""
    given = Path(str(config.tokenizer.model))
    if not given.is_file():
        raise ConfigError(f"tokenizer.model: {given}: no such file; name a SentencePiece .model, or null to train one")


def _tokenizer(work: Work) -> Result:
    from pipeline.data.tokens.train_tokenizer import make_tokenizer

    return make_tokenizer(work.config, work.paths)


def _tokenize(work: Work) -> Result:
    from pipeline.data.tokens.tokenize import tokenize_documents

    return tokenize_documents(work.config, work.paths, dry_run=work.dry_run)


def _tokens(config: RunConfig, paths: RunPaths) -> dict[str, Facts]:
    from pipeline.config.paths import tokens_folder

    return files_in(tokens_folder(config), paths)


def _train_inputs(config: RunConfig) -> dict[str, Any]:
    from pipeline.config.keys import of_stage

    return {"config": of_stage(config, "train")}


def _train(work: Work) -> Result:
    from pipeline.stages.train import pretrain

    return pretrain(
        work.config,
        work.paths,
        resume=work.resume,
        launch=work.launch,
        report=work.report,
        force=work.force,
        ranks=work.ranks,
    )


def _train_outputs(config: RunConfig, paths: RunPaths) -> dict[str, Facts]:
    """The newest checkpoint, by its manifest."""
    from pipeline.checkpoint.format import COMMITTED, committed
    from pipeline.io.storage import MANIFEST

    newest = committed(paths.checkpoints)[-1]
    return _facts_by_name([newest / COMMITTED, newest / MANIFEST], paths)


def _consolidate(work: Work) -> Result:
    from pipeline.stages.post import consolidate_newest

    return consolidate_newest(work.config, work.paths)


def _extract(work: Work) -> Result:
    from pipeline.stages.post import extract

    return extract(work.config, work.paths)


def _validate_inputs(config: RunConfig) -> dict[str, Any]:
    from pipeline.stages.extra_prompts import extra_files

    inputs = settings_inputs("validate", form=3)(config)
    files = extra_files(config.post.extra_prompts)
    return {**inputs, "extra_prompts": files} if files else inputs


def _validate(work: Work) -> Result:
    from pipeline.stages.validate import certify

    return certify(work.config, work.paths)


def _require_certified(paths: RunPaths, result: Result) -> None:
    """Raise UserError with exit code 3 for a certificate that did not pass: what failed, why, and the page to open."""
    if result["verdict"] == "certified":
        return
    from pipeline.bundle.certificate.checks import FOLLOWS

    # Stage records of before certificates of schema_version 4 have the fix under `mend`.
    failed = [_failed_check(failure) for failure in result["failed"]]
    fixes = dict.fromkeys(f["fix"] if "fix" in f else f["mend"] for f in result["failed"])
    fixes = {fix: None for fix in fixes if not fix.endswith(FOLLOWS)} or fixes  # of what follows from another, nothing
    raise UserError(
        f"the certificate did not pass: {'; '.join(failed)}\n"
        f"why   {'; '.join(fixes)}\n"
        f"page  {paths.certificate / 'certificate.html'} (`pldr bundle CONFIG --uncertified` packages the model anyway)",
        exit_code=3,
        details={"failed": result["failed"]},
    )


def _failed_check(failure: dict[str, Any]) -> str:
    """A measure with its value and threshold; records of before November 2026 have neither."""
    if "threshold" not in failure:
        return str(failure["measure"])
    from pipeline.report.numbers import beside

    value = beside(failure.get("value"), failure["threshold"])
    return f"{failure['measure']} is {value}, its threshold {failure['threshold']:g}"


def _bundle(work: Work) -> Result:
    from pipeline.stages.post import package

    return package(work.config, work.paths, uncertified=work.uncertified)


STAGES = (
    Stage(
        name="shard",
        help="corpora -> document tars",
        inputs=_shard_inputs,
        outputs=_documents,
        run=_shard,
        data="documents",
        has_dry_run=True,
    ),
    Stage(
        name="tokenizer",
        help="train or take the SentencePiece model",
        inputs=_tokenizer_inputs,
        outputs=lambda config, paths: files_in(paths.tokenizer.parent, paths),
        run=_tokenizer,
        data="a tokenizer",
        is_silent=True,
    ),
    Stage(
        name="tokenize",
        help="documents -> token tars and their index",
        inputs=settings_inputs("tokenize"),
        outputs=_tokens,
        run=_tokenize,
        untouched=("tokenizer",),
        data="tokens",
        has_dry_run=True,
    ),
    Stage(
        name="train",
        help="token tars -> committed checkpoints (deepspeed)",
        inputs=_train_inputs,
        outputs=_train_outputs,
        run=_train,
    ),
    Stage(
        name="consolidate",
        help="checkpoint -> safetensors weights",
        inputs=settings_inputs("consolidate", form=2),
        outputs=lambda config, paths: files_in(paths.weights, paths),
        run=_consolidate,
        untouched=("train",),
        is_silent=True,
    ),
    Stage(
        name="extract",
        help="weights -> G_LM",
        inputs=settings_inputs("extract", form=2),
        outputs=lambda config, paths: files_in(paths.g_lm, paths),
        run=_extract,
        untouched=("consolidate",),
        is_silent=True,
    ),
    Stage(
        name="validate",
        help="weights, G_LM -> certificate",
        inputs=_validate_inputs,
        outputs=lambda config, paths: files_in(paths.certificate, paths),
        run=_validate,
        untouched=("consolidate", "extract"),
        check=_require_certified,
        needs=("verdict",),
        is_silent=True,
    ),
    Stage(
        name="bundle",
        help="package and register the cached inference bundle",
        inputs=settings_inputs("bundle"),
        outputs=lambda config, paths: files_in(paths.bundle, paths),
        run=_bundle,
        untouched=("consolidate", "extract", "validate"),
        is_silent=True,
    ),
)
NAMES = tuple(stage.name for stage in STAGES)


def stage_named(name: str) -> Stage:
    """The row of a stage."""
    return next(stage for stage in STAGES if stage.name == name)


def stages_before(name: str) -> tuple[Stage, ...]:
    """The rows above a stage's, in order."""
    return STAGES[: NAMES.index(name)]
