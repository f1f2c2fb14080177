"""`pldr config`: every key with where its value comes from, and the JSON Schema that editors read."""

import json

import pytest
import yaml

from launch.cli import main
from pipeline.config.explain import json_schema, lines, rows
from pipeline.config.keys import all_kinds
from pipeline.config.load import load_with_origins
from pldr_model.config import ModelConfig
from tests.pipeline.config.test_load import TREE


@pytest.fixture
def found(tmp_path):
    """The rows of a YAML that extends another, by key."""
    (tmp_path / "parent.yaml").write_text(yaml.safe_dump({**TREE, "train": {"steps": 5000, "max_lr": 0.01}}))
    child = {"extends": "parent.yaml", "name": "child", "data": {"clean": {"language": True}}}
    (tmp_path / "child.yaml").write_text(yaml.safe_dump(child))
    overrides = ["train.steps=6000", "train.freeze_g={at_step: 9}"]
    return {row.key: row for row in rows(*load_with_origins(tmp_path / "child.yaml", overrides))}


def test_each_row_says_where_its_value_comes_from(found, tmp_path):
    steps, rate, name, clip = (found[key] for key in ("train.steps", "train.max_lr", "name", "train.clip"))
    assert (steps.value, steps.default, steps.origin, steps.on_resume) == (6000, 250_000, "command line", "fixed")
    assert rate.origin == str(tmp_path / "parent.yaml") and name.origin == str(tmp_path / "child.yaml")
    assert name.required and not rate.required and clip.origin == "default"
    assert found["train.freeze_g.at_step"].origin == "command line"
    assert found["data.clean.language.keep"].value == ["en"]


def test_every_key_has_a_row_and_a_meaning(found):
    optional = (
        "train.freeze_g",
        "train.batch_warmup.",
        "data.phases.",
        "train.evaluate.",
        "data.sources.",
        "data.clean.",
        "post.key_rank.",
    )
    assert {key for key in all_kinds() if not key.startswith(optional)} <= set(found)
    assert all(row.meaning for row in found.values())
    assert len({row.key for row in found.values() if row.key.startswith("model.")}) == len(
        ModelConfig.__dataclass_fields__
    )


def test_the_lines_name_the_default_of_what_is_set_and_what_may_not_change(found):
    text = "\n".join(lines(list(found.values())))
    assert "optimizer steps (default 250000; command line; on resume: fixed)" in text
    assert "of the MLflow run (required; " in text


def test_the_schema_knows_plain_sources_switches_and_extends():
    schema = json_schema()
    assert schema["properties"]["extends"]["type"] == "string" and "required" not in json.dumps(schema)
    clean = schema["$defs"]["Clean"]["properties"]["quality"]["anyOf"]
    assert {"type": "boolean"} in clean and {"$ref": "#/$defs/QualityFilter"} in clean
    assert {"type": "string"} in schema["$defs"]["DataConfig"]["properties"]["sources"]["anyOf"]
    assert schema["$defs"]["ModelConfig"]["properties"]["head_dim"]["description"].startswith("Size of a head")


def test_the_shipped_schema_is_todays_and_the_shipped_yamls_name_it(repository):
    file = repository / "pipeline" / "config" / "schema.json"
    assert json.loads(file.read_text()) == json_schema(), "run: pldr config --schema > pipeline/config/schema.json"
    yamls = list((repository / "configs").rglob("*.yaml"))
    sweeps = {path for path in yamls if "config" in yaml.safe_load(path.read_text())}
    assert len(sweeps) >= 10
    for path in {*yamls} - sweeps:
        first = path.read_text().splitlines()[0]
        named = first.removeprefix("# yaml-language-server: $schema=")
        assert first != named and (path.parent / named).resolve() == file, path


def test_the_verb_needs_a_yaml_or_the_wish_for_the_schema(capsys):
    assert main(["config"]) == 2
    assert "name a YAML, or ask for the JSON Schema with --schema" in capsys.readouterr().err
