"""`data.phases` names sources of the configuration: a misspelled one is found before anything works."""

import pytest

from launch.cli import main
from pipeline.config.data import DataConfig, Phase, Source
from pipeline.config.source_names import possible_names, require_sources
from pipeline.data.readers.sources import _derived_name
from pipeline.errors import ConfigError

YAML = """
name: t
run_dir: {folder}/run
data:
  separate_sources: true
  sources: [{{url: {folder}/web/*.jsonl, name: web}}, {{url: {folder}/books.jsonl.zst}}]
  phases: [{{until: 1, weights: {{web: 3, NAME: 1}}}}]
model: {{vocab_size: 300, num_layers: 1, num_heads: 1, head_dim: 4, context_length: 8}}
"""


@pytest.fixture
def file(tmp_path):
    def make(name):
        path = tmp_path / "t.yaml"
        path.write_text(YAML.format(folder=tmp_path).replace("NAME", name))
        return str(path)

    return make


@pytest.mark.parametrize("verb", ["plan", "config", "shard"])
def test_a_misspelled_source_is_named_by_every_verb(file, verb, capsys):
    assert main([verb, file("boks")]) == 2
    error = capsys.readouterr().err
    assert "data: phases: no source is named 'boks'; sources: books, web; correct the name" in error
    assert main(["plan", file("books")]) == 0


def test_before_the_first_data_stage_works_names_are_exact(file, tmp_path, capsys):
    """A folder with an extension keeps it, which only a look at the files says."""
    (tmp_path / "web").mkdir()
    (tmp_path / "books.jsonl.zst").mkdir()
    for name in ("web/a.jsonl", "books.jsonl.zst/b.jsonl"):
        (tmp_path / name).write_text('{"text": "a b c"}\n')
    assert main(["shard", file("books")]) == 2
    assert "data.phases: no source is named 'books'; sources: books.jsonl.zst, web" in capsys.readouterr().err
    assert not (tmp_path / "run" / "documents").exists()


def test_data_of_another_run_has_names_of_its_own():
    phases = [{"until": 1, "weights": {"boks": 1}}]
    assert DataConfig(sources=["x.txt"], of="runs/other", phases=phases).phases is not None


@pytest.mark.parametrize(
    "url",
    [
        "corpus/web", "corpus/web/", "web.jsonl", "a/web.v2.jsonl.zst", "s3://bucket/web/**/*.jsonl", "s3://bucket",
        "/data/[x].txt", "x/.hidden.txt", "a/été/x*.txt",
        "*.txt", "./../notes.md", "package://nltk/corpora/*.txt", "https://host/a b/c%20d.parquet",
    ],
)  # fmt: skip
def test_whatever_a_url_can_be_called_is_accepted(url):
    hows = ["file", "folder", "glob"] if any(c in url for c in "*?[") else ["file", "folder"]
    names = {_derived_name(url, how) for how in hows}
    assert names <= possible_names(url)
    for name in (*names, *(f"{name}-2" for name in names)):  # -2: another source has the name
        DataConfig(sources=[url], separate_sources=True, phases=[{"until": 1, "weights": {name: 1}}])


def test_every_phase_is_looked_at():
    phases = [Phase(until=0.5, weights={"a": 1}), Phase(until=1, weights={"b": 1})]
    require_sources(phases, {"a", "b"})
    require_sources(None, set())
    with pytest.raises(ConfigError, match=r"no source is named 'b'; sources: a, c"):
        require_sources(phases, {"c", "a"})
    with pytest.raises(ValueError, match="no source is named 'b'"):
        DataConfig(sources=[Source(url="x", name="a")], separate_sources=True, phases=phases)
