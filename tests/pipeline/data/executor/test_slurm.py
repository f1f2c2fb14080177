"""Slurm jobs: scripts, options, and waiting, with fake Slurm commands."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import slurm as scheduler
from pipeline.config.data import Slurm
from pipeline.data.executor import slurm
from pipeline.data.executor.jobs import DryRun, Engine
from pipeline.data.executor.markers import PICKLE_VERSION
from pipeline.errors import UserError
from tests.helpers.slurm_commands import FORGOTTEN, NO_ACCOUNTING, NO_ANSWER, NO_GPUS, install, scontrol_show
from tests.pipeline.data.executor.engine_steps import TASKS, expected, published


def slurm_engine(*, dry_run: bool = False, **settings: Any) -> Engine:
    return Engine("slurm", Slurm(**settings).model_dump(), dry_run=dry_run)


def options_of(script: Path) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", script.read_text(), re.MULTILINE))


class TestScript:
    def test_a_dry_run_writes_a_checked_script_and_nothing_else(self, job: Callable[..., Any], tmp_path: Path) -> None:
        settings = {"partition": "long", "time": "1:00:00", "qos": "q", "cpus_per_task": 2, "mem_per_cpu_gb": 3}
        args = {"account": "us", "comment": "two words", "exclusive": ""}
        with pytest.raises(DryRun) as ended:
            job(slurm_engine(dry_run=True, sbatch_args=args, **settings), workers=2)
        script = ended.value.script
        assert ended.value.tasks == TASKS and ended.value.scripts == [script] and not (tmp_path / "out").exists()
        options = options_of(script)
        assert options["array"] == "0-2%2" and re.fullmatch(r"pldr-shard-test-[0-9a-f]{8}", options["job-name"])
        assert (options["partition"], options["time"], options["qos"]) == ("long", "1:00:00", "q")
        assert (options["cpus-per-task"], options["mem-per-cpu"]) == ("2", "3G")
        assert (options["account"], options["comment"]) == ("us", '"two words"')
        assert options["output"].startswith('"/')  # the folder's name has a space
        assert "#SBATCH --exclusive\n" in script.read_text() and sys.executable in script.read_text()

    def test_only_what_is_missing_in_arrays_of_the_allowed_size(self, job: Callable[..., Any], tmp_path: Path) -> None:
        with pytest.raises(UserError):
            job(tasks=6, wrong={1: "user"})
        with pytest.raises(DryRun) as ended:
            job(slurm_engine(dry_run=True, max_array_size=2), tasks=6)
        assert [options_of(script)["array"] for script in ended.value.scripts] == ["0-1%1", "0-1%1", "0-0%1"]
        assert ended.value.tasks == 5  # the first is complete
        offsets = [re.findall(r"RUN_OFFSET=(\d)", script.read_text()) for script in ended.value.scripts]
        assert offsets == [["0"], ["1"], ["2"]]

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ({"cpus_per_task": "2"}, "sbatch has no option --cpus_per_task"),
            ({"array": "0-7"}, "array is set by pldr"),
            ({"account": ""}, "data.slurm.sbatch_args.account: sbatch's --account takes a value; set one"),
            ({"hold": "yes"}, "data.slurm.sbatch_args.hold: sbatch's --hold takes no value; set it to ''"),
            ({"comment": "x\n#SBATCH --uid=0"}, "must not contain line breaks"),
            ({"comment": 'x" --uid=0'}, "must not contain line breaks or quotes"),
        ],
    )
    def test_wrong_options(self, args: dict[str, str], message: str, job: Callable[..., Any]) -> None:
        with pytest.raises(UserError, match=message):
            job(slurm_engine(dry_run=True, sbatch_args=args))

    def test_the_check_finds_what_is_wrong(self, tmp_path: Path) -> None:
        script = tmp_path / "script"
        script.write_text("#!/bin/bash\n#SBATCH --array=0-2%1\n#SBATCH --nodez=2\n")
        with pytest.raises(UserError, match="--nodez=2.* is not an option of sbatch"):
            slurm.check_script(script, 3)
        script.write_text("#!/bin/bash\n#SBATCH --array=0-2%1\nif true; then\n")
        with pytest.raises(UserError, match="not a valid bash script"):
            slurm.check_script(script, 3)
        script.write_text("#!/bin/bash\n#SBATCH --array=0-2%1\n")
        slurm.check_script(script, 3)
        with pytest.raises(AssertionError, match="not of 4 tasks"):
            slurm.check_script(script, 4)


# As far as a job uses them: arrays run when they are submitted, and nothing is queued afterwards.
RUN_ARRAY = """
end=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
output=$(sed -n 's/^#SBATCH --output="*\\([^"]*\\)%A_%a.out"*/\\1/p' "$script")
for i in $(seq 0 $end); do
    SLURM_ARRAY_TASK_ID=$i SLURM_NODELIST=here bash "$script" > "$output${id}_$i.out" 2>&1
done
"""
SBATCH = f"""
for script; do :; done
[ -z "$SLURM_JOB_ID" ] || exit 1
id=$((40 + $(ls "$(dirname "$script")/../slurm_logs" | wc -l)))
{RUN_ARRAY}
echo "$id;cluster"
"""
# An array that is only queued: `squeue` says what `queue` in this folder says, and the call that finds "run" runs it.
QUEUED = 'for script; do :; done; echo "$script" > "$(dirname "$0")/script"; echo 40'
SQUEUE = f"""
cd "$(dirname "$0")"
read -r line < queue; sed -i 1d queue
case $line in
run) id=40; script=$(cat script); {RUN_ARRAY} ;;
fail) {NO_ANSWER} ;;
"") ;;
*) echo "40|40_[0-2%1]|$line|pldr-shard-test-0" ;;
esac
"""


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with fake Slurm commands, first in PATH: a site without accounting."""
    show = "case $1 in show) echo here;; *) " + FORGOTTEN + ";; esac"
    folder = install(tmp_path / "bin", sbatch=SBATCH, squeue="", scancel="", sacct=NO_ACCOUNTING, scontrol=show)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "1")  # as if started inside a job
    monkeypatch.setattr(slurm, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(slurm, "QUEUE_SECONDS", 0.02)
    return folder


class TestSlurm:
    """Everything except Slurm's own commands: the scripts really run."""

    def test_fails_and_after_a_fix_finishes_with_the_bytes_of_a_local_run(
        self, job: Callable[..., Any], tmp_path: Path, commands: Path
    ) -> None:
        engine = slurm_engine(max_array_size=2)
        with pytest.raises(UserError, match="^file.jsonl: line 3: not JSON; fix it$") as caught:
            job(engine, wrong={1: "user"})
        assert caught.value.exit_code == 2 and list(published(tmp_path)) == ["000.txt"]
        assert len(job(engine)) == TASKS
        assert published(tmp_path) == expected()

    @pytest.mark.parametrize(
        ("accounting", "state", "fix"),
        [(True, "TIMEOUT", "raise data.slurm.time"), (False, "OUT_OF_MEMORY", "raise data.slurm.mem_per_cpu_gb")],
        ids=["sacct", "no sacct"],
    )
    def test_a_task_that_ended_without_an_error(
        self, job: Callable[..., Any], tmp_path: Path, commands: Path, accounting: bool, state: str, fix: str
    ) -> None:
        if accounting:
            install(commands, sacct=f"echo {state}")
        else:
            install(commands, scontrol=f"[ $2 = hostnames ] && echo here || {scontrol_show(state)}")
        message = rf"task 1 .*ended as {state} in Slurm job 40_1, .*40_1\.out: .*{fix}"
        with pytest.raises(UserError, match=message):
            job(slurm_engine(), wrong={1: "killed"}, tasks=2)
        assert list(published(tmp_path)) == ["000.txt"]

    @pytest.mark.parametrize(
        ("refusal", "fix"),
        [
            (
                "echo 'sbatch: error: Invalid partition name specified' >&2; exit 1",
                "change data.slurm.partition .now cpu",
            ),
            (NO_GPUS, "fix gres and gpus in data.slurm.sbatch_args"),
            ("echo 'no\nmore' >&2; exit 1", "fix data.slurm$"),
        ],
    )
    def test_sbatch_refuses(self, job: Callable[..., Any], commands: Path, refusal: str, fix: str) -> None:
        install(commands, sbatch=refusal)
        with pytest.raises(UserError, match=rf"sbatch refused .*\); {fix}"):
            job(slurm_engine())

    def test_an_array_that_waits_says_why(
        self,
        job: Callable[..., Any],
        commands: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        install(commands, sbatch=QUEUED, squeue=SQUEUE)
        # The first is the look for jobs of an earlier start, in run_tasks and again before submitting.
        lines = ["", "", "PENDING|None", "PENDING|Priority", "PENDING|Priority", "PENDING|Resources", "fail", "fail"]
        (commands / "queue").write_text("\n".join([*lines, "PENDING|JobHeldUser", "RUNNING|None", "run", ""]))
        assert len(job(slurm_engine(), tasks=1)) == 1 and published(tmp_path) == expected(1)
        said = capsys.readouterr().err
        assert "Slurm job 40 submitted: 1 tasks" in said and "Slurm job 40 runs" in said
        assert [said.count(words) for words in ("(PENDING)", "(Priority)", "(Resources)", "is unreachable")] == [
            0,
            1,
            1,
            1,
        ]
        assert "(JobHeldUser)" in said and "scontrol release 40" in said

    def test_an_array_that_can_never_start(self, job: Callable[..., Any], commands: Path) -> None:
        install(commands, sbatch=QUEUED, squeue=SQUEUE, scancel='echo "$@" > "$(dirname "$0")/canceled"')
        reasons = ["PENDING|PartitionConfig", *["PENDING|PartitionTimeLimit"] * scheduler.SURE]
        (commands / "queue").write_text("\n".join(["", "", *reasons, ""]))
        message = r"job 40 can never start .PartitionTimeLimit. and was canceled; lower data.slurm.time .now 24:00:00"
        with pytest.raises(UserError, match=message):
            job(slurm_engine())
        assert (commands / "canceled").read_text() == "40\n"

    def test_another_job_writes_there(self, job: Callable[..., Any], commands: Path, tmp_path: Path) -> None:
        with pytest.raises(DryRun) as ended:
            job(slurm_engine(dry_run=True))
        name = options_of(ended.value.script)["job-name"]
        install(commands, squeue=f"echo '17|17_[0-2]|PENDING|Priority|{name}'")
        with pytest.raises(UserError, match="Slurm job 17 of an earlier start.* writes to the same folder.*scancel 17"):
            job(slurm_engine())

    def test_an_unfinished_job_of_another_version(
        self, job: Callable[..., Any], commands: Path, tmp_path: Path
    ) -> None:
        """Commit 160ea30 kept its pickle, which names modules of its own, and the ids of its arrays in the work folder."""
        with pytest.raises(DryRun) as ended:
            job(slurm_engine(dry_run=True))
        name, work = options_of(ended.value.script)["job-name"], tmp_path / "a work" / "job"
        (work / "executor.pik").write_bytes(b"cpipeline.data.engines\nEngine\n.")
        (work / "slurm_jobs.json").write_text('["17"]')
        install(commands, squeue=f"echo '17|17_0|RUNNING|None|{name}'")
        with pytest.raises(UserError, match="Slurm job 17 of an earlier start.*another version of pldr.*scancel 17"):
            job(slurm_engine())
        install(commands, squeue=f"echo '17|17_0|CANCELLED|None|{name}'")
        assert len(job(slurm_engine())) == TASKS and published(tmp_path) == expected()
        assert (work / "executor.pik").read_bytes().startswith(b"cpipeline.data.engines")
        assert (work / f"cluster-v{PICKLE_VERSION}" / "executor.pik").is_file()

    def test_the_controller_is_unreachable(self, job: Callable[..., Any], commands: Path) -> None:
        install(commands, squeue=NO_ANSWER)
        with pytest.raises(UserError, match="squeue failed .*Unable to contact slurm controller"):
            job(slurm_engine())
