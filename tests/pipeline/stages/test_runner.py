"""Stages are skipped for the same inputs only, and what a run directory holds is never taken for another run's."""

import json
import os

import pytest

from pipeline.errors import ConfigError, UserError
from pipeline.stages.runner import Pipeline
from pipeline.stages.train import ranks_on_this_node
from pipeline.tracking.client import client, tracking_uri
from tests.helpers.stages import corpus, data_stages


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


def test_a_stage_needs_the_one_before(make):
    with pytest.raises(ConfigError, match="stage train: tokenize has not finished; run `pldr tokenize` first"):
        make()[0].stage("train")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.micro_batch=4", "train.global_batch 4 is not a multiple of micro_batch 4 x 2 ranks"),
        ("train.deepspeed=/nowhere.json", "no such file"),
        ("train.deepspeed={data_types: fp32}", "data_types must be a mapping"),
        ("train.deepspeed={zero_optimization: 1}", "zero_optimization must be a mapping"),
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


def test_a_run_resumes_its_training_where_it_is_asked_to(make, monkeypatch):
    asked = {}
    monkeypatch.setattr(Pipeline, "stage", lambda self, name, *, resume, thorough: asked.update({name: resume}))
    make()[0].run(resume="runs/old")
    assert asked.pop("train") == "runs/old" and set(asked.values()) == {"auto"}
