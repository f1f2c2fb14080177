"""What `--resume` names, which checkpoint it finds, and what it refuses: real folders and real MLflow stores, no training."""

import json
import shutil

import pytest

from pipeline import storage, tracking
from pipeline.checkpoints import committed, step_of, verify
from pipeline.config import RunPaths, parse_config
from pipeline.errors import ConfigError, UserError
from pipeline.publish import open_publisher
from pipeline.resume import Resume, changes, find_start, names_run, parse_resume

TODAY = {"data_fingerprint": "d" * 64, "tokenizer_sha256": "t" * 64}
TREE = {
    "name": "t",
    "data": {"sources": [{"url": "x.txt"}]},
    "model": {"vocab_size": 300, "num_layers": 1, "num_heads": 1, "head_dim": 4, "context_length": 8},
    "train": {"steps": 9, "warmup_steps": 1, "zero_stage": 1, "precision": "fp32", "global_batch": 4, "micro_batch": 2},
}


class Run:
    """A run directory with its MLflow run."""

    def __init__(self, folder, uri):
        self.uri, self.paths, self.said = uri, RunPaths(folder), []

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
        return find_start(
            self.config(**sections), self.paths, text, today=today, force=force, say=lambda line: self.said.append(line)
        )

    def publish(self, run_id):
        tracker = tracking.open_tracker(self.config(), run_id)
        publisher = open_publisher(self.config(), tracker)
        publisher.saved(step_of(committed(self.paths.checkpoints)[-1]))
        assert publisher.close(60) == [] and tracker.close()


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """One store for all: making its tables takes longest."""
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    tracking.client(uri).create_experiment("pldr", artifact_location=(folder / "artifacts").as_uri())
    return uri


@pytest.fixture
def run(tmp_path, uri):
    """Steps 3 and 6 of a run, committed and published."""
    run = Run(tmp_path / "run", uri)
    run.id = run.start().run_id
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
    start = Run(tmp_path / "run", uri).start()
    assert start.checkpoint is None and start.run_id


def test_auto_the_run_and_its_folder_mean_the_newest(run):
    for text in ("auto", run.id, f"runs:/{run.id}", str(run.paths.root), str(run.paths.checkpoints)):
        start = run.start(text)
        assert (start.run_id, start.checkpoint.name, start.state["step"]) == (run.id, "step-000006", 6)
    assert names(run) == ["step-000003", "step-000006"] and run.said == []


def test_what_is_gone_here_comes_from_mlflow(run):
    shutil.rmtree(run.paths.checkpoints)
    assert run.start().checkpoint.name == "step-000006"
    assert run.said == [f"step-000006 fetched from MLflow run {run.id}"]


def test_a_damaged_checkpoint_falls_back_loudly(run):
    (run.paths.checkpoints / "step-000006" / "step-000006" / "weights.pt").write_bytes(b"x" * 100)
    assert run.start().checkpoint.name == "step-000003"
    assert "step-000006 is damaged and left out" in run.said[0] and "sha256" in run.said[0]
    assert (run.paths.checkpoints / ".damaged-step-000006").is_dir()


@pytest.mark.parametrize("by_path", [True, False])
def test_a_named_checkpoint_takes_the_run_back(run, by_path):
    target = run.paths.checkpoints / "step-000003"
    start = run.start(str(target) if by_path else f"runs:/{run.id}/checkpoints/step-000003")
    assert (start.run_id, start.checkpoint) == (run.id, target)
    uri = tracking.tracking_uri(run.config())
    assert names(run) == ["step-000003"] == tracking.published_checkpoints(uri, run.id)
    assert (run.paths.checkpoints / ".later-step-000006" / "step-000006" / "weights.pt").exists()  # nothing is deleted
    assert "back at step-000003: step-000006 set aside" in run.said[0]
    assert run.start().checkpoint == target  # the next start does not jump ahead again
    run.commit(6, run.id)
    run.publish(run.id)
    assert tracking.published_checkpoints(uri, run.id) == ["step-000006", "step-000003"]


def test_a_named_checkpoint_comes_from_mlflow_or_is_told_missing(run):
    shutil.rmtree(run.paths.checkpoints)
    assert run.start(f"runs:/{run.id}/checkpoints/step-000003").state["step"] == 3
    with pytest.raises(UserError, match=r"no committed checkpoint step-000004; it has \['step-000003'\]"):
        run.start(f"runs:/{run.id}/checkpoints/step-000004")


def test_a_path_begins_a_run_of_its_own(run, tmp_path):
    source = run.paths.checkpoints / "step-000003"
    other = Run(tmp_path / "other", run.uri)
    start = other.start(str(source), train={"max_lr": 1e-4})
    assert start.run_id != run.id and start.state["mlflow_run_id"] == start.run_id
    assert start.checkpoint == other.paths.checkpoints / "step-000003" and verify(start.checkpoint) == start.state
    assert verify(source)["mlflow_run_id"] == run.id and names(run) == ["step-000003", "step-000006"]  # untouched
    stored = tracking.client(tracking.tracking_uri(other.config())).get_run(start.run_id)
    assert stored.data.tags["pldr.continued_from"] == str(source) and stored.data.params["train.max_lr"] == "0.0001"
    # The same command again goes on with what this run has saved since; so does auto.
    other.commit(5, start.run_id, train={"max_lr": 1e-4})
    for text in (str(source), "auto"):
        assert other.start(text, train={"max_lr": 1e-4}).checkpoint.name == "step-000005"
    with pytest.raises(ConfigError, match="holds step-000005 of a run that did not begin with"):
        other.start(str(run.paths.checkpoints / "step-000006"), train={"max_lr": 1e-4})


def test_a_path_without_a_whole_checkpoint_is_refused(run, tmp_path):
    other = Run(tmp_path / "other", run.uri)
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
    other = Run(tmp_path / "other", run.uri)
    for place, text in ((run, "auto"), (run, back), (other, str(run.paths.checkpoints / "step-000003"))):
        with pytest.raises(ConfigError) as error:
            place.start(text, today=today, **sections)
        assert difference in str(error.value) and "--force" in str(error.value) and "\n" not in str(error.value)
    assert names(run) == ["step-000003", "step-000006"] and not (other.paths.root / "run.json").exists()
    for place, text in ((run, "auto"), (other, str(run.paths.checkpoints / "step-000003"))):
        start = place.start(text, today=today, force=True, **sections)
        assert start.checkpoint is not None
        assert [line for line in place.said if line.startswith("FORCED") and difference in line]


def test_force_does_not_make_another_recipe_the_same_run(run):
    with pytest.raises(ConfigError, match="was made with train.max_lr=0.001"):
        run.start(force=True, train={"max_lr": 1e-4})


def test_what_changed_is_told_and_becomes_tags(run):
    sections = {"train": {"zero_stage": 3, "micro_batch": 4, "precision": "bf16"}}
    start = run.start(**sections)
    changed = changes(start, run.config(**sections), ranks=1)
    assert changed == {
        "train.zero_stage": "1 -> 3",
        "train.micro_batch": "2 -> 4",
        "train.precision": "fp32 -> bf16",
        "train.ranks": "2 -> 1",
    }
    assert changes(start, run.config(), ranks=2) == {}
    tracking.set_tags(run.config(), run.id, {f"resumed.6.{key}": value for key, value in changed.items()})
    stored = tracking.client(tracking.tracking_uri(run.config())).get_run(run.id)
    assert stored.data.tags["resumed.6.train.zero_stage"] == "1 -> 3"
    assert stored.data.params["train.zero_stage"] == "1" and json.loads(stored.data.params["train.micro_batch"]) == 2


def test_a_checkpoint_of_before_a_model_key_existed_goes_on_with_its_default(run):
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
