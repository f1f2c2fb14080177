"""What Slurm's commands say: the queue, why a job waits, how one ended, why sbatch refused one (Slurm 22.05 to 24.11).

A site may have no accounting (sacct then prints "Slurm accounting storage is disabled"), and the controller forgets a job
MinJobAge (300 s) after its end. So the state of a job that ended is asked of sacct, of the controller, and of the job's own
output, where slurmstepd writes why it killed something.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from pipeline.errors import UserError

ANSWER_S = 120.0  # squeue itself gives up earlier; a hanging file system or plugin does not
SURE = 3  # looks in a row with a reason that never passes: the scheduler changes its mind while nodes boot
TAIL_BYTES = 100_000  # of a job's output
ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}
WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"}
# Reasons that stay until somebody changes the job or the site's limits.
_NEVER = re.compile(
    r"Partition(Time|Node)Limit|PartitionConfig|BadConstraints|(QOS|Association)TimeLimit|Invalid(Account|QOS)|MaxMemPerLimit"
    r"|(Account|QOS)NotAllowed|DependencyNeverSatisfied|(Assoc|QOS)(Grp)?Max\w+Per(Job|Node)(Limit)?|QOSMin\w+"
)
_HELD = re.compile(r"JobHeld|JobHoldMaxRequeue|held\b")
# What a reason, or an error of sbatch, is about: the first pattern that is found.
_SUBJECTS = (
    ("unreachable", r"unable to contact|timed out|standby mode|connect failure"),
    ("array", r"job array"),
    ("policy", r"policy"),
    ("partition", r"partition (name|specified)"),  # before the others: a partition may be called gpu
    ("gpus", r"\bgres\b|GRES|generic resource|TRES|gpu"),
    ("memory", r"mem"),
    ("time", r"time.?limit|--time|Wall"),
    ("cpus", r"cpu|processor"),
    ("size", r"node configuration|partition configuration|PartitionConfig"),
    ("constraint", r"feature|constraint"),
    ("license", r"licen[sc]e"),
    ("reservation", r"reservation"),
    ("nodelist", r"node name"),
    ("nodes", r"node"),
    ("account", r"account|assoc"),
    ("qos", r"qos"),
    ("partition", r"partition|group not permitted"),
)
# What slurmstepd, and the kernel through it, write into a job's output.
_WRITTEN = {
    "OUT_OF_MEMORY": r"oom.kill|out.of.memory handler|exceeded (job |step )?memory limit",
    "TIMEOUT": r"DUE TO TIME LIMIT",
    "NODE_FAIL": r"DUE TO NODE FAILURE",
    "PREEMPTED": r"DUE TO PREEMPTION",
    "CANCELLED": r"slurmstepd.*\*\*\* (JOB|STEP) \S+ ON \S+ CANCELLED",
}
# Long options of sbatch in Slurm 22.05 to 24.11, from its manual pages.
OPTIONS = set(
    """
account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment constraint container container-id
contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency distribution error
exclude exclusive export export-file extra extra-node-info get-user-env gid gpu-bind gpu-freq gpus gpus-per-node
gpus-per-socket gpus-per-task gres gres-flags hint hold ignore-pbs input job-name kill-on-invalid-dep licenses mail-type
mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus network nice no-kill no-requeue nodefile nodelist nodes ntasks
ntasks-per-core ntasks-per-gpu ntasks-per-node ntasks-per-socket oom-kill-step open-mode output overcommit oversubscribe
parsable partition power prefer priority profile propagate qos quiet reboot requeue reservation resv-ports segment signal
sockets-per-node spread-job stepmgr switches test-only thread-spec threads-per-core time time-min tmp tres-bind tres-per-task
uid use-min-nodes verbose wait wait-all-nodes wckey wrap
""".split()  # noqa: SIM905  # a list of 120 strings is longer
)
# Of these, the ones that stand alone, and those of them that may have a value.
ALONE = set(
    """
contiguous exclusive get-user-env hold ignore-pbs nice no-kill no-requeue overcommit oversubscribe parsable propagate quiet
reboot requeue spread-job stepmgr test-only use-min-nodes verbose wait
""".split()  # noqa: SIM905
)
EITHER = {"exclusive", "get-user-env", "nice", "no-kill", "propagate"}


@dataclass(frozen=True)
class Job:
    """A line of the queue. id: an array has one; element: `12_3`, or `12_[4-9%2]` for those that wait."""

    id: str
    element: str
    state: str
    reason: str
    name: str

    @property
    def ended(self) -> bool:
        """It is over, and the controller still knows it."""
        return self.state in ENDED

    @property
    def waits(self) -> bool:
        """It has not started."""
        return self.state in WAITING

    @property
    def why(self) -> str:
        """Why it waits, in Slurm's words."""
        return self.state if self.reason in ("", "None") else self.reason


def queue() -> list[Job]:
    """Our jobs, also those that ended a moment ago. Raises UserError when the controller does not answer."""
    text = _ask("squeue", "--me", "--noheader", "--states=all", "--format=%F|%i|%T|%r|%j")
    lines = [line.strip().split("|", 4) for line in text.splitlines()]
    return [Job(*parts) for parts in lines if len(parts) == 5]


def never_starts(reason: str) -> bool:
    """Whether a job that waits for this reason waits for ever."""
    return _NEVER.match(reason) is not None


def release_hint(job: str, reason: str) -> str:
    """What to do about a held job; empty for another reason."""
    return f"; it is held: scontrol release {job}" if _HELD.search(reason) else ""


def give_up(name: str, jobs: Sequence[str], reason: str, fixes: Mapping[str, str]) -> NoReturn:
    """Cancel jobs that can never start. Raises UserError with the reason and the fix."""
    cancel(jobs)
    raise UserError(f"{name} can never start ({reason}) and was canceled; {fix_of(reason, fixes)}")


def fix_of(words: str, fixes: Mapping[str, str]) -> str:
    """The fix for a reason or an error. fixes: by subject, and "" for anything else."""
    for subject, pattern in _SUBJECTS:
        if re.search(pattern, words, re.IGNORECASE):
            return fixes.get(subject, fixes[""])
    return fixes[""]


def wrong_value(name: str, value: str | None) -> str | None:
    """What is wrong with a value of this long option of sbatch, or with none; None: nothing. Only a plugin's option may have
    another name, and then a value."""
    if value is None and name not in ALONE:
        return f"it takes a value; write {name}=VALUE"
    if value is not None and name in ALONE - EITHER:
        return f"it takes no value; write {name}"
    return None


def submit_command(script: Path, arguments: Sequence[str] = ()) -> list[str]:
    """The command that submits a script and prints the job's id."""
    return ["sbatch", "--parsable", *arguments, str(script)]


def submit(script: Path, arguments: Sequence[str], fixes: Mapping[str, str]) -> str:
    """Submit a script; returns the job's id. Raises UserError with sbatch's words and the fix."""
    try:
        done = _run(submit_command(script, arguments), environment=environment())
    except FileNotFoundError:
        raise UserError(f"sbatch is not installed here; on a login node of the cluster: sbatch {script}") from None
    if done.returncode:
        words = _one_line(done.stderr)
        fixes = {**fixes, "unreachable": "the controller did not answer: look with squeue --me, and start again"}
        raise UserError(f"sbatch refused {script} ({words}); {fix_of(words, fixes)}")
    return done.stdout.strip().partition(";")[0]


def environment() -> dict[str, str]:
    """The environment of sbatch, without the variables of a Slurm job that this process may run in."""
    kept = ("SLURM_CONF", "SLURM_JWT")
    return {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k in kept}


def cancel(jobs: Sequence[str], *options: str) -> None:
    """Cancel jobs. A failure is not an error: they may be over."""
    _run(["scancel", *options, *jobs])


def state_at_end(element: str, output: Path, seen: str | None) -> str:
    """How a job, or an element of an array, ended, as far as anything knows it; otherwise "unknown".

    output: its log. seen: the state that the queue showed last.
    """
    state = _state_by_sacct(element) or _state_by_scontrol(element) or (seen if seen in ENDED else None)
    if state in (None, "FAILED", "CANCELLED"):  # without cgroups, a job that took too much memory "failed"
        state = _state_written(output) or state
    return state or "unknown"


def _state_by_sacct(element: str) -> str | None:
    words = _answer("sacct", "-n", "-X", "-P", "-j", element, "--format=State").split()  # "CANCELLED by 1000"
    return words[0] if words and words[0] in ENDED else None


def _state_by_scontrol(element: str) -> str | None:
    """The states that the controller knows; of an array without a number it shows every element."""
    found = re.findall(r"(?:^|\s)JobState=([A-Z_]+)", _answer("scontrol", "-o", "show", "job", element))
    return found[0] if found and found[0] in ENDED else None


def _state_written(output: Path) -> str | None:
    try:
        with open(output, "rb") as stream:
            stream.seek(max(0, output.stat().st_size - TAIL_BYTES))
            text = stream.read().decode("utf-8", "replace")
    except OSError:
        return None
    # The programs' own output does not count.
    lines = [line for line in text.splitlines() if re.search(r"slurm|oom", line)]
    for state, pattern in _WRITTEN.items():
        if any(re.search(pattern, line, re.IGNORECASE) for line in lines):
            return state
    return None


def _answer(*words: str) -> str:
    """What a command prints; nothing when it fails."""
    try:
        done = _run(words)
    except FileNotFoundError:
        return ""
    return "" if done.returncode else done.stdout


def _ask(*words: str) -> str:
    try:
        done = _run(words)
    except FileNotFoundError:
        raise UserError(f"{words[0]} is not installed here; run this on a login node of the cluster") from None
    if done.returncode:
        raise UserError(
            f"{words[0]} failed ({_one_line(done.stderr)}); submitted jobs may still run, start again later"
        )
    return done.stdout


def _run(words: Sequence[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            words, capture_output=True, text=True, errors="replace", env=environment, timeout=ANSWER_S
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(words, 1, "", f"{words[0]}: no answer in {ANSWER_S:g} s, timed out")


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
