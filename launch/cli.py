"""The `pldr` command: `pldr VERB CONFIG [key=value ...] [--json]`.

With --json the last line of stdout is one JSON object with the result. Exit 0 done, 1 failed, 2 wrong usage or
configuration, 3 the certificate did not pass. A user's mistake is one line on stderr, never a traceback.
"""

from __future__ import annotations

from launch.backends.standard_files import open_standard_files
from launch.backends.stop import stop_signals

if __name__ == "__main__":  # before the imports below
    open_standard_files()
    stop_signals.listen()

import argparse
import atexit
import gc
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from launch.commands.bench import add_bench_verb
from launch.commands.bundle import add_bundle_verbs
from launch.commands.config import add_config_verb
from launch.commands.convert import add_convert_verbs
from launch.commands.data import add_data_verbs
from launch.commands.doctor.command import add_doctor_verb
from launch.commands.evaluate import add_evaluate_verb
from launch.commands.hf import add_hf_verbs
from launch.commands.init import add_init_verb
from launch.commands.launch import add_launch_verbs
from launch.commands.runs import add_run_verbs
from launch.commands.stage import add_stage_verbs
from launch.commands.sweep import add_sweep_verb
from launch.commands.terminal import Display, report
from launch.commands.verbs import Verbs, long_name
from pipeline.errors import Caution, Stopped, UserError

GROUPS = {  # what `pldr --help` shows, by what one is about to do
    "a whole run": ("init", "check", "run", "plan", "config"),
    "data": ("shard", "tokenizer", "tokenize", "data"),
    "train": ("train", "runs", "report", "track"),
    "prove": ("consolidate", "extract", "validate", "parity"),
    "use": ("bundle", "verify", "generate", "evaluate", "export hf", "import hf", "import", "export"),
    "cluster": ("launch", "doctor", "sweep"),
    "tools": ("bench",),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code. argv: None for that of this process, which ends with it."""
    open_standard_files()
    if argv is not None or not stop_signals.listens:
        stop_signals.listen()
    if argv is None:
        atexit.register(stop_signals.ignore)  # the last thing that is done
    try:
        with Display(hurried=lambda: bool(stop_signals.names)) as display, warnings.catch_warnings():
            return _run(parse(argv), display)
    finally:
        if argv is not None:
            stop_signals.forget()


def _run(arguments: argparse.Namespace, display: Display) -> int:
    """Do a verb's work; the exit code."""
    display.whole = not arguments.is_work
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    warnings.filterwarnings("ignore", category=FutureWarning)
    _show_cautions(display)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    atexit.register(gc.freeze)  # else the last collection at exit walks all of torch or MLflow: a second (2026-11-28)
    stopped_code, exit_code = getattr(arguments, "stopped_code", 0) or 1, 0

    def interrupted(name: str) -> int:
        return _fail(arguments, display, f"stopped by {name}; start again to continue", stopped_code, stopped=name)

    try:
        stop_signals.begin(stopped_code, interrupted)
        result = arguments.work(arguments, report)
        stop_signals.end()
    except Stopped as stop:
        stop_signals.end()
        result = {"stopped": str(stop), **stop.details}
        exit_code = stop.exit_code
        report(str(stop))
    except UserError as error:
        return _fail(arguments, display, str(error), error.exit_code, **error.details)
    except OSError as error:
        from pipeline.io.storage import explain_os_error

        return _fail(arguments, display, str(explain_os_error(error, error.filename or arguments.verb)), 1)
    except KeyboardInterrupt as error:
        return interrupted(str(error) or "SIGINT")
    except Exception:
        if not stop_signals.names:
            raise
        # An import that was cut may be tried again, and fail otherwise (numpy).
        return interrupted(stop_signals.names[0])
    if arguments.json:
        display.result(json.dumps(_finite(result), ensure_ascii=False, allow_nan=False))
    return exit_code


def _show_cautions(display: Display) -> None:
    """A `Caution` is a line on stderr; other warnings stay as Python shows them."""
    show = warnings.showwarning

    def shown(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        if issubclass(category, Caution):
            display.error(f"pldr: warning: {message}")
        else:
            show(message, category, *rest)

    warnings.showwarning = shown  # type: ignore[assignment]
    warnings.simplefilter("always", Caution)


def _fail(arguments: argparse.Namespace, display: Display, message: str, exit_code: int, **details: Any) -> int:
    """One line for a person, and with --json one object for a program."""
    stop_signals.end()
    display.error(f"pldr: error: {message}")
    if arguments.json:
        display.result(json.dumps(_finite({"error": message, "exit_code": exit_code, **details}), ensure_ascii=False))
    return exit_code


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; `key=value` may stand before, between and after the options."""
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may come next; exits
        import argcomplete

        argcomplete.autocomplete(parser)
    words = long_name(sys.argv[1:] if argv is None else argv)
    if not words:
        parser.print_help()
        parser.exit(2)
    arguments, rest = parser.parse_known_args(words)
    for word in rest:
        if word.startswith("-") or "=" not in word or not hasattr(arguments, "overrides"):
            parser.error(f"unrecognized argument: {word}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


class Parser(argparse.ArgumentParser):
    """The parser of `pldr` itself: its help shows the verbs in groups."""

    verbs: Verbs

    def format_help(self) -> str:
        options = super().format_help().partition("\noptions:")[2]
        lines = [self.format_usage().rstrip(), "", *(self.description or "").strip().splitlines()]
        for group, names in GROUPS.items():
            lines += ["", f"{group}:", *(f"  {name:<12} {self.verbs.helps[name]}" for name in names)]
        return "\n".join([*lines, "", "options:"]) + options


def build_parser() -> Parser:
    """Every verb and its options. The files of `launch/commands` import what a verb needs when it runs, not here."""
    parser = Parser(prog="pldr", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--version", action="version", version=f"pldr {version('pldr')}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="end with one line of JSON")
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=argparse.ArgumentParser)
    parser.verbs = verbs = Verbs(subparsers, common)
    add_stage_verbs(verbs)
    add_config_verb(verbs)
    add_init_verb(verbs)
    add_bundle_verbs(verbs)
    add_evaluate_verb(verbs)
    add_data_verbs(verbs)
    add_run_verbs(verbs)
    add_launch_verbs(verbs)
    add_doctor_verb(verbs)
    add_sweep_verb(verbs)
    add_bench_verb(verbs)
    add_convert_verbs(verbs)
    add_hf_verbs(verbs)
    return parser


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
