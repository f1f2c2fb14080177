"""pipeline/slurm.py: how a job ended, with accounting and without; what a reason or a refusal is about."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline import slurm
from pipeline.errors import UserError
from tests.helpers.slurm_commands import FORGOTTEN, NO_ACCOUNTING, NO_ANSWER, install, scontrol_show

STEPD = "slurmstepd-sl1: error: *** JOB 44 ON sl1 CANCELLED AT 2026-11-28T09:31:20"
KERNEL = (
    "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=44.batch. Some of your processes may have been killed"
)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for stand-ins; nothing else of Slurm is on PATH."""
    folder = install(tmp_path / "bin", bash='exec /bin/bash "$@"')
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.mark.parametrize("state", ["TIMEOUT", "OUT_OF_MEMORY", "CANCELLED", "NODE_FAIL", "PREEMPTED", "FAILED"])
@pytest.mark.parametrize("known_to", ["sacct", "scontrol", "scontrol, no sacct", "squeue"])
def test_the_state_of_an_ended_task(commands: Path, tmp_path: Path, state: str, known_to: str) -> None:
    """Without accounting it was the J of JobId=."""
    install(commands, sacct=NO_ACCOUNTING, scontrol=FORGOTTEN)
    if known_to == "sacct":
        install(commands, sacct=f"echo '{state} by 1000'" if state == "CANCELLED" else f"echo {state}")
    elif known_to.startswith("scontrol"):
        install(commands, scontrol=scontrol_show(state))
    if known_to.endswith("no sacct"):
        (commands / "sacct").unlink()
    seen = state if known_to == "squeue" else None
    assert slurm.state_at_end("40_1", tmp_path / "none.out", seen) == state


@pytest.mark.parametrize(
    ("line", "state"),
    [
        (f"{STEPD} DUE TO TIME LIMIT ***", "TIMEOUT"),
        (f"{STEPD} DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***", "NODE_FAIL"),
        (f"{STEPD} DUE TO PREEMPTION ***", "PREEMPTED"),
        (f"{STEPD} ***", "CANCELLED"),
        (f"slurmstepd-sl1: error: Exceeded job memory limit\n{STEPD} ***", "OUT_OF_MEMORY"),
        (KERNEL, "OUT_OF_MEMORY"),
        ("the program says: out of memory handler, DUE TO TIME LIMIT", "unknown"),
    ],
)
def test_what_the_task_wrote_when_nothing_else_is_known(commands: Path, tmp_path: Path, line: str, state: str) -> None:
    install(commands, sacct=NO_ACCOUNTING, scontrol=FORGOTTEN)
    output = tmp_path / "40_1.out"
    output.write_text(f"some output\n{line}\n")
    assert slurm.state_at_end("40_1", output, None) == state
    if state == "OUT_OF_MEMORY":  # jobacct_gather kills, and Slurm says FAILED, JobLaunchFailure
        install(commands, scontrol=scontrol_show("FAILED", reason="JobLaunchFailure"))
        assert slurm.state_at_end("40_1", output, None) == state


def test_a_state_that_is_not_the_end_says_nothing(commands: Path, tmp_path: Path) -> None:
    install(commands, sacct="echo COMPLETING", scontrol=scontrol_show("RUNNING"))
    assert slurm.state_at_end("40_1", tmp_path / "none.out", "PENDING") == "unknown"


def test_the_queue_is_parsed_and_a_silent_controller_is_an_error(commands: Path) -> None:
    install(
        commands,
        squeue="echo '2|2_[5-9%2]|PENDING|ReqNodeNotAvail, UnavailableNodes:sl1|a|b.sh'; echo '3|3|RUNNING|None|x'",
    )
    waiting, running = slurm.queue()
    assert (waiting.id, waiting.waits, waiting.why) == ("2", True, "ReqNodeNotAvail, UnavailableNodes:sl1")
    assert waiting.name == "a|b.sh" and not running.waits and not running.ended
    install(commands, squeue=NO_ANSWER)
    with pytest.raises(UserError, match="squeue failed .*Unable to contact slurm controller.*may still run"):
        slurm.queue()
    os.unlink(commands / "squeue")
    with pytest.raises(UserError, match="squeue is not installed here"):
        slurm.queue()


@pytest.mark.parametrize(
    ("reason", "never"),
    [
        ("PartitionTimeLimit", True),
        ("PartitionNodeLimit", True),
        ("PartitionConfig", True),
        ("BadConstraints", True),
        ("QOSMaxWallDurationPerJobLimit", True),
        ("AssocMaxNodePerJobLimit", True),
        ("InvalidAccount", True),
        ("DependencyNeverSatisfied", True),
        ("Priority", False),
        ("Resources", False),
        ("QOSMaxJobsPerUserLimit", False),
        ("AssocGrpCpuLimit", False),
        ("ReqNodeNotAvail, UnavailableNodes:sl1", False),
        ("Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions", False),
        ("Licenses", False),
        ("PartitionDown", False),
        ("JobHeldUser", False),
    ],
)
def test_reasons_that_never_pass(reason: str, never: bool) -> None:
    assert slurm.never_starts(reason) is never and bool(slurm.release_hint("7", reason)) is (reason == "JobHeldUser")


SUBJECTS = """
unreachable array policy gpus memory time cpus size constraint license reservation nodelist nodes account qos partition
"""


@pytest.mark.parametrize(
    ("words", "subject"),
    [
        ("sbatch: error: Invalid generic resource (gres) specification", "gpus"),
        (
            "error: invalid partition specified: gpu error: Batch job submission failed: Invalid partition name specified",
            "partition",
        ),
        ("Batch job submission failed: Invalid account or account/partition combination specified", "account"),
        ("error: Memory specification can not be satisfied … Requested node configuration is not available", "memory"),
        ("Batch job submission failed: Requested node configuration is not available", "size"),
        ("error: CPU count per node can not be satisfied … Requested node configuration is not available", "cpus"),
        ("Requested time limit is invalid (missing or exceeds some limit)", "time"),
        ("error: Invalid --time specification", "time"),
        ("Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)", "policy"),
        ("Batch job submission failed: Invalid qos specification", "qos"),
        ("Batch job submission failed: Invalid feature specification", "constraint"),
        ("Batch job submission failed: Invalid license specification", "license"),
        ("Batch job submission failed: Requested reservation is invalid", "reservation"),
        ("Batch job submission failed: Invalid node name specified", "nodelist"),
        ("Batch job submission failed: Invalid job array specification", "array"),
        ("Batch job submission failed: Unable to contact slurm controller (connect failure)", "unreachable"),
        ("Batch job submission failed: Socket timed out on send/recv operation", "unreachable"),
        ("PartitionTimeLimit", "time"),
        ("PartitionNodeLimit", "nodes"),
        ("PartitionConfig", "size"),
        ("QOSMaxWallDurationPerJobLimit", "time"),
        ("QOSMaxCpuPerJobLimit", "cpus"),
        ("QOSMaxGRESPerJob", "gpus"),
        ("AssocMaxMemPerJob", "memory"),
        ("BadConstraints", "constraint"),
        ("the site's own plugin says no", ""),
    ],
)
def test_what_a_refusal_is_about(words: str, subject: str) -> None:
    assert slurm.fix_of(words, {name: name for name in ["", *SUBJECTS.split()]}) == subject
