"""What `--resume` names, which checkpoint it finds, and what it refuses: real folders and real MLflow stores, no training."""

import copy
import dataclasses
import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from pipeline.checkpoint.format import committed, step_of, verify
from pipeline.config.load import parse_config
from pipeline.config.paths import RunPaths
from pipeline.errors import ConfigError, UserError
from pipeline.io import storage
from pipeline.stages.compatible import changes, check_inputs, require_newest
from pipeline.stages.resume import Resume, find_start, names_run, parse_resume
from pipeline.tracking import outbox
from pipeline.tracking.client import client, tracking_uri
from pipeline.tracking.publish import open_publisher, published_checkpoints
from pipeline.tracking.run import run_named
from pipeline.tracking.run_record import new_record, write_record
from pipeline.tracking.sqlite_store import file_of

UNREACHABLE = "http://127.0.0.1:9"  # nobody listens there
TODAY = {"data_fingerprint": "d" * 64, "tokenizer_sha256": "t" * 64}
TREE = {
    "name": "t",
    "data": {"sources": [{"url": "x.txt"}]},
    "model": {"vocab_size": 300, "num_layers": 1, "num_heads": 1, "head_dim": 4, "context_length": 8},
    "train": {"steps": 9, "warmup_steps": 1, "zero_stage": 1, "precision": "fp32", "global_batch": 4, "micro_batch": 2},
}


class RunDir:
    """A run directory with its MLflow run."""

    def __init__(self, folder, uri):
        self.uri, self.paths, self.reported = uri, RunPaths(folder), []

    def config(self, **sections):
        tree = {**TREE, "run_dir": str(self.paths.root), "tracking": {"uri": self.uri}}
        for name, values in sections.items():
            tree[name] = {**tree.get(name, {}), **values} if isinstance(values, dict) else values
        return parse_config(tree, where="test")

    def commit(self, step, run_id, **sections):
        """A committed checkpoint as a job of two ranks leaves it, but for DeepSpeed's files."""
        folder = self.paths.checkpoints / f"step-{step:06d}"
        (folder / folder.name).mkdir(parents=True)
        (folder / folder.name / "weights.pt").write_bytes(bytes([step]) * 100)
        state = {"schema_version": 1, "step": step, "mlflow_run_id": run_id, "world_size": 2, **TODAY}
        storage.publish_json(folder / "state.json", {**state, "config": self.config(**sections).as_dict()})
        files = storage.manifest_of(folder)
        storage.publish_json(folder / storage.MANIFEST, {"schema_version": 1, "files": files})
        storage.publish_bytes(folder / "COMMITTED", storage.sha256_file(folder / storage.MANIFEST).encode())
        return folder

    def start(self, text="auto", *, force=False, today=TODAY, **sections):
        config, report = self.config(**sections), self.reported.append
        return find_start(config, self.paths, text, today=today, force=force, report=report)

    def tracked(self, run_id):
        return run_named(self.config(), self.paths, run_id)

    def publish(self, run_id):
        tracked = self.tracked(run_id)
        tracker = outbox.open_tracker(tracked)
        publisher = open_publisher(tracked, tracker)
        publisher.saved(step_of(committed(self.paths.checkpoints)[-1]))
        assert publisher.close(60) == [] and tracker.close()


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """One store for all: making its tables takes longest."""
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client(uri).create_experiment("pldr", artifact_location=(folder / "artifacts").as_uri())
    return uri


@pytest.fixture
def run(tmp_path, uri):
    """Steps 3 and 6 of a run, committed and published."""
    run = RunDir(tmp_path / "run", uri)
    run.id = run.start().run.id
    for step in (3, 6):
        run.commit(step, run.id)
    run.publish(run.id)
    return run


def names(run):
    return [path.name for path in committed(run.paths.checkpoints)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", Resume()),
        ("0123abc", Resume(run_id="0123abc")),
        ("runs:/0123abc", Resume(run_id="0123abc")),
        ("runs:/0123abc/", Resume(run_id="0123abc")),
        ("runs:/0123abc/checkpoints/step-000500", Resume(run_id="0123abc", checkpoint="step-000500")),
    ],
)
def test_the_forms(text, expected):
    assert parse_resume(text) == expected


def test_a_path_is_a_folder_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "step-000500").mkdir()
    assert parse_resume("step-000500").path == parse_resume(f"{tmp_path}/step-000500").path == tmp_path / "step-000500"
    for wrong in ("no/such/folder", "runs:/", "runs:/x/artifacts/y", "runs:/x/checkpoints/../step-000500", "a b", ""):
        with pytest.raises(ConfigError) as error:
            parse_resume(wrong)
        assert "--resume" in str(error.value) and "\n" not in str(error.value)


def test_only_the_run_itself_is_complete_when_its_record_says_so():
    assert all(names_run(text, "abc") for text in ("auto", "abc", "runs:/abc", "runs:/abc/"))
    assert not any(names_run(text, "abc") for text in ("abd", "runs:/abc/checkpoints/step-000500", "/somewhere"))


def test_a_new_run_starts_at_step_0(tmp_path, uri):
    start = RunDir(tmp_path / "run", uri).start()
    assert start.checkpoint is None and start.run.id


def test_auto_the_run_and_its_folder_mean_the_newest(run):
    for text in ("auto", run.id, f"runs:/{run.id}", str(run.paths.root), str(run.paths.checkpoints)):
        start = run.start(text)
        assert (start.run.id, start.checkpoint.name, start.state["step"]) == (run.id, "step-000006", 6)
    assert names(run) == ["step-000003", "step-000006"] and run.reported == []


def test_a_checkpoint_that_is_missing_here_is_fetched_from_mlflow(run):
    shutil.rmtree(run.paths.checkpoints)
    assert run.start().checkpoint.name == "step-000006"
    assert run.reported == [f"step-000006 fetched from MLflow run {run.id}"]


def test_a_later_checkpoint_of_another_machine_is_fetched(run):
    """A to step 3, B to step 6, A again."""
    shutil.rmtree(run.paths.checkpoints / "step-000006")
    assert run.start().checkpoint.name == "step-000006"
    assert run.reported == [f"step-000006 fetched from MLflow run {run.id}: the run is further than step-000003 here"]
    assert verify(run.paths.checkpoints / "step-000006")["step"] == 6


def test_with_mlflow_unreachable_the_newest_local_checkpoint_is_taken_and_reported(tmp_path):
    run = RunDir(tmp_path / "run", UNREACHABLE)
    write_record(run.paths, dataclasses.replace(new_record(run.config(), run.paths), run_id="a" * 32))
    run.commit(3, "a" * 32)
    assert run.start().checkpoint.name == "step-000003"
    assert "not known whether another machine continued from step-000003" in run.reported[0] and len(run.reported) == 1


def test_a_damaged_checkpoint_comes_from_its_published_copy_before_an_older_one_is_taken(run):
    (run.paths.checkpoints / "step-000006" / "step-000006" / "weights.pt").write_bytes(b"x" * 100)
    assert run.start().checkpoint.name == "step-000006"
    assert "step-000006 is damaged and left out" in run.reported[0] and "sha256" in run.reported[0]
    assert run.reported[1:] == [f"step-000006 fetched from MLflow run {run.id}"]
    assert (run.paths.checkpoints / ".damaged-step-000006").is_dir()


def test_a_checkpoint_damaged_here_and_there_falls_back_loudly(run):
    published = Path(client(run.uri).get_run(run.id).info.artifact_uri.removeprefix("file://")) / "checkpoints"
    for folder in (run.paths.checkpoints, published):
        (folder / "step-000006" / "step-000006" / "weights.pt").write_bytes(b"x" * 100)
    assert run.start().checkpoint.name == "step-000003"
    assert "step-000006 is damaged and left out" in run.reported[0]
    assert f"step-000006 in MLflow run {run.id} is damaged and left out" in run.reported[1]
    assert sorted(p.name for p in run.paths.checkpoints.iterdir()) == [".damaged-step-000006", "step-000003"]


@pytest.mark.parametrize("left", ["old", "old and new", "old and half"])
def test_a_kill_between_the_renames_of_a_save_loses_no_committed_step(run, left, caplog):
    """Step 6 was saved a second time: the old folder is renamed first, then the new one."""
    folder = run.paths.checkpoints
    (folder / "step-000006").rename(folder / ".step-000006.0123abcd.old")
    if left != "old":
        new = run.commit(6, run.id, train={"log_every": 7})
        new.rename(folder / ".step-000006.staging")
    if left == "old and half":
        (folder / ".step-000006.staging" / "step-000006" / "weights.pt").write_bytes(b"x")
    start = run.start()
    assert start.checkpoint == folder / "step-000006" and run.reported == []  # it was not fetched
    assert start.state["config"]["train"]["log_every"] == (7 if left == "old and new" else 10)
    assert sorted(p.name for p in folder.iterdir()) == ["step-000003", "step-000006"]
    assert "recovered" in caplog.text


def test_a_job_file_that_is_started_a_second_time_is_refused(run):
    first, second = (run.paths.checkpoints / name for name in names(run))
    require_newest(second, run.paths)
    for stale, where in ((first, "step-000003"), (None, "the beginning")):
        with pytest.raises(ConfigError, match=f"begins at {where}, but step-000006 is committed since"):
            require_newest(stale, run.paths)
    shutil.rmtree(run.paths.checkpoints)
    require_newest(None, run.paths)


def runs_in(uri):
    mlflow = client(uri)
    return {r.info.run_id for r in mlflow.search_runs([e.experiment_id for e in mlflow.search_experiments()])}


def test_another_tracking_uri_is_refused_and_changes_nothing(run):
    """A typing error must not cost the directory its run."""
    file, right = run.paths.root / "run.json", run.uri
    before = file.read_bytes()
    run.uri = UNREACHABLE
    for text in ("auto", run.id):
        with pytest.raises(UserError) as error:
            run.start(text)
        assert UNREACHABLE in str(error.value) and run.id in str(error.value) and "\n" not in str(error.value)
        assert (right in str(error.value)) == (text == "auto")
        assert file.read_bytes() == before
    run.uri = right
    assert run.start().checkpoint.name == "step-000006"


def test_a_run_whose_server_has_moved_is_resumed_when_it_is_named(run, tmp_path):
    with closing(sqlite3.connect(file_of(run.uri))) as before, closing(sqlite3.connect(tmp_path / "moved.db")) as after:
        before.backup(after)
    run.uri = f"sqlite:///{tmp_path / 'moved.db'}"
    spool = outbox.spool_of(run.tracked(run.id))
    for text in (run.id, "auto"):
        start = run.start(text)
        assert (start.run.id, start.checkpoint.name) == (run.id, "step-000006")
    assert outbox.spool_of(run.tracked(run.id)).name.startswith("metrics-local-") and spool.parent.exists()


def test_a_run_that_a_mistyped_server_never_made_is_made_at_the_right_one(tmp_path, uri):
    run = RunDir(tmp_path / "run", UNREACHABLE)
    local = run.start().run.id
    run.commit(3, local)
    run.uri = uri
    start = run.start()
    assert start.checkpoint.name == "step-000003" and start.run.id in runs_in(uri)
    assert client(uri).get_run(start.run.id).data.tags["pldr.local_id"] == local


def test_a_lost_run_file_makes_no_second_run(run):
    (run.paths.root / "run.json").unlink()
    before = runs_in(run.uri)
    with pytest.raises(ConfigError, match=f"belongs to MLflow run {run.id}.*continue with --resume {run.id}"):
        run.start()
    assert runs_in(run.uri) == before and not (run.paths.root / "run.json").exists()
    assert run.start(run.id).checkpoint.name == "step-000006"


def test_another_machine_needs_the_server_to_resume_a_run(tmp_path):
    """The folder below publish_to has the run's local name, which only MLflow could tell."""
    other = RunDir(tmp_path / "other", UNREACHABLE)
    with pytest.raises(UserError, match=f"unreachable.*only it knows run {'a' * 32}; start the server"):
        other.start("a" * 32, train={"publish_to": str(tmp_path / "store")})
    with pytest.raises(ConfigError, match="only the run directory where it began knows this name"):
        other.start("local-0123")
    assert not (other.paths.root / "run.json").exists()


def test_a_refused_start_leaves_no_trace_on_another_machine(run, tmp_path):
    other = RunDir(tmp_path / "other", run.uri)
    for today, sections in (({**TODAY, "data_fingerprint": "e" * 64}, {}), (TODAY, {"train": {"max_lr": 1e-4}})):
        for text in (run.id, f"runs:/{run.id}/checkpoints/step-000003"):
            with pytest.raises(ConfigError):
                other.start(text, today=today, **sections)
            assert not (other.paths.root / "run.json").exists() and names(other) == []


def test_nothing_is_fetched_beside_another_runs_checkpoints(run, tmp_path):
    other = RunDir(tmp_path / "other", run.uri)
    other.commit(3, other.start().run.id)
    for text in (run.id, f"runs:/{run.id}/checkpoints/step-000006"):
        with pytest.raises(ConfigError, match=f"step-000003: belongs to MLflow run .*, not to {run.id}"):
            other.start(text)
    assert names(other) == ["step-000003"] and other.start().run.id != run.id


def test_a_refused_start_leaves_a_finished_run_finished(run):
    mlflow = client(run.uri)
    outbox.finish(run.tracked(run.id))
    with pytest.raises(ConfigError):
        run.start(today={**TODAY, "data_fingerprint": "e" * 64})
    assert mlflow.get_run(run.id).info.status == "FINISHED"


@pytest.mark.parametrize("by_path", [True, False])
def test_a_named_checkpoint_takes_the_run_back(run, by_path):
    target = run.paths.checkpoints / "step-000003"
    start = run.start(str(target) if by_path else f"runs:/{run.id}/checkpoints/step-000003")
    assert (start.run.id, start.checkpoint) == (run.id, target)
    uri = tracking_uri(run.config())
    assert names(run) == ["step-000003"] == published_checkpoints(uri, run.id)
    assert (run.paths.checkpoints / ".later-step-000006" / "step-000006" / "weights.pt").exists()  # nothing is deleted
    assert "back at step-000003: step-000006 set aside" in run.reported[0]
    assert run.start().checkpoint == target  # the next start does not jump ahead again
    run.commit(6, run.id)
    run.publish(run.id)
    assert published_checkpoints(uri, run.id) == ["step-000006", "step-000003"]


def test_a_named_checkpoint_is_fetched_from_mlflow_or_reported_missing(run):
    shutil.rmtree(run.paths.checkpoints)
    assert run.start(f"runs:/{run.id}/checkpoints/step-000003").state["step"] == 3
    with pytest.raises(UserError, match=r"no committed checkpoint step-000004; it has \['step-000003'\]"):
        run.start(f"runs:/{run.id}/checkpoints/step-000004")


def test_a_path_begins_a_run_of_its_own(run, tmp_path):
    source = run.paths.checkpoints / "step-000003"
    other = RunDir(tmp_path / "other", run.uri)
    start = other.start(str(source), train={"max_lr": 1e-4})
    assert start.run.id != run.id and start.state["mlflow_run_id"] == start.run.id
    assert start.checkpoint == other.paths.checkpoints / "step-000003" and verify(start.checkpoint) == start.state
    assert verify(source)["mlflow_run_id"] == run.id and names(run) == ["step-000003", "step-000006"]  # untouched
    stored = client(tracking_uri(other.config())).get_run(start.run.id)
    assert stored.data.tags["pldr.continued_from"] == str(source) and stored.data.params["train.max_lr"] == "0.0001"
    # The same command again resumes from what this run has saved since; so does auto.
    other.commit(5, start.run.id, train={"max_lr": 1e-4})
    for text in (str(source), "auto"):
        assert other.start(text, train={"max_lr": 1e-4}).checkpoint.name == "step-000005"
    with pytest.raises(ConfigError, match="holds step-000005 of a run that did not begin with"):
        other.start(str(run.paths.checkpoints / "step-000006"), train={"max_lr": 1e-4})


def test_a_path_without_an_intact_checkpoint_is_refused(run, tmp_path):
    other = RunDir(tmp_path / "other", run.uri)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no committed checkpoint in it"):
        other.start(str(tmp_path / "empty"))
    (run.paths.checkpoints / "step-000003" / "COMMITTED").unlink()
    with pytest.raises(UserError, match="never finished"):
        other.start(str(run.paths.checkpoints / "step-000003"))
    assert not other.paths.checkpoints.exists()


@pytest.mark.parametrize(
    ("today", "sections", "difference"),
    [
        ({**TODAY, "data_fingerprint": "e" * 64}, {}, "data_fingerprint dddddddddddd, now eeeeeeeeeeee"),
        ({**TODAY, "tokenizer_sha256": "u" * 64}, {}, "tokenizer_sha256 tttttttttttt, now uuuuuuuuuuuu"),
        (TODAY, {"model": {"rope_style": "half"}}, "model.rope_style"),
    ],
)
def test_other_data_tokenizer_or_model_is_refused_unless_forced(run, tmp_path, today, sections, difference):
    """In the same run and in one that begins with its checkpoint; a refusal changes nothing."""
    back = f"runs:/{run.id}/checkpoints/step-000003"
    other = RunDir(tmp_path / "other", run.uri)
    for where, text in ((run, "auto"), (run, back), (other, str(run.paths.checkpoints / "step-000003"))):
        with pytest.raises(ConfigError) as error:
            where.start(text, today=today, **sections)
        assert difference in str(error.value) and "--force" in str(error.value) and "\n" not in str(error.value)
    assert names(run) == ["step-000003", "step-000006"] and not (other.paths.root / "run.json").exists()
    for where, text in ((run, "auto"), (other, str(run.paths.checkpoints / "step-000003"))):
        start = where.start(text, today=today, force=True, **sections)
        assert start.checkpoint is not None
        assert [line for line in where.reported if line.startswith("FORCED") and difference in line]


@pytest.mark.parametrize("today", [None, {"at_step": 4, "become": "parameter"}])
def test_a_frozen_checkpoint_needs_the_rule_that_froze_it(tmp_path, today):
    frozen = RunDir(tmp_path, f"sqlite:///{tmp_path}/m.db").config(train={"freeze_g": {"at_step": 4}})
    state = {**TODAY, "frozen": 4, "config": frozen.as_dict()}
    now = RunDir(tmp_path, f"sqlite:///{tmp_path}/m.db").config(train={"freeze_g": today})
    with pytest.raises(ConfigError, match="its G is frozen; set train.freeze_g.become to constant as it was"):
        check_inputs(tmp_path, state, now, TODAY, force=True, report=print)
    check_inputs(tmp_path, state, frozen, TODAY, force=False, report=print)


def test_force_does_not_make_another_recipe_the_same_run(run):
    with pytest.raises(ConfigError, match="was made with train.max_lr=0.001"):
        run.start(force=True, train={"max_lr": 1e-4})


def test_what_changed_is_reported_and_becomes_tags(run):
    sections = {"train": {"zero_stage": 3, "micro_batch": 4, "precision": "bf16"}}
    start = run.start(**sections)
    changed = changes(start.state, run.config(**sections), ranks=1)
    assert changed == {
        "train.zero_stage": "1 -> 3",
        "train.micro_batch": "2 -> 4",
        "train.precision": "fp32 -> bf16",
        "train.ranks": "2 -> 1",
    }
    assert changes(start.state, run.config(), ranks=2) == {}
    old = copy.deepcopy(start.state)  # of before there were schedules and data of other runs
    del old["config"]["train"]["schedule"], old["config"]["data"]["of"]
    assert changes(old, run.config(), ranks=2) == {}
    assert changes(old, run.config(train={"schedule": "constant"}), ranks=2) == {"train.schedule": "cosine -> constant"}
    outbox.set_tags(run.tracked(run.id), {f"resumed.6.{key}": value for key, value in changed.items()})
    stored = client(tracking_uri(run.config())).get_run(run.id)
    assert stored.data.tags["resumed.6.train.zero_stage"] == "1 -> 3"
    assert stored.data.params["train.zero_stage"] == "1" and json.loads(stored.data.params["train.micro_batch"]) == 2


def test_a_checkpoint_from_before_a_model_key_existed_is_resumed_with_its_default(run):
    folder = run.paths.checkpoints / "step-000006"
    state = storage.read_json(folder / "state.json")
    del state["config"]["model"]["g_start"]
    storage.publish_json(folder / "state.json", state)
    files = storage.manifest_of(folder, leave_out=["COMMITTED"])
    storage.publish_json(folder / storage.MANIFEST, {"schema_version": 1, "files": files})
    storage.publish_bytes(folder / "COMMITTED", storage.sha256_file(folder / storage.MANIFEST).encode())
    assert run.start().checkpoint == folder
    with pytest.raises(ConfigError, match=r"g_start=.?paper.*identity"):
        run.start(model={"g_start": "identity"})
