"""The line: the stages in order, each skipped when its output is complete for the same inputs.

    shard -> tokenizer -> tokenize -> train -> consolidate -> extract -> validate -> bundle

A stage that finished leaves a record `stages/NAME.json`: a digest of its inputs (the configuration it reads and the
record of the stage before), the names, sizes and hashes of its output files, its result and the seconds it took. It is skipped
when the inputs are today's and the outputs are still there. No record, no belief: whatever a killed stage left is made again
(the stages themselves keep what is safe to keep).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.checkpoint.format import COMMITTED, committed
from pipeline.config.paths import RunPaths, documents_folder, tokens_folder
from pipeline.config.run import RunConfig
from pipeline.errors import ConfigError, UserError
from pipeline.io import storage
from pipeline.io.urls import is_local, local_path
from pipeline.stages.records import Facts, facts_of, first_changed, remote_outputs
from pipeline.stages.resume import Say, names_run
from pipeline.stages.train import Launch, pretrain

SCHEMA_VERSION = 2
LOCK = ".lock"  # its presence marks a run directory
NAMES = ("shard", "tokenizer", "tokenize", "train", "consolidate", "extract", "validate", "bundle")
OF_BUNDLE = ("weight_format", "max_format_loss", "register_as")  # of `post`: what only the last stage reads
# Of what a stage writes: raised when a later stage needs something new in it, so that older outputs are made again.
FORMS = {"consolidate": 2, "extract": 2, "validate": 3}
UPSTREAM = {name: NAMES[i - 1] for i, name in enumerate(NAMES) if i}


class Line:
    """One run's stages. `launch` starts a training job's ranks; `say` gets a line for the user now and then.
    `ranks`: how many train, on all nodes (None: what this node has)."""

    def __init__(self, config: RunConfig, *, launch: Launch, say: Say, ranks: int | None = None) -> None:
        self.config, self.paths = config, RunPaths(config.run_dir)
        self._launch, self._say, self._ranks = launch, say, ranks

    def run(self) -> dict[str, dict[str, Any]]:
        """Every stage; returns their records by name. Raises UserError (exit code 3 when the certificate failed)."""
        self._clean()
        return {name: self.stage(name, thorough=False) for name in NAMES}

    def stage(
        self, name: str, *, resume: str = "auto", force: bool = False, uncertified: bool = False, thorough: bool = True
    ) -> dict[str, Any]:
        """Run one stage, or skip it; returns its record. Raises UserError when the stage before it is not complete."""
        inputs = self._inputs(name)
        if uncertified:
            inputs["uncertified"] = True
        digest = storage.sha256_json(inputs)
        known = self.record(name)
        if known and not names_run(resume, known["result"].get("run_id")):
            known = None  # another run or checkpoint is asked for than the finished one
        if known and known["inputs"] == digest and not force and not self._changed(known, thorough=thorough):
            self._say(f"{name:<12} complete, skipped")
            self._after(name, known["result"])
            return {**known, "skipped": True}
        if name == "bundle":
            self._require_untouched("consolidate", "extract", "validate")
        record = self.paths.stages / f"{name}.json"
        self._say(f"{name:<12} ...")
        started = time.perf_counter()
        old = self.record(name)
        record.unlink(missing_ok=True)
        try:
            result = self._work(name, resume=resume, force=force, uncertified=uncertified)
        except ConfigError:  # refused: what was there is as complete as it was, for its own inputs
            if old:
                storage.publish_json(record, old)
            raise
        outputs = self._outputs(name)
        new = {
            "schema_version": SCHEMA_VERSION,
            "stage": name,
            "inputs": digest,
            "outputs": outputs,
            "result": result,
            "seconds": round(time.perf_counter() - started, 2),
        }
        storage.publish_json(record, new)
        self._say(f"{name:<12} done in {new['seconds']:.1f} s  {_brief(result)}")
        self._after(name, result)
        return {**new, "skipped": False}

    def dry_run(self, name: str) -> tuple[Path, int]:
        """The script that stage shard or tokenize would submit to Slurm first, written and checked, and its number of tasks."""
        from pipeline.data.documents.shard import shard_documents
        from pipeline.data.executor.jobs import DryRun
        from pipeline.data.tokens.tokenize import tokenize_documents

        work = {"shard": shard_documents, "tokenize": tokenize_documents}[name]
        try:
            work(self.config, self.paths, dry_run=True)
        except DryRun as dry_run:
            return dry_run.script, dry_run.tasks
        raise AssertionError("a dry run ends at the first script")

    def record(self, name: str) -> dict[str, Any] | None:
        """What a finished stage left, None when it has not finished."""
        path = self.paths.stages / f"{name}.json"
        if not path.exists():
            return None
        try:
            record: dict[str, Any] = storage.read_json(path, schema_version=SCHEMA_VERSION)
        except (UserError, OSError):  # damaged, or of another version: the stage is done again
            return None
        whole = isinstance(record.get("inputs"), str) and all(
            isinstance(record.get(k), dict) for k in ("outputs", "result")
        )
        return record if whole and (name != "validate" or "verdict" in record["result"]) else None

    def _clean(self) -> None:
        """Remove what killed stages left half-written beside their outputs."""
        for output in ("weights", "g_lm", "bundle"):
            for path in [*self.paths.root.glob(f".{output}.*.tmp"), *self.paths.root.glob(f".{output}.*.old")]:
                shutil.rmtree(path, ignore_errors=True)

    def _inputs(self, name: str) -> dict[str, Any]:
        """Everything that decides a stage's output."""
        config = self.config.as_dict()
        of_stage: dict[str, Any] = {
            "shard": {},
            "tokenizer": {**config["tokenizer"], "vocab_size": config["model"]["vocab_size"]},
            "tokenize": {
                **{k: v for k, v in config["tokens"].items() if k != "workers"},
                "context_length": config["model"]["context_length"],
            },
            "train": {k: config[k] for k in ("model", "train", "seed")},
            "consolidate": {},
            "extract": {k: config["post"][k] for k in ("g_from", "prompts")},
            "validate": {k: v for k, v in config["post"].items() if k not in (*OF_BUNDLE, "sample_prompt", "ranks")}
            | {"model": config["model"]},  # which the checkpoint has to be of
            "bundle": {k: config["post"][k] for k in OF_BUNDLE} | {"tracking": config["tracking"]},
        }[name]
        inputs: dict[str, Any] = {"config": of_stage, **({"form": FORMS[name]} if name in FORMS else {})}
        if name == "shard":
            from pipeline.data.documents.shard import stage_inputs

            inputs = stage_inputs(self.config)
        else:
            before = self.record(UPSTREAM[name])
            if before is None:
                raise ConfigError(f"stage {name}: {UPSTREAM[name]} has not finished; run `pldr {UPSTREAM[name]}` first")
            earlier = [self.record(stage) for stage in NAMES[: NAMES.index(name)]]
            inputs["before"] = [_identity(record["result"]) for record in earlier if record is not None]
        if name == "train" and config["train"]["deepspeed"] is not None:
            config["train"]["deepspeed"] = _json_in(config["train"]["deepspeed"])  # on Kubernetes it has another path
        if name == "tokenizer" and self.config.tokenizer.model is not None:
            given = Path(self.config.tokenizer.model)
            if not given.is_file():
                raise ConfigError(
                    f"tokenizer.model: {given}: no such file; name a SentencePiece .model, or null to train one"
                )
            inputs["given"] = storage.sha256_file(given)
        return inputs

    def _outputs(self, name: str) -> dict[str, Facts]:
        """Each output file's size, time and hash, by its path (below run_dir: relative to it) or URL."""
        paths = self.paths
        folder = {"shard": documents_folder(self.config), "tokenize": tokens_folder(self.config)}.get(name)
        if folder is not None and not is_local(folder):
            return remote_outputs(folder)
        if name == "train":
            newest = committed(paths.checkpoints)[-1]
            files = [newest / COMMITTED, newest / storage.MANIFEST]
        else:
            where = {
                "tokenizer": paths.tokenizer.parent,
                "consolidate": paths.weights,
                "extract": paths.g_lm,
                "validate": paths.certificate,
                "bundle": paths.bundle,
            }
            root = where[name] if folder is None else local_path(folder).absolute()
            files = sorted(p for p in root.rglob("*") if p.is_file() and not p.name.startswith("."))
        inside = {p: str(p.relative_to(paths.root)) if p.is_relative_to(paths.root) else str(p) for p in files}
        return {label: facts_of(path) for path, label in inside.items()}

    def _changed(self, record: dict[str, Any], *, thorough: bool) -> str | None:
        return first_changed(record["outputs"], self.paths.root, thorough=thorough)

    def _require_untouched(self, *names: str) -> None:
        """Raise UserError naming the first output of these stages that somebody has changed since: what is packaged is what
        the stages wrote."""
        for name in names:
            record = self.record(name)
            if record and (changed := self._changed(record, thorough=True)):
                raise UserError(
                    f"{self.paths.root / changed}: changed since `pldr {name}` wrote it; run `pldr {name} CONFIG` again"
                )

    def _work(self, name: str, *, resume: str, force: bool, uncertified: bool) -> dict[str, Any]:
        config, paths = self.config, self.paths
        if name == "shard":
            from pipeline.data.documents.shard import shard_documents

            return shard_documents(config, paths)
        if name == "tokenizer":
            from pipeline.data.tokens.train_tokenizer import make_tokenizer

            return make_tokenizer(config, paths)
        if name == "tokenize":
            from pipeline.data.tokens.tokenize import tokenize_documents

            return tokenize_documents(config, paths)
        if name == "train":
            return pretrain(
                config, paths, resume=resume, launch=self._launch, say=self._say, force=force, ranks=self._ranks
            )
        from pipeline.stages import post, validate

        if name == "consolidate":
            return post.consolidate_newest(config, paths)
        if name == "extract":
            return post.extract(config, paths)
        if name == "validate":
            return validate.certify(config, paths)
        assert name == "bundle", name
        return post.package(config, paths, uncertified=uncertified)

    def _after(self, name: str, result: dict[str, Any]) -> None:
        if name == "validate" and result["verdict"] != "certified":
            failed = "; ".join(f"{f['measure']}: {f['mend']}" for f in result["failed"])
            raise UserError(
                f"the certificate did not pass ({failed}); see {self.paths.certificate / 'certificate.json'}; "
                "`pldr bundle CONFIG --uncertified` packages it all the same",
                exit_code=3,
                details={"failed": result["failed"]},
            )


def _json_in(path: str) -> Any:
    """What a file holds; of one that cannot be read, its name (training tells what is wrong with it)."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return path


@contextmanager
def exclusive(config: RunConfig, say: Say) -> Iterator[None]:
    """One process at a time works in a run directory; a second one waits (and then finds everything done)."""
    root = RunPaths(config.run_dir).root
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not (root / LOCK).exists() and any(root.iterdir()):
            raise ConfigError(f"run_dir {root}: holds files that are no run's; name a new or empty folder")
        stream = open(root / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 - held for the whole run
    except OSError as error:
        raise ConfigError(f"run_dir {root}: {error.strerror}; set run_dir to a folder that can be written") from error
    with stream:
        if not storage.lock(stream):
            say(f"{root}: process {storage.lock_holder(stream)} works here; waiting for it to end")
            storage.lock(stream, wait=True)
        yield


def _identity(result: dict[str, Any]) -> Any:
    """What of a stage's result identifies its output to the next stage."""
    keys = ("fingerprint", "sha256", "checkpoint", "run_id", "weights_sha256", "g_lm_sha256", "certificate_sha256")
    return {key: result[key] for key in keys if key in result}


def _brief(result: dict[str, Any]) -> str:
    """The few plain values of a result, for one line."""
    plain = {k: v for k, v in result.items() if isinstance(v, int | float | str) and not isinstance(v, bool)}
    parts = [f"{k}={json.dumps(v) if isinstance(v, float) else str(v)[:12]}" for k, v in plain.items()]
    return "  ".join(parts[:6])
