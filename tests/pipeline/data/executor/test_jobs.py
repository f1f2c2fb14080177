"""Jobs as seen by the caller: choosing an engine, and local workers. Slurm: test_slurm.py; a real Ray cluster: test_ray.py."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.data import DataConfig
from pipeline.data.executor.jobs import engine_of
from pipeline.data.executor.markers import step_stats
from pipeline.errors import UserError
from tests.pipeline.data.executor.engine_steps import TASKS, expected, published


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
