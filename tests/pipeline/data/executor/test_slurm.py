"""Slurm jobs: scripts, options, and waiting, with fake Slurm commands."""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.data import Slurm
from pipeline.data.executor import slurm
from pipeline.data.executor.jobs import DryRun, Engine
from pipeline.data.executor.markers import PICKLE_VERSION
from pipeline.errors import UserError
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


# Fake Slurm commands, as far as a job uses them: arrays run when they are submitted, and nothing is queued afterwards.
COMMANDS = {
    "sbatch": """
for last; do :; done
[ -z "$SLURM_JOB_ID" ] || exit 1
end=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$last")
output=$(sed -n 's/^#SBATCH --output="*\\([^"]*\\)%A_%a.out"*/\\1/p' "$last")
id=$((40 + $(ls "$output" | wc -l)))
for i in $(seq 0 $end); do
    SLURM_ARRAY_TASK_ID=$i SLURM_NODELIST=here bash "$last" > "$output${id}_$i.out" 2>&1
done
echo "$id;cluster"
""",
    "squeue": "exit 0",
    "scancel": "exit 0",
    "sacct": "echo TIMEOUT",
    "scontrol": "echo here",
}


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with fake Slurm commands, first in PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in COMMANDS.items():
        (folder / name).write_text("#!/bin/bash\n" + text)
        (folder / name).chmod(stat.S_IRWXU)
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

    def test_a_task_that_ended_without_an_error(self, job: Callable[..., Any], tmp_path: Path, commands: Path) -> None:
        with pytest.raises(
            UserError, match=r"task 1 .*ended as TIMEOUT in Slurm job 40_1, .*40_1\.out: .*raise data.slurm.time"
        ):
            job(slurm_engine(), wrong={1: "killed"}, tasks=2)
        assert list(published(tmp_path)) == ["000.txt"]

    def test_sbatch_refuses(self, job: Callable[..., Any], commands: Path) -> None:
        (commands / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: invalid partition\nmore' >&2; exit 1")
        with pytest.raises(
            UserError, match=r"sbatch refused .*\(sbatch: error: invalid partition more\); fix data.slurm"
        ):
            job(slurm_engine())

    def test_another_job_writes_there(self, job: Callable[..., Any], commands: Path, tmp_path: Path) -> None:
        with pytest.raises(DryRun) as ended:
            job(slurm_engine(dry_run=True))
        name = options_of(ended.value.script)["job-name"]
        (commands / "squeue").write_text(f"#!/bin/bash\necho '17 {name}'")
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
        queue = commands / "squeue"
        empty = queue.read_text()
        queue.write_text(f"#!/bin/bash\necho '17 {name}'")
        with pytest.raises(UserError, match="Slurm job 17 of an earlier start.*another version of pldr.*scancel 17"):
            job(slurm_engine())
        queue.write_text(empty)
        assert len(job(slurm_engine())) == TASKS and published(tmp_path) == expected()
        assert (work / "executor.pik").read_bytes().startswith(b"cpipeline.data.engines")
        assert (work / f"cluster-v{PICKLE_VERSION}" / "executor.pik").is_file()

    def test_the_controller_is_unreachable(
        self, job: Callable[..., Any], commands: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (commands / "squeue").write_text("#!/bin/bash\necho 'slurm_load_jobs error' >&2; exit 1")
        with pytest.raises(UserError, match="squeue failed .slurm_load_jobs error."):
            job(slurm_engine())
