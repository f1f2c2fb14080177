"""`pldr sweep --slurm`: the unfinished children of a sweep as one Slurm job array, and waiting for it.

An element runs `pldr sweep SWEEP --only NUMBER` on one node (templates/sweep.sbatch), and requeues itself as a training does
(slurm.py). The process that submitted the array waits and writes the table. Stopped, it leaves the array running; the next
start waits for the same array. Once that is over, it submits what is not complete and did not fail: where variants are compared
at their best (pipeline/sweep/compare.py), a second array has the other seeds.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Sequence
from typing import Any

from launch.backends.dry_run import dry_run
from launch.backends.job import Report
from launch.backends.local_sweep import last_error
from launch.backends.scheduled import ScheduledJob, fill_in
from launch.backends.slurm import SlurmOptions, check, fixes_of, frame, inside, mark_of
from pipeline import slurm
from pipeline.data.executor.watch import Watch
from pipeline.errors import ConfigError, UserError
from pipeline.io import storage
from pipeline.stages.runner import exclusive
from pipeline.sweep import apart
from pipeline.sweep.sweep import Sweep
from pipeline.train.deepspeed_config import accumulation_steps

SCRIPT, ARRAY = "sweep.sbatch", "sweep-array.json"  # in the sweep's logs/; the array that was submitted last
LOOK_S = 10.0  # between two looks into the queue: many users share the controller
GONE = 3  # looks in a row without the array: it is over
ENDS = {  # what to do about an element that ended so
    "TIMEOUT": "raise --time",
    "OUT_OF_MEMORY": "raise --sbatch mem=…",
    "CANCELLED": "someone canceled it",
    "NODE_FAIL": "its node was lost",
    "PREEMPTED": "a job of higher priority took its node",
}


def sweep_on_slurm(
    sweep: Sweep,
    job: ScheduledJob,
    options: SlurmOptions,
    words: Sequence[str],
    *,
    at_once: int,
    dry: bool,
    report: Report,
) -> dict[str, Any]:
    """Submit the array and wait for it; the table. words: the YAML and the overrides. Raises UserError or ConfigError."""
    if at_once < 1:
        raise ConfigError(f"--at-once {at_once}: at least 1")
    for child in sweep.children:
        accumulation_steps(child.config.train, job.ranks)  # raises when they do not divide
    file = sweep.paths.logs / SCRIPT
    left = apart.unfinished(sweep)
    script = render(sweep, job, options, words, left or {1: sweep.children[0].name}, at_once=at_once)
    check(script, file)  # before anything is made
    if dry:
        return dry_run({file: script}, [slurm.submit_command(file)], slurm.environment(), report=report)
    apart.report_stores(sweep, report)
    with exclusive(sweep.paths, report):
        parent = sweep.open_parent()
        status = "KILLED"
        try:
            errors = _arrays(sweep, job, options, words, parent, at_once=at_once, report=report)
            table = apart.collect(sweep, parent, errors)
            rows = table.pop("rows")
            if waiting := apart.unfinished(sweep, errors):
                report(f"children    {len(waiting)} more are to run: start the sweep again")
            status = "FAILED" if any(row["status"] == "failed" for row in rows) else "FINISHED"
        finally:
            sweep.log(parent, {}, status=status)
    return sweep.result(parent, rows, table)


def render(
    sweep: Sweep,
    job: ScheduledJob,
    options: SlurmOptions,
    words: Sequence[str],
    children: dict[int, str],
    *,
    at_once: int,
) -> str:
    """The batch script. children: number -> name, of those that are to run. Raises ConfigError."""
    return fill_in(
        SCRIPT,
        {
            **frame(sweep.config, sweep.paths, job, options),
            "array": f"{ranges(sorted(children))}%{at_once}",
            "children": children,
            "folder": str(sweep.paths.root / "children"),
            "job": "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID",  # SLURM_JOB_ID of one element is the whole array's
            "again": "start the sweep again",
            "arguments": inside(words),
        },
    )


def ranges(numbers: Sequence[int]) -> str:
    """`1-3,7` for 1, 2, 3, 7."""
    runs = [list(run) for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ",".join(f"{run[0][1]}" if len(run) == 1 else f"{run[0][1]}-{run[-1][1]}" for run in runs)


def _arrays(
    sweep: Sweep,
    job: ScheduledJob,
    options: SlurmOptions,
    words: Sequence[str],
    parent: str,
    *,
    at_once: int,
    report: Report,
) -> dict[str, str]:
    """Submit what is left and wait for it: again, where others were to wait for its results, unless somebody canceled some of
    it. child -> why it is not complete, of those that ran."""
    errors: dict[str, str] = {}
    array = _running(sweep)
    if array is not None:
        report(f"waiting     for Slurm job {array} of an earlier start, with its settings (scancel {array} to end it)")
    while array is not None or (left := apart.unfinished(sweep, errors)):
        if array is None:
            apart.make_shared_data(sweep, report=report)
            script = render(sweep, job, options, words, left, at_once=at_once)
            file = sweep.paths.logs / SCRIPT
            check(script, file)
            storage.publish_bytes(file, script.encode())
            array = slurm.submit(file, (), fixes_of(job, options))
            record = {"schema_version": 1, "job": array, "children": list(left.values())}
            storage.publish_json(sweep.paths.logs / ARRAY, record)
            report(f"submitted   Slurm job {array}: {len(left)} of {len(sweep.children)} children, {at_once} at once")
        ended = _follow(sweep, parent, array, fixes_of(job, options), report)
        errors |= _errors(sweep, array, ended)
        if any(text.startswith("ended as CANCELLED") for text in errors.values()):
            break
        array = None
    return errors


def _running(sweep: Sweep) -> str | None:
    """The array of this sweep that is queued or runs, if there is one."""
    ids = [job.id for job in slurm.queue() if not job.ended and job.name.endswith(f"-{mark_of(sweep.paths)}")]
    return ids[0] if ids else None


def _follow(sweep: Sweep, parent: str, array: str, fixes: dict[str, str], report: Report) -> dict[str, str]:
    """Wait until the array is over; how its elements ended, as far as the queue showed it. The table grows with each child."""
    watch, gone, known = Watch([array], fixes=fixes, ends=ENDS), 0, 0
    try:
        while gone < GONE:
            there = watch.look()
            gone = 0 if there is None or there else gone + 1
            complete = apart.complete(sweep)
            if len(complete) != known:
                report(f"children    {len(complete)} of {len(sweep.children)} are complete")
                apart.collect(sweep, parent, {})
                known = len(complete)
            if _children_of(sweep, array) <= complete:
                break
            time.sleep(LOOK_S if there else 1.0)
    except KeyboardInterrupt:
        report(f"Slurm job {array} keeps running: start again to wait for it, or cancel it with: scancel {array}")
        raise
    return watch.ended


def _errors(sweep: Sweep, array: str, ended: dict[str, str]) -> dict[str, str]:
    """child -> why it is not complete, of those of the array that are not."""
    errors = {}
    left = _children_of(sweep, array) - apart.complete(sweep)
    for number, name in ((n, child.name) for n, child in enumerate(sweep.children, start=1) if child.name in left):
        element = f"{array}_{number}"
        output = sweep.paths.logs / f"sweep-{element}.out"
        state = slurm.state_at_end(element, output, ended.get(element))
        fix = f"; {ENDS[state]}" if state in ENDS else ""
        errors[name] = f"ended as {state} in Slurm job {element}, {output}: {last_error(output)}{fix}"
    return errors


def _children_of(sweep: Sweep, array: str) -> set[str]:
    """The names of the children that an array runs: of one of an earlier version all that are not complete."""
    with contextlib.suppress(UserError):
        record = storage.read_json(sweep.paths.logs / ARRAY)
        if record["job"] == array and "children" in record:
            return set(record["children"])
    return set(apart.unfinished(sweep).values())
