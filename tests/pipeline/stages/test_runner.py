"""Stages are skipped for the same inputs only, and what a run directory holds is never taken for another run's."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.config.load import load_config
from pipeline.config.paths import RunPaths
from pipeline.data.inspect.verify import verify
from pipeline.errors import ConfigError, UserError
from pipeline.stages.runner import LOCK, Pipeline, exclusive
from pipeline.stages.train import ranks_on_this_node
from pipeline.tracking.client import client, tracking_uri


def corpus(path, word, documents=40):
    with open(path, "w") as stream:
        for number in range(documents):
            rng = random.Random(f"{word}{number}")
            words = ["".join(rng.choices("abcdefghijklm", k=rng.randint(2, 6))) for _ in range(200)]
            text = f"{word} " + " ".join(words)
            stream.write(json.dumps({"text": text}) + "\n")


def no_launch(config, job_file, ranks):
    raise AssertionError("nothing here trains")


@pytest.fixture
def make(tmp_path):
    corpus(tmp_path / "corpus.jsonl", "alpha")
    tree = {
        "name": "t",
        "run_dir": str(tmp_path / "run"),
        "data": {"sources": [{"url": str(tmp_path / "corpus.jsonl")}], "val_fraction": 0.2, "test_fraction": 0.1},
        "model": {"vocab_size": 320, "num_layers": 1, "num_heads": 1, "head_dim": 4, "context_length": 16},
        "train": {"steps": 4, "warmup_steps": 1, "global_batch": 4, "micro_batch": 2, "ranks": 2, "precision": "fp32"},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))

    def make_pipeline(*overrides, launch=no_launch):
        reported = []
        return Pipeline(load_config(path, list(overrides)), launch=launch, report=reported.append), reported

    return make_pipeline


def data_stages(pipeline, *, replace=False):
    return {name: pipeline.stage(name, replace=replace)["skipped"] for name in ("shard", "tokenizer", "tokenize")}


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_same_inputs_skip_and_changed_inputs_do_not(make, tmp_path):
    assert not any(data_stages(make()[0]).values())
    assert all(data_stages(make()[0]).values())
    assert all(data_stages(make("data.workers=1", "train.max_lr=1e-4")[0]).values())  # keys that change no data
    assert data_stages(make("tokens.remainder=pad")[0], replace=True) == {
        "shard": True,
        "tokenizer": True,
        "tokenize": False,
    }
    corpus(tmp_path / "corpus.jsonl", "beta")
    assert not any(data_stages(make("tokens.remainder=pad")[0]).values())


@pytest.mark.parametrize(
    ("stage", "override", "held"),
    [
        ("shard", "data.min_characters=5", "documents"),
        ("tokenizer", "model.vocab_size=330", "a tokenizer"),
        ("tokenize", "tokens.remainder=pad", "tokens"),
    ],
)
def test_data_of_another_configuration_are_replaced_only_when_that_is_asked_for(make, tmp_path, stage, override, held):
    data_stages(make()[0])
    before = files_of(tmp_path / "run")
    for force in (False, True):
        with pytest.raises(
            ConfigError, match=f"holds {held} that another run or configuration made; .*--replace.* lost"
        ):
            make(override)[0].stage(stage, force=force)
    with pytest.raises(ConfigError, match="--replace"):
        make(override)[0].run()
    assert files_of(tmp_path / "run") == before
    assert make(override)[0].stage(stage, replace=True)["skipped"] is False


def trained(root, step=4):
    """As if a model had been trained there."""
    checkpoint = root / "checkpoints" / f"step-{step:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMMITTED").write_text("x")


def test_data_that_a_model_was_trained_with_stay_when_their_source_changes(make, tmp_path):
    data_stages(make()[0])
    trained(tmp_path / "run")
    before = files_of(tmp_path / "run")
    corpus(tmp_path / "corpus.jsonl", "beta")
    with pytest.raises(ConfigError, match=r"came of other input.* step-000004 in .* --replace.* neither be resumed"):
        make()[0].stage("shard")
    assert files_of(tmp_path / "run") == before
    assert make()[0].stage("shard", replace=True)["skipped"] is False
    with pytest.raises(ConfigError, match="--replace"):
        make()[0].stage("tokenizer")


def test_what_is_made_again_is_told_before_also_with_records_that_know_no_settings(make, tmp_path):
    pipeline = make()[0]
    data_stages(pipeline)
    trained(tmp_path / "run")
    file = tmp_path / "run" / "stages" / "shard.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in record.items() if key not in ("settings", "digest")}))
    job = {"schema_version": 1, "config": pipeline.config.as_dict()}
    (tmp_path / "run" / "logs").mkdir(exist_ok=True)
    (tmp_path / "run" / "logs" / "job.json").write_text(json.dumps(job))
    corpus(tmp_path / "corpus.jsonl", "beta")
    pipeline, reported = make()
    pipeline.stage("shard")
    said = next(line for line in reported if "makes documents again" in line)
    assert "the input has changed since; step-000004 in" in said and reported.index(said) == 0


def test_data_that_a_model_was_trained_with_can_be_mended(make, tmp_path):
    data_stages(make()[0])
    trained(tmp_path / "run")
    first = files_of(tmp_path / "run" / "tokens")
    next((tmp_path / "run" / "tokens").glob("train-*.tar")).unlink()
    assert data_stages(make()[0]) == {"shard": True, "tokenizer": True, "tokenize": False}
    assert files_of(tmp_path / "run" / "tokens") == first


def test_data_of_another_run_in_a_shared_folder_are_not_replaced(make, tmp_path):
    shared = f"data.output={tmp_path / 'shared'}"
    make(shared)[0].stage("shard")
    before = files_of(tmp_path / "shared")
    corpus(tmp_path / "other.jsonl", "beta")
    other = (shared, f"run_dir={tmp_path / 'other'}", f"data.sources=[{{url: {tmp_path / 'other.jsonl'}}}]")
    with pytest.raises(ConfigError, match=r"shared: holds documents that another run .*--replace"):
        make(*other)[0].stage("shard")
    assert files_of(tmp_path / "shared") == before


def test_a_given_tokenizer_does_not_hide_a_changed_corpus(make, tmp_path):
    data_stages(make()[0])
    given = tmp_path / "given.model"
    given.write_bytes((tmp_path / "run" / "tokenizer" / "tokenizer.model").read_bytes())
    override = f"tokenizer.model={given}"
    data_stages(make(override)[0], replace=True)
    corpus(tmp_path / "corpus.jsonl", "beta")
    assert data_stages(make(override)[0])["tokenize"] is False


def test_a_deleted_output_is_made_again(make, tmp_path):
    data_stages(make()[0])
    first = {p.name: p.read_bytes() for p in (tmp_path / "run" / "tokens").iterdir()}
    next((tmp_path / "run" / "tokens").glob("train-*.tar")).unlink()
    assert data_stages(make()[0]) == {"shard": True, "tokenizer": True, "tokenize": False}
    assert {p.name: p.read_bytes() for p in (tmp_path / "run" / "tokens").iterdir()} == first


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"schema_version": 2}', '{"schema_version": 2, "inputs": "x", "result": 3}']
)
def test_a_damaged_stage_record_does_not_count(make, tmp_path, content):
    data_stages(make()[0])
    (tmp_path / "run" / "stages" / "tokenize.json").write_text(content)
    assert data_stages(make()[0])["tokenize"] is False


def test_a_changed_digit_in_a_stage_record_is_not_told_as_a_result(make, tmp_path):
    data_stages(make()[0])
    file = tmp_path / "run" / "stages" / "tokenize.json"
    record, intact = json.loads(file.read_bytes()), file.read_text()
    ratio = record["result"]["bytes_per_token"]
    file.write_text(intact.replace(f'"bytes_per_token": {ratio}', f'"bytes_per_token": {ratio + 1}'))
    assert file.read_text() != intact
    assert data_stages(make()[0])["tokenize"] is False
    assert json.loads(file.read_bytes())["result"]["bytes_per_token"] == ratio
    outputs = {name: [size, mtime, sha256] for name, (size, mtime, sha256) in record["outputs"].items()}
    file.write_text(
        json.dumps({**json.loads(file.read_bytes()), "outputs": outputs})
    )  # these are compared with the files
    (file.with_name("shard.json")).write_text(intact)  # another stage's
    assert make()[0].record("shard") is None and make()[0].record("tokenize") is not None
    for damaged in ({"x": 5}, [], {"x": [1, 2, 3]}):
        file.write_text(json.dumps({**record, "outputs": damaged}))
        assert make()[0].record("tokenize") is None


def test_another_tokenizer_than_its_stage_wrote_is_not_used(make, tmp_path):
    """A vocabulary with one changed byte may still be one."""
    data_stages(make()[0])
    file = tmp_path / "run" / "tokenizer" / "tokenizer.model"
    at = file.read_bytes().index(b"al")
    file.write_bytes(file.read_bytes()[:at] + b"bl" + file.read_bytes()[at + 2 :])
    with pytest.raises(UserError, match=r"tokenizer.model: changed since `pldr tokenizer` wrote it"):
        make()[0].stage("tokenize", force=True)


def test_a_changed_count_of_a_task_is_counted_again(make, tmp_path):
    """Killed after the last task: the index is made of what the tasks have left."""
    data_stages(make()[0])
    run = tmp_path / "run"
    index, intact = run / "documents" / "index.json", (run / "documents" / "index.json").read_bytes()
    for kind, old, new in (
        ("clean/stats", b'"total": 40', b'"total": 41'),
        ("write/records", b'"words": ', b'"words": 1'),
    ):
        (run / "stages" / "shard.json").unlink()
        index.unlink()
        changed = [file for file in (run / "logs").glob(f"shard-*/{kind}/*.json") if old in file.read_bytes()]
        assert changed, kind
        changed[0].write_bytes(changed[0].read_bytes().replace(old, new, 1))
        make()[0].stage("shard")
        assert index.read_bytes() == intact, kind


def test_a_stage_called_by_name_replaces_a_file_with_a_flipped_bit(make, tmp_path):
    """Same size, same time: only the hash differs. The errors that such a file causes advise: run `pldr tokenize` again."""
    data_stages(make()[0])
    tar = next((tmp_path / "run" / "tokens").glob("train-*.tar"))
    intact, facts = tar.read_bytes(), tar.stat()
    tar.write_bytes(intact[:2000] + bytes([intact[2000] ^ 1]) + intact[2001:])
    os.utime(tar, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert make()[0].stage("tokenize")["skipped"] is False
    assert tar.read_bytes() == intact


def test_a_folder_with_other_files_is_no_run_directory(make, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("mine")
    with (
        pytest.raises(ConfigError, match="holds files that are no run's"),
        exclusive(make(f"run_dir={tmp_path / 'home'}")[0].paths, print),
    ):
        raise AssertionError("not reached")
    assert [p.name for p in (tmp_path / "home").iterdir()] == ["thesis.txt"]


def test_a_stage_needs_the_one_before(make):
    with pytest.raises(ConfigError, match="stage train: tokenize has not finished; run `pldr tokenize` first"):
        make()[0].stage("train")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.micro_batch=4", "train.global_batch 4 is not a multiple of micro_batch 4 x 2 ranks"),
        ("train.deepspeed=/nowhere.json", "no such file"),
    ],
)
def test_a_mistake_in_the_training_is_reported_before_anything_starts(make, override, message):
    data_stages(make()[0])
    with pytest.raises(ConfigError, match=message):
        make(override)[0].stage("train")


def test_tokens_for_another_model_are_refused(make):
    data_stages(make()[0])
    one = make("model.context_length=32")[0]
    with pytest.raises(UserError, match=r"context.length"):
        from pipeline.stages.train import prepare

        prepare(one.config, one.paths, resume="auto", ranks=2, report=print)


def test_a_launch_that_trained_nothing_is_a_failure_and_marks_the_run(make):

    def status():
        """And RUNNING again, as ranks would mark it."""
        run_id = json.loads((one.paths.root / "run.json").read_text())["run_id"]
        mlflow = client(tracking_uri(one.config))
        before = mlflow.get_run(run_id).info.status
        mlflow.update_run(run_id, status="RUNNING")
        return before

    data_stages(make()[0])
    one, _ = make(launch=lambda config, job, ranks: None)
    with pytest.raises(UserError, match="training ended before step 4"):
        one.stage("train")
    assert status() == "FAILED"

    def fail(config, job_file, ranks):
        raise UserError("rank 1: something broke")

    with pytest.raises(UserError, match="something broke"):
        make(launch=fail)[0].stage("train")
    assert status() == "FAILED"


def test_a_restart_that_cannot_be_prepared_marks_the_run_failed(make, monkeypatch):
    """With the traceback of the crash as an artifact; the disk has filled up in between."""
    from pipeline.stages import train

    def crash(config, job_file, ranks):
        (one.paths.logs / "train.log").write_text("Traceback (most recent call last):\n  File\nOSError: rank 1 broke\n")
        monkeypatch.setattr(train, "disk_needed", full)
        raise UserError("rank 1: something broke")

    def full(config, paths):
        raise UserError("the disk is full")

    data_stages(make()[0])
    one, reported = make("train.max_restarts=1", launch=crash)
    with pytest.raises(UserError, match="the disk is full"):
        one.stage("train")
    assert "rank 1: something broke; it could not be restarted" in reported
    mlflow = client(tracking_uri(one.config))
    run_id = json.loads((one.paths.root / "run.json").read_text())["run_id"]
    assert mlflow.get_run(run_id).info.status == "FAILED"
    (artifact,) = mlflow.list_artifacts(run_id, "failure")
    with open(mlflow.download_artifacts(run_id, artifact.path)) as stream:
        text = stream.read()
    assert "the disk is full" in text and "rank 1 broke" in text


def test_ranks_divide_the_global_batch(make):
    assert ranks_on_this_node(make()[0].config) == 2
    assert ranks_on_this_node(make("train.ranks=null")[0].config) == 2
    assert ranks_on_this_node(make("train.ranks=null", "train.micro_batch=4")[0].config) == 1


def test_deepspeeds_json_counts_by_what_it_holds_and_not_by_its_path(make, tmp_path):
    data_stages(make()[0])

    def inputs(name, text):
        (tmp_path / name).write_text(text)
        return make(f"train.deepspeed={tmp_path / name}")[0].inputs("train")

    assert inputs("a.json", '{"a": 1}') == inputs("b.json", '{ "a": 1 }\n') != inputs("b.json", '{"a": 2}')


def test_a_process_that_holds_nodes_does_not_wait_for_ever(tmp_path):
    paths = RunPaths(tmp_path / "run")
    paths.root.mkdir()
    holds = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); input()"
    command = [sys.executable, "-c", holds, str(paths.root / LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        said = []
        with (
            pytest.raises(UserError, match="works here; it did not end in 0.1 s"),
            exclusive(paths, said.append, wait_s=0.1),
        ):
            pass
        assert "waiting for it to end" in said[0]
        other.communicate("\n")
    with exclusive(paths, said.append, wait_s=0.1):
        pass


def test_five_that_begin_at_once_in_a_new_run_directory_work_one_after_another(tmp_path, at_once):
    def work(turn, number):
        paths, reported = RunPaths(str(tmp_path / f"run{turn}")), []
        with exclusive(paths, reported.append):
            inside = paths.root / "inside"
            inside.touch(exist_ok=False)
            inside.unlink()
            (paths.root / f"made-by-{number}").touch()
        return reported

    reports = at_once(work, rounds=20)
    assert all(line.endswith("works here; waiting for it to end") for reported in reports for line in reported)


def test_whoever_waited_for_a_removed_run_directory_begins_anew(make, tmp_path, at_once):
    pipeline, root = make()[0], tmp_path / "run"

    def work(turn, number):
        if number == 0:
            with exclusive(pipeline.paths, print):
                (tmp_path / "begun").touch()
                while not (tmp_path / "waiting").exists():
                    pass
                shutil.rmtree(root)
            return None
        while not (tmp_path / "begun").exists():
            pass
        with exclusive(pipeline.paths, lambda line: (tmp_path / "waiting").touch()):
            return (root / ".lock").exists()

    assert at_once(work, processes=2) == [None, True]


def test_a_folder_for_documents_has_one_writer_and_the_others_are_told(make, tmp_path, at_once):
    folder = tmp_path / "shared" / "documents"

    def shard(turn, number):
        pipeline = make(f"run_dir={tmp_path}/run{turn}.{number}", f"data.output={folder}")[0]
        with exclusive(pipeline.paths, print):
            try:
                return "done" if pipeline.stage("shard") else None
            except UserError as error:
                return str(error)

    said = at_once(shard)
    assert said.count("done") == 1, said
    told = ("writes documents there; wait for it, or name another folder in data.output", "that another run or")
    assert all(any(words in one for words in told) for one in said if one != "done"), said
    assert verify(f"{folder}", None, print)["documents"]["files"]


def test_a_run_that_begins_while_another_looks_at_its_new_directory_is_no_foreign_one(tmp_path, monkeypatch):
    """The other one makes its lock, then its files, between two looks of ours."""
    root, listing = tmp_path / "run", Path.iterdir

    def begun_meanwhile(folder):
        (root / ".lock").touch()
        (root / "logs").mkdir(exist_ok=True)
        return listing(folder)

    monkeypatch.setattr(Path, "iterdir", begun_meanwhile)
    with exclusive(RunPaths(str(root)), print):
        pass
    monkeypatch.undo()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="no run's"), exclusive(RunPaths(str(tmp_path / "foreign")), print):
        pass
