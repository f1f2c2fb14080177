"""A run that uses another run's documents, tokenizer and tokens in place: `data.of`, and what `--resume PATH` makes of it."""

import shutil

import pytest

from pipeline.config.paths import data_paths, documents_folder, tokens_folder
from pipeline.errors import ConfigError, UserError
from pipeline.stages import borrow
from tests.helpers.stages import corpus, data_stages, files_of, make_in, trained


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A corpus, and a run directory `run` with its data; made once."""
    folder = tmp_path_factory.mktemp("home")
    make = make_in(folder)
    data_stages(make()[0])
    return folder, make


@pytest.fixture
def lender(home, make, tmp_path):
    """A copy of that run directory."""
    return shutil.copytree(home[0] / "run", tmp_path / "run")


@pytest.fixture
def make(home, tmp_path):
    """A pipeline of that configuration in `tmp_path`."""
    return lambda *overrides, **options: home[1](f"run_dir={tmp_path / 'run'}", *overrides, **options)


def borrower(make, tmp_path, *overrides, name="new"):
    return make(f"run_dir={tmp_path / name}", *overrides)


def test_nothing_is_made_or_copied_and_the_run_directory_remembers(make, tmp_path, lender):
    before = files_of(lender)
    pipeline, reported = borrower(make, tmp_path, f"data.of={lender}", "train.steps=8")
    assert data_stages(pipeline) == dict.fromkeys(("shard", "tokenizer", "tokenize"), True)
    assert reported[-1].split(maxsplit=1) == ["tokenize", f"tokens of {lender}, used in place"]
    assert files_of(lender) == before
    assert sorted(files_of(tmp_path / "new")) == [f"stages/{name}.json" for name in ("shard", "tokenize", "tokenizer")]
    without = borrower(make, tmp_path)[0]  # no data.of: the records say it
    assert without.config.data.of == str(lender) and list(without.finished()) == ["shard", "tokenizer", "tokenize"]
    config = borrower(make, tmp_path)[0].config.model_copy(update={"data": make()[0].config.data})
    assert config.data.of is None and data_paths(config).tokenizer.is_file()
    assert documents_folder(config) == str(lender / "documents") and tokens_folder(config) == str(lender / "tokens")
    assert without.inputs("train")["before"] == make()[0].inputs("train")["before"]


def test_a_later_stage_takes_the_data_first(make, tmp_path, lender):
    with pytest.raises(ConfigError, match="train has not finished"):
        borrower(make, tmp_path, f"data.of={lender}")[0].stage("consolidate")
    assert "stages/tokenize.json" in files_of(tmp_path / "new")


def test_who_borrows_from_a_borrower_has_the_data_of_the_first(make, tmp_path, lender):
    data_stages(borrower(make, tmp_path, f"data.of={lender}")[0])
    third = borrower(make, tmp_path, f"data.of={tmp_path / 'new'}", name="third")[0]
    data_stages(third)
    assert third.config.data.of == str(lender)


def test_data_in_folders_of_their_own_are_used_there(make, tmp_path):
    outputs = (f"data.output={tmp_path / 'docs'}", f"tokens.output=file://{tmp_path / 'tok'}")
    data_stages(make(*outputs)[0])
    pipeline = borrower(make, tmp_path, f"data.of={tmp_path / 'run'}", *outputs)[0]
    data_stages(pipeline)
    assert tokens_folder(pipeline.config) == f"file://{tmp_path / 'tok'}"
    with pytest.raises(ConfigError, match=r"data.of .*/run: made its documents with other settings"):
        data_stages(borrower(make, tmp_path, f"data.of={tmp_path / 'run'}", name="other")[0])


def test_what_does_not_fit_is_refused(make, tmp_path, lender):
    for key, held in (("data.min_characters=9", "documents"), ("model.vocab_size=330", "a tokenizer")):
        with pytest.raises(ConfigError, match=f"made its {held} with other settings"):
            data_stages(borrower(make, tmp_path, f"data.of={lender}", key)[0])
    with pytest.raises(ConfigError, match="has no finished documents"):
        data_stages(borrower(make, tmp_path, f"data.of={tmp_path / 'nothing'}")[0])
    with pytest.raises(ConfigError, match="make them again there"):
        borrower(make, tmp_path, f"data.of={lender}")[0].stage("shard", replace=True)
    data_stages(borrower(make, tmp_path, name="own")[0])
    with pytest.raises(ConfigError, match="has documents of its own"):
        data_stages(borrower(make, tmp_path, f"data.of={lender}", name="own")[0])


def test_data_that_changed_or_went_are_noticed_by_every_stage(make, tmp_path, lender):
    pipeline = borrower(make, tmp_path, f"data.of={lender}")[0]
    data_stages(pipeline)
    tokens = next((lender / "tokens").glob("train-*.tar"))
    tokens.write_bytes(tokens.read_bytes() + b"x")
    for stage in ("tokenize", "train", "validate"):
        with pytest.raises(UserError, match=rf"{tokens.name}: missing, or changed since .* make it again there"):
            pipeline.stage(stage)
    shutil.rmtree(lender)
    with pytest.raises(ConfigError, match=rf"data.of {lender}: has no finished documents .* where they are now"):
        pipeline.stage("train")


def test_other_data_do_not_take_the_place_of_those_that_a_model_was_trained_with(make, tmp_path, lender):
    pipeline = borrower(make, tmp_path, f"data.of={lender}")[0]
    data_stages(pipeline)
    trained(tmp_path / "new")
    shutil.copytree(lender, tmp_path / "moved")
    data_stages(borrower(make, tmp_path, f"data.of={tmp_path / 'moved'}")[0])  # the same data elsewhere
    corpus(tmp_path / "other.jsonl", "beta")
    other = f"data.sources=[{{url: {tmp_path / 'other.jsonl'}}}]"
    data_stages(make(other)[0], replace=True)
    with pytest.raises(ConfigError, match="other documents .* than .*step-000004 was trained with"):
        data_stages(borrower(make, tmp_path, f"data.of={lender}", other)[0])


def test_a_run_that_continues_another_one_gets_its_data_where_they_fit(make, tmp_path, lender):
    checkpoint = lender / "checkpoints" / "step-000004"
    checkpoint.mkdir(parents=True)
    new, said = borrower(make, tmp_path)[0].config, []
    for path in (lender, checkpoint.parent, checkpoint):
        assert borrow.with_data_of(new, path, said.append).data.of == str(lender)
    assert said == []
    other = borrower(make, tmp_path, "data.min_characters=9")[0].config
    assert borrow.with_data_of(other, lender, said.append).data.of is None
    assert said[0].startswith("this run makes its own data: data.of") and "with other settings" in said[0]
    assert borrow.with_data_of(make()[0].config, lender, said.append).data.of is None  # itself
    data_stages(borrower(make, tmp_path)[0])  # it has its own
    assert borrow.with_data_of(new, lender, said.append).data.of is None
