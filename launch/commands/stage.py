"""`pldr run`, the stages one by one, `pldr train --prepare`, and `pldr plan`."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from launch.commands.plan_options import add_cluster_options, cluster_values, wants_cluster
from launch.commands.terminal import status_lines
from launch.commands.verbs import Report, Result, Verbs, add_config
from pipeline.errors import ConfigError, UserError
from pipeline.stages.table import STAGES

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.config.run import RunConfig
    from pipeline.stages.preflight import Finding
    from pipeline.stages.runner import Pipeline


def add_stage_verbs(verbs: Verbs) -> None:
    """The verb `run`, one for each stage, and `plan`."""
    sub = verbs.add("run", _run, "the whole pipeline, from corpora to a certified bundle", is_work=True)
    add_config(sub)
    _add_going_on(sub)
    add_config(
        verbs.add("check", _check, "what would fail later: sources, tokenizer, batch, memory, disk, MLflow, budget")
    )
    for stage in STAGES:
        name = stage.name
        sub = verbs.add(name, _stage, stage.help, is_work=True)
        add_config(sub)
        also = "; continue with other data, model or tokenizer than the checkpoint's" if name == "train" else ""
        sub.add_argument("--force", action="store_true", help=f"do it again even if it is complete{also}")
        if stage.data is not None:
            sub.add_argument(
                "--replace",
                action="store_true",
                help=f"replace {stage.data} that another configuration made, or that a model here was trained with",
            )
        if stage.has_dry_run:
            sub.add_argument(
                "--dry-run",
                action="store_true",
                help="data.executor=slurm: write the job's script, check it, submit nothing",
            )
        if name == "train":
            _add_going_on(sub)
            sub.add_argument(
                "--prepare",
                type=int,
                metavar="RANKS",
                help="only write the job for this many ranks and show how to start it",
            )
        if name == "bundle":
            sub.add_argument(
                "--uncertified", action="store_true", help="package without a passing certificate, marked so"
            )
            sub.add_argument(
                "--with-metric-learner",
                action="store_true",
                help="keep the metric learner in a file of its own (post.with_metric_learner=true)",
            )
    sub = verbs.add("plan", _plan, "parameters, FLOPs, memory, time and invariance budget of a run")
    add_config(sub)
    _add_anneal(sub)
    sub.add_argument("--mfu", type=float, help="model FLOPs utilization to assume (0.4)")
    sub.add_argument("--peak-tflops", type=float, help="dense peak of one device (989: H100/H200, bf16)")
    sub.add_argument("--devices", type=int, help="how many (8; without a GPU and these options: this machine's CPU)")
    add_cluster_options(sub)


def _add_going_on(sub: argparse.ArgumentParser) -> None:
    """Where training begins."""
    begins = sub.add_mutually_exclusive_group()
    begins.add_argument(
        "--resume",
        default="auto",
        metavar="auto|RUN_ID|runs:/RUN_ID[/checkpoints/step-000500]|PATH",
        help="continue from a run's newest checkpoint (auto), from that one, or in a new run from PATH, with its data",
    )
    _add_anneal(begins)


def _add_anneal(sub: argparse._ActionsContainer) -> None:
    sub.add_argument(
        "--anneal-from",
        metavar="step-000500|PATH|runs:/RUN_ID/checkpoints/step-000500",
        help="the decay of a WSD schedule, from that checkpoint of its stable part on, as a run of its own",
    )


def _pipeline(arguments: Any, report: Report) -> Pipeline:
    from pipeline.config.load import load_config

    anneals = getattr(arguments, "anneal_from", None) is not None
    if not anneals:  # first: a wrong key must not wait for the imports below
        config = load_config(arguments.config, arguments.overrides)
    from launch.commands.going_on import annealed, with_data
    from pipeline.stages.runner import Pipeline

    config = annealed(arguments, report) if anneals else config
    config = with_data(config, arguments, report)

    live = status_lines(json=arguments.json)

    def start(config: RunConfig, job_file: Path, ranks: int) -> None:
        from launch.backends.deepspeed import launch

        launch(config, job_file, ranks, report=live)

    return Pipeline(config, launch=start, report=report)


def _run(arguments: Any, report: Report) -> Result:
    pipeline = _pipeline(arguments, report)
    from launch.commands.going_on import with_command
    from pipeline.stages.preflight import lines
    from pipeline.stages.resume import parse_resume
    from pipeline.stages.runner import exclusive

    findings = _preflight(pipeline, begins=parse_resume(arguments.resume).path, goes_on=arguments.resume != "auto")
    for line in lines([finding for finding in findings if finding.status == "warn"]):
        report(line)
    _require_ready(findings, report)
    with exclusive(pipeline.paths, report), with_command(pipeline, arguments):
        records = pipeline.run(resume=arguments.resume)
        from launch.commands.summary import summary  # with torch, 250 MB that training does not need here

        return summary(pipeline, records, report)


def _check(arguments: Any, report: Report) -> Result:
    from pipeline.stages.preflight import lines

    findings = _preflight(_pipeline(arguments, report))
    for line in lines([finding for finding in findings if finding.status != "FAIL"]):
        report(line)
    _require_ready(findings, report)
    return {"findings": [asdict(finding) for finding in findings]}


def _preflight(pipeline: Pipeline, *, begins: Path | None = None, goes_on: bool = False) -> list[Finding]:
    from pipeline.stages.preflight import preflight

    return preflight(pipeline.config, done=pipeline.finished(), begins=begins, goes_on=goes_on)


def _require_ready(findings: list[Finding], report: Report) -> None:
    """Tell what failed, all at once. Raises UserError if anything did."""
    from pipeline.stages.preflight import lines

    failed = [finding for finding in findings if finding.status == "FAIL"]
    if not failed:
        return
    text = failed[0].text
    if len(failed) > 1:
        for line in lines(failed):
            report(line)
        text = f"{len(failed)} things would fail later: {', '.join(one.about for one in failed)}; see above"
    raise UserError(text, exit_code=2, details={"findings": [asdict(finding) for finding in findings]})


def _stage(arguments: Any, report: Report) -> Result:
    if getattr(arguments, "with_metric_learner", False):
        arguments.overrides = [*arguments.overrides, "post.with_metric_learner=true"]
    pipeline = _pipeline(arguments, report)
    from launch.commands.going_on import with_command
    from pipeline.stages.runner import exclusive

    with exclusive(pipeline.paths, report), with_command(pipeline, arguments):
        if getattr(arguments, "prepare", None) is not None:
            return _prepare(pipeline, arguments, report)
        if getattr(arguments, "dry_run", False):
            script, tasks = pipeline.dry_run(arguments.verb)
            report(f"{script}: {tasks} tasks; checked, nothing was submitted")
            return {"script": str(script), "tasks": tasks}
        return pipeline.stage(
            arguments.verb,
            resume=getattr(arguments, "resume", "auto"),
            force=arguments.force,
            uncertified=getattr(arguments, "uncertified", False),
            replace=getattr(arguments, "replace", False),
        )


def _prepare(pipeline: Pipeline, arguments: Any, report: Report) -> Result:
    """The job file of a training over several nodes, and the command that starts it."""
    from pipeline.stages.train import prepare

    if arguments.prepare < 1:
        raise ConfigError(f"--prepare {arguments.prepare}: give the number of ranks on all nodes, 1 or more")
    job = prepare(
        pipeline.config,
        pipeline.paths,
        resume=arguments.resume,
        ranks=arguments.prepare,
        report=report,
        force=arguments.force,
    )
    command = f"PYTHONSAFEPATH=1 deepspeed --hostfile HOSTFILE --module pipeline.worker {shlex.quote(str(job.file))}"
    report(f"start       {command}\nthen        pldr run {arguments.config}")
    start = None if job.start is None else job.start.name
    return {"job": str(job.file), "run_id": job.run.id, "resumed_from": start, "command": command}


def _plan(arguments: Any, report: Report) -> Result:
    from pipeline.config.load import load_config
    from pipeline.config.plan import plan, plan_lines

    given = {key: getattr(arguments, key) for key in ("mfu", "peak_tflops", "devices")}
    assumed = {key: value for key, value in given.items() if value is not None}
    if any(value <= 0 for value in assumed.values()) or assumed.get("mfu", 1) > 1:
        raise ConfigError("plan: --mfu is between 0 and 1, --devices and --peak-tflops are positive")
    if wants_cluster(arguments):
        cluster = cluster_values(arguments, assumed)
        assumed["devices"] = cluster["devices"]
    else:
        cluster = None
    if arguments.anneal_from is not None:
        from pipeline.stages.anneal import branch

        begins = branch(arguments.config, arguments.overrides, arguments.anneal_from, report, fetch=False)
        config, state = begins.config, begins.state
    else:
        config, state = load_config(arguments.config, arguments.overrides), None
    flops_here = None if assumed else _flops_of_this_cpu(config)
    result = plan(config, **assumed, flops_here=flops_here, begins=state or None)
    report("\n".join(plan_lines(result)))
    if cluster is not None:
        from pipeline.config.scale.cluster import Cluster
        from pipeline.config.scale.lines import scale_lines
        from pipeline.config.scale.report import scale

        result["scale"] = scale(config, Cluster(**cluster))
        report("\n".join(scale_lines(result["scale"])))
    return result


def _flops_of_this_cpu(config: RunConfig) -> float | None:
    """What training reaches here; None where there is a GPU."""
    from pipeline.devices import has_gpu
    from pldr_model.bench import training_flops_per_second

    if has_gpu():
        return None
    # In a larger model a step takes seconds, and one sequence fills the cores.
    small = config.model.num_parameters()["total"] < 10_000_000
    batch, steps = (config.train.micro_batch, 3) if small else (1, 1)
    shared = config.train.g_from == "batch"
    return training_flops_per_second(config.model, batch_size=batch, steps=steps, shared=shared)
