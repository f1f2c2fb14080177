"""Jobs on each engine, as seen by the caller. A real Ray cluster: test_ray.py (slow)."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datatrove.pipeline.base import PipelineStep

from pipeline.config.data import DataConfig, Slurm
from pipeline.data.executor import slurm
from pipeline.data.executor.jobs import LOCAL, DryRun, Engine, engine_of, run_tasks
from pipeline.data.executor.markers import PICKLE_VERSION, Reporting, step_stats
from pipeline.errors import UserError
from tests.pipeline.data.executor import engine_steps

TASKS = 3


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path) -> Callable[..., Any]:
    """`job(engine, wrong={rank: how})` runs three tasks in tmp_path; the records."""
    monkeypatch.setenv("PYTHONPATH", str(repository))

    def run(engine: Engine = LOCAL, *, wrong: dict[int, str] | None = None, tasks: int = TASKS, **more: Any) -> Any:
        plan, work, out = tmp_path / "plan.json", tmp_path / "a work" / "job", tmp_path / "out"
        plan.write_text(json.dumps(wrong or {}))
        steps = [engine_steps.Read(plan), engine_steps.Publish(out, work)]
        options = {"workers": 1, "workers_key": "data.workers", "label": "shard: test", **more}
        return run_tasks(steps, tasks=tasks, work=work, output=out, engine=engine, **options)

    return run


def published(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((folder / "out").iterdir())}


def expected(tasks: int = TASKS) -> dict[str, str]:
    return {f"{rank:03d}.txt": "".join(f"{rank} of {tasks}: {n}\n" for n in range(20)) for rank in range(tasks)}


def slurm_engine(*, dry_run: bool = False, **settings: Any) -> Engine:
    return Engine("slurm", Slurm(**settings).model_dump(), dry_run=dry_run)


def data_config(**more: Any) -> DataConfig:
    return DataConfig.model_validate({"sources": [{"url": "x.txt"}], **more})


class TestEngineOf:
    def test_of_each_kind(self) -> None:
        assert engine_of(data_config()).kind == "local"
        engine = engine_of(data_config(executor="slurm", slurm={"qos": "high"}), dry_run=True)
        assert engine.kind == "slurm" and engine.slurm["qos"] == "high" and engine.dry_run

    def test_what_is_missing_is_named_with_the_fix(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(UserError, match="no sbatch on this machine.*--dry-run"):
            engine_of(data_config(executor="slurm"))
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(UserError, match=re.escape("pip install 'pldr[ray]'")):
            engine_of(data_config(executor="ray"))
        with pytest.raises(UserError, match="data.executor is local; set data.executor=slurm"):
            engine_of(data_config(), dry_run=True)


class TestLocal:
    def test_a_mistake_stops_the_job_and_after_a_fix_it_continues(
        self, job: Callable[..., Any], tmp_path: Path
    ) -> None:
        with pytest.raises(UserError, match="file.jsonl: line 3: not JSON; fix it") as caught:
            job(wrong={1: "user"})
        assert caught.value.exit_code == 2
        assert published(tmp_path) == {"000.txt": expected()["000.txt"]}, "a task began after another had failed"
        work = tmp_path / "a work" / "job"
        assert json.loads((work / "errors" / "00001.json").read_text())["user"] is True
        stamp = (tmp_path / "out" / "000.txt").stat().st_mtime_ns
        assert [record["rank"] for record in job()] == [0, 1, 2]
        assert published(tmp_path) == expected()
        assert (tmp_path / "out" / "000.txt").stat().st_mtime_ns == stamp
        assert not (work / "errors").exists()
        assert step_stats(work, TASKS)[0] == {"name": "read", "stats": {"read": 60}}

    def test_our_bugs_keep_their_type(self, job: Callable[..., Any]) -> None:
        with pytest.raises(KeyError, match="no such thing"):
            job(wrong={0: "bug"})

    def test_an_error_that_cannot_be_pickled_is_reported(self, job: Callable[..., Any], tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"task 0 failed \(Unpicklable: first second\); see .*task_00000.log"):
            job(wrong={0: "unpicklable"})

    def test_a_killed_worker(self, job: Callable[..., Any]) -> None:
        with pytest.raises(UserError, match="a worker process died.*lower data.workers"):
            job(wrong={0: "killed"})

    def test_a_damaged_file_is_made_again(self, job: Callable[..., Any], tmp_path: Path) -> None:
        job()
        for name, damaged in {"001.txt": b"x" * 200, "002.txt": b""}.items():
            (tmp_path / "out" / name).write_bytes(damaged)
        (tmp_path / "out" / "index.json").write_text("{}")
        job()
        assert published(tmp_path) == expected()


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


def test_a_task_process_ends_with_whoever_started_it(job: Callable[..., Any], tmp_path: Path, repository: Path) -> None:
    """On Ray's nodes too, no writer may outlive a killed run."""
    import dill

    from pipeline.data.executor.local import LocalExecutor

    work = tmp_path / "work"
    steps = [engine_steps.Read(tmp_path / "none", seconds=60), engine_steps.Publish(tmp_path / "out", work)]
    with open(tmp_path / "executor.pik", "wb") as stream:
        dill.dump(LocalExecutor(steps, tasks=1, workers=1, logging_dir=str(work)), stream)
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.data.executor.run_task", str(tmp_path / "executor.pik"), "0"],
        stdin=subprocess.PIPE,
        cwd=repository,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 30
        while not (work / "progress" / "00000.json").is_file():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(10) == 1
    finally:
        process.send_signal(signal.SIGKILL)


# What a pickled executor of pickle version 2 names. When this changes, raise PICKLE_VERSION.
PICKLED = {
    2: """
dedup.exact.DropDuplicates dedup.exact.ExactKeys dedup.exact.FindDuplicates dedup.exact.KeysStep dedup.near.ClusterNear
dedup.near.NearKeys dedup.paragraphs.CutParagraphs dedup.paragraphs.ParagraphKeys documents.shard.ReadUnits
documents.spool.ReadSpool documents.spool.WriteSpool documents.write.WriteDocuments executor.local.LocalExecutor
executor.slurm.SlurmExecutor filters.decontaminate.Decontaminate filters.gopher.Quality filters.gopher.Repetition
filters.language.LanguageFilter filters.length.LengthFilter filters.length.SplitLong filters.unicode.RepairUnicode
tokens.tokenize.TokenizeShard
"""
}


def test_a_class_that_pickles_name_has_not_moved_without_a_new_version() -> None:
    import pipeline.data.documents.shard
    import pipeline.data.tokens.tokenize  # noqa: F401

    def below(base: type) -> set[type]:
        return {base} | {found for child in base.__subclasses__() for found in below(child)}

    found = {f"{cls.__module__}.{cls.__name__}" for base in (PipelineStep, Reporting) for cls in below(base)}
    room = "pipeline.data."
    named = {name.removeprefix(room) for name in found if name.startswith(room)}
    assert named - {"executor.markers.Reporting", "executor.ray.RayExecutor"} == set(PICKLED[PICKLE_VERSION].split())
