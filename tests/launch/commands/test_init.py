"""`pldr init` writes a YAML that runs."""

import json
from pathlib import Path

import pytest
import yaml

from launch.cli import main
from pipeline.config.load import load_config
from pipeline.config.schedule import BUDGET_PUBLISHED, planned_budget
from pipeline.config.starter import EPOCHS, SIZES, Corpus, starter_yaml


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for number in range(40):
        sentence = f"It was the number {number} that nobody in the house had ever heard of.\n"
        (tmp_path / "texts" / f"{number}.txt").write_text("# A heading that is not a sentence of it\n" + sentence * 400)
    return tmp_path


def test_the_yaml_loads_and_fits_the_corpus(corpus, capsys):
    assert main(["init", "mine", "--corpus", "texts/*.txt"]) == 0
    assert "pldr run mine.yaml" in capsys.readouterr().out
    config = load_config("mine.yaml")
    first = (corpus / "mine.yaml").read_text().splitlines()[0]
    assert first.startswith("# yaml-language-server: ") and Path(first.partition("$schema=")[2]).is_file()
    assert [source.url for source in config.data.sources] == ["texts/*.txt"]
    assert config.post.sample_prompt == "It was the number"
    assert config.run_dir == "runs/mine"
    assert config.train.warmup_steps < config.train.steps and planned_budget(config.train) > BUDGET_PUBLISHED


@pytest.mark.parametrize("count", [2, 3, 10, 40])
def test_a_few_documents_are_in_all_splits(corpus, count):
    """A share of few documents can select none; whole documents are chosen by a hash."""
    names = [name for number in range(count) for name in ("--corpus", f"texts/{number}.txt")]
    for number in range(count):
        (corpus / "texts" / f"{number}.txt").write_text(
            f"It was the number {number} that nobody had heard of.\n" * 9000
        )
    assert main(["init", "mine", *names]) == 0 and main(["shard", "mine.yaml"]) == 0
    splits = json.loads((corpus / "runs" / "mine" / "documents" / "index.json").read_text())["splits"]
    assert splits["train"]["documents"] >= splits["val"]["documents"] >= 1
    assert (splits["test"]["documents"] > 0) is (count > 3)


def test_passes_are_counted_over_the_training_split(tmp_path):
    """Of three documents one is held out, and may be the longest."""
    corpus = Corpus(["a"], 3_000_000, 3, "He said", ((0.3, 2_000_000), (0.6, 500_000), (0.9, 500_000)))
    text = starter_yaml("x", corpus, "tiny")
    tokens = 1_000_000 / SIZES["tiny"].bytes_per_token
    assert yaml.safe_load(text)["train"]["steps"] * 512 == pytest.approx(EPOCHS * tokens, rel=0.03)
    assert "passes over the training split" in text


def test_a_corpus_that_is_small_for_the_model_is_told(corpus, capsys):
    assert main(["init", "large", "--corpus", "texts", "--size", "30m"]) == 0
    said = capsys.readouterr().out
    assert "small for this model" in said and "steps are few: attention may stay dead" in said


def test_one_long_document_is_to_be_cut(corpus, capsys):
    (corpus / "all.txt").write_text("To be, or not to be, that is the question.\n" * 20000)
    assert main(["init", "mine", "--corpus", "all.txt"]) == 2
    assert "split -C 50k" in capsys.readouterr().err


def test_a_yaml_that_is_there_is_not_replaced(corpus, capsys):
    (corpus / "mine.yaml").write_text("mine")
    assert main(["init", "mine", "--corpus", "texts"]) == 2
    assert "mine.yaml: is there already" in capsys.readouterr().err and (corpus / "mine.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mine", "--corpus", "texts/0.txt"], "name more files"),
        (["mine", "--corpus", "gone/*.txt"], "matches no file"),
        (["a/b", "--corpus", "texts"], "letters, digits"),
    ],
)
def test_a_corpus_or_name_that_cannot_be_used_is_one_line(corpus, capsys, words, message):
    assert main(["init", *words]) != 0
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1
    assert not list(corpus.glob("**/*.yaml"))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("megabytes", [1, 100, 100_000])
def test_every_size_fits_every_corpus(tmp_path, size, megabytes):
    corpus = Corpus(["a: #b"], megabytes * 10**6, 1000, 'He said: "no"')
    tree = yaml.safe_load(starter_yaml("x", corpus, size))
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(tree))
    config = load_config(tmp_path / "x.yaml")
    tokens = corpus.text_bytes / SIZES[size].bytes_per_token
    trained = config.train.steps * config.train.global_batch * config.model.context_length
    assert trained <= 1.1 * EPOCHS * tokens or config.train.steps == 300
    assert config.data.sources[0].url == "a: #b" and config.post.sample_prompt == 'He said: "no"'
    assert planned_budget(config.train) > BUDGET_PUBLISHED
