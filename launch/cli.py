"""The `pldr` command: `pldr VERB CONFIG [key=value ...] [--json]`.

With --json the last line of stdout is one JSON object with the result. Exit 0 done, 1 failed, 2 wrong usage or
configuration, 3 the certificate did not pass. A user's mistake is one line on stderr, never a traceback.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from launch.backends.command import add_launch_verbs
from launch.commands.bundle import add_bundle_verbs, long_name
from launch.commands.data import add_bench_options, add_data_verbs, bench_data
from launch.commands.doctor.command import add_doctor_verb
from launch.commands.runs import add_run_verbs
from launch.commands.sweep import add_sweep_verb
from launch.commands.terminal import say as _show
from launch.commands.terminal import status_lines
from pipeline.config.load import load_config
from pipeline.config.run import RunConfig
from pipeline.errors import ConfigError, Stopped, UserError
from pipeline.io.storage import explain_os_error
from pipeline.stages.runner import Pipeline, exclusive
from pipeline.stages.table import STAGES

Result = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    arguments = parse(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    signal.signal(signal.SIGTERM, _interrupted)
    exit_code = 0
    try:
        result = arguments.work(arguments, _show)
    except Stopped as stop:
        result = {"stopped": str(stop), **stop.details}
        exit_code = stop.exit_code
        _show(str(stop))
    except UserError as error:
        return _fail(arguments, str(error), error.exit_code, **error.details)
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        return _fail(arguments, str(explain_os_error(error, error.filename or arguments.verb)), 1)
    except KeyboardInterrupt:
        return _fail(arguments, "stopped; start again to go on", 1)
    if arguments.json:
        print(json.dumps(_finite(result), ensure_ascii=False, allow_nan=False))
    return exit_code


def _fail(arguments: argparse.Namespace, message: str, exit_code: int, **details: Any) -> int:
    """One line for a person, and with --json one object for a program."""
    print(f"pldr: error: {message}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(_finite({"error": message, "exit_code": exit_code, **details}), ensure_ascii=False))
    return exit_code


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; `key=value` may stand before, between and after the options."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(long_name(sys.argv[1:] if argv is None else argv))
    for word in rest:
        if word.startswith("-") or "=" not in word or not hasattr(arguments, "overrides"):
            parser.error(f"unrecognized argument: {word}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def build_parser() -> argparse.ArgumentParser:
    """Every verb and its options."""
    parser = argparse.ArgumentParser(prog="pldr", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="end with one line of JSON")

    def verb(name: str, work: Callable[[Any, Callable[[str], None]], Result], help: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=help, description=help, parents=[common])
        sub.set_defaults(work=work)
        return sub

    def with_config(sub: argparse.ArgumentParser) -> argparse.ArgumentParser:
        sub.add_argument("config", metavar="CONFIG", help="YAML of the run")
        sub.add_argument(
            "overrides", nargs="*", metavar="key=value", help="override a key, for example train.steps=100"
        )
        return sub

    with_config(verb("run", _run, "the whole pipeline, from corpora to a certified bundle"))
    for stage in STAGES:
        name = stage.name
        sub = with_config(verb(name, _stage, stage.help))
        also = "; go on with other data, model or tokenizer than the checkpoint's" if name == "train" else ""
        sub.add_argument("--force", action="store_true", help=f"do it again even if it is complete{also}")
        if stage.has_dry_run:
            sub.add_argument(
                "--dry-run",
                action="store_true",
                help="data.executor=slurm: write the job's script, check it, submit nothing",
            )
        if name == "train":
            sub.add_argument(
                "--resume",
                default="auto",
                metavar="auto|RUN_ID|runs:/RUN_ID[/checkpoints/step-000500]|PATH",
                help="go on from a run's newest checkpoint (auto), from that one, or in a run of its own from PATH",
            )
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
    sub = with_config(verb("plan", _plan, "parameters, FLOPs, memory, time and invariance budget of a run"))
    sub.add_argument("--mfu", type=float, default=0.4, help="model FLOPs utilisation to assume (0.4)")
    sub.add_argument("--peak-tflops", type=float, default=989.0, help="dense peak of one device (989: H100/H200, bf16)")
    sub.add_argument("--devices", type=int, default=8)
    sub = verb("generate", _generate, "continue prompts with a bundle")
    sub.add_argument("bundle", metavar="BUNDLE", help="a bundle folder")
    sub.add_argument("--prompt", action="append", required=True, help="text to continue; several make a batch")
    sub.add_argument("--max-new-tokens", type=int, default=100)
    sub.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    sub.add_argument("--top-k", type=int, default=0)
    sub.add_argument("--top-p", type=float, default=1.0)
    sub.add_argument("--stop", action="append", default=[], help="end before this text; may be given several times")
    sub.add_argument("--seed", type=int, default=None)
    sub = verb("parity", _parity, "compare with a golden case of the reference implementation")
    sub.add_argument("directory", metavar="DIR")
    add_data_verbs(verbs, common)
    add_run_verbs(verbs, common)
    add_launch_verbs(verbs, common)
    add_doctor_verb(verbs, common)
    add_sweep_verb(verbs, common)
    sub = verb(
        "bench", _bench, "time the model against its SDPA twin; train: DeepSpeed and saving; data: tokenising, loading"
    )
    sub.add_argument(
        "config",
        metavar="CONFIG|train CONFIG|data",
        help="YAML of the run, behind the word train or not; or the word data",
    )
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the YAML")
    sub.add_argument("--steps", type=int, help="with CONFIG: timed training steps of each model (10)")
    sub.add_argument("--batch", type=int, help="with CONFIG: sequences in a training step (4)")
    add_bench_options(sub)
    sub = verb("import", _import, "reference checkpoint (.pth, .safetensors) -> our safetensors")
    sub.add_argument("source", metavar="CHECKPOINT")
    sub.add_argument("target", metavar="FOLDER")
    sub.add_argument(
        "--model", metavar="CONFIG", help="JSON of the model, or the YAML of a run (else read off the shapes)"
    )
    sub.add_argument(
        "--context-length", type=int, default=1024, help="without --model: the shapes do not tell it (1024)"
    )
    sub.add_argument(
        "--rope-style", choices=("interleaved", "half"), default="interleaved", help="without --model; v52: half"
    )
    sub = verb("export", _export, "our safetensors -> reference checkpoint (.pth or .safetensors)")
    sub.add_argument("source", metavar="FOLDER")
    sub.add_argument("target", metavar="CHECKPOINT")
    add_bundle_verbs(verbs, common)
    return parser


def _pipeline(arguments: Any, show: Callable[[str], None]) -> Pipeline:
    from launch.backends.deepspeed import launch

    config = load_config(arguments.config, arguments.overrides)
    live = status_lines(json=arguments.json)

    def start(config: RunConfig, job_file: Any, ranks: int) -> None:
        launch(config, job_file, ranks, show=lambda text: live(f"  {text}"))

    return Pipeline(config, launch=start, report=lambda text: _show(text))


def _run(arguments: Any, show: Callable[[str], None]) -> Result:
    from launch.commands.stage import summary

    pipeline = _pipeline(arguments, show)
    with exclusive(pipeline.paths, _show):
        records = pipeline.run()
        return summary(pipeline, records, _show)


def _stage(arguments: Any, show: Callable[[str], None]) -> Result:
    pipeline = _pipeline(arguments, show)
    with exclusive(pipeline.paths, _show):
        if getattr(arguments, "prepare", None) is not None:
            return _prepare(pipeline, arguments)
        if getattr(arguments, "dry_run", False):
            script, tasks = pipeline.dry_run(arguments.verb)
            _show(f"{script}: {tasks} tasks; checked, nothing was submitted")
            return {"script": str(script), "tasks": tasks}
        return pipeline.stage(
            arguments.verb,
            resume=getattr(arguments, "resume", "auto"),
            force=arguments.force,
            uncertified=getattr(arguments, "uncertified", False),
        )


def _prepare(pipeline: Pipeline, arguments: Any) -> Result:
    """The job file of a training over several nodes, and the command that starts it."""
    from pipeline.stages.train import prepare

    if arguments.prepare < 1:
        raise ConfigError(f"--prepare {arguments.prepare}: give the number of ranks on all nodes, 1 or more")
    job = prepare(
        pipeline.config,
        pipeline.paths,
        resume=arguments.resume,
        ranks=arguments.prepare,
        report=_show,
        force=arguments.force,
    )
    command = f"deepspeed --hostfile HOSTFILE --module pipeline.worker {shlex.quote(str(job.file))}"
    _show(f"start       {command}\nthen        pldr run {arguments.config}")
    start = None if job.start is None else job.start.name
    return {"job": str(job.file), "run_id": job.run.id, "resumed_from": start, "command": command}


def _plan(arguments: Any, show: Callable[[str], None]) -> Result:
    from pipeline.config.plan import plan, plan_lines

    if not 0 < arguments.mfu <= 1 or arguments.devices < 1 or arguments.peak_tflops <= 0:
        raise ConfigError("plan: --mfu is between 0 and 1, --devices and --peak-tflops are positive")
    config = load_config(arguments.config, arguments.overrides)
    report = plan(config, mfu=arguments.mfu, peak_tflops=arguments.peak_tflops, devices=arguments.devices)
    _show("\n".join(plan_lines(report)))
    return report


def _generate(arguments: Any, show: Callable[[str], None]) -> Result:
    from pipeline.inference.runtime import Bundle

    bundle = Bundle.load(arguments.bundle)
    texts = bundle.generate(
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        stop=arguments.stop,
        seed=arguments.seed,
    )
    for prompt, text in zip(arguments.prompt, texts, strict=True):
        _show(f"{prompt}{text}\n")
    return {"completions": texts, "certified": bundle.certified}


def _parity(arguments: Any, show: Callable[[str], None]) -> Result:
    from pldr_model.parity import parity

    try:
        result = parity(arguments.directory)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    for key, value in result.items():
        _show(f"{key:<32} {value}")
    return result


def _bench(arguments: Any, show: Callable[[str], None]) -> Result:
    if arguments.config == "data":
        return bench_data(arguments, _show)
    if arguments.config == "train":
        return _bench_train(arguments)
    from pldr_model.bench import bench

    if arguments.text is not None or arguments.tokenizer is not None:
        raise ConfigError("bench: --text and --tokenizer go with `pldr bench data`")
    config = load_config(arguments.config, arguments.overrides)
    try:
        result = bench(config.model, batch_size=arguments.batch or 4, steps=arguments.steps or 10)
    except ValueError as error:
        raise ConfigError(f"{arguments.config}: bench: {error}") from None
    for key, value in result.items():
        _show(f"{key:<32} {value}")
    return result


def _bench_train(arguments: Any) -> Result:
    from launch.backends.job import free_port
    from pipeline.bench.train import bench

    files = [word for word in arguments.overrides if "=" not in word]
    if len(files) != 1:
        raise ConfigError("bench train: name one YAML: pldr bench train CONFIG [key=value ...]")
    config = load_config(files[0], [word for word in arguments.overrides if "=" in word])
    result = bench(config, port=free_port(), steps=arguments.steps or 20, batch=arguments.batch)
    for key, value in result.items():
        _show(f"{key:<32} {value:.4g}" if isinstance(value, float) else f"{key:<32} {value}")
    return result


def _import(arguments: Any, show: Callable[[str], None]) -> Result:
    from launch.commands.convert import import_reference

    return import_reference(
        arguments.source,
        arguments.target,
        model=arguments.model,
        context_length=arguments.context_length,
        rope_style=arguments.rope_style,
        show=_show,
    )


def _export(arguments: Any, show: Callable[[str], None]) -> Result:
    from launch.commands.convert import export_reference

    return export_reference(arguments.source, arguments.target, _show)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _interrupted(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
