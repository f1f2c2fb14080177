"""What replaces documents, a tokenizer or tokens that are there, and who may write them."""

import json
import os

import pytest

from pipeline.data.inspect.verify import verify
from pipeline.errors import ConfigError, UserError
from pipeline.stages.runner import exclusive
from tests.helpers.stages import corpus, data_stages, files_of, trained


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


def test_the_same_files_with_other_times_give_the_same_data_and_the_error_says_so(make, tmp_path):
    data_stages(make()[0])
    trained(tmp_path / "run")
    before = files_of(tmp_path / "run" / "tokens")
    os.utime(tmp_path / "corpus.jsonl", (1, 1))
    with pytest.raises(
        ConfigError, match=r"--replace`: nothing changes if the same files only have other times or paths"
    ):
        make()[0].stage("shard")
    assert make()[0].stage("shard", replace=True)["skipped"] is False
    assert data_stages(make()[0]) == {"shard": True, "tokenizer": True, "tokenize": True}
    assert files_of(tmp_path / "run" / "tokens") == before


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
