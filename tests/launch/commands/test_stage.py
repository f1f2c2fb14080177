"""`pldr run`, the stages and `pldr plan`: every row of the table of stages is a verb."""

import pytest

from launch.cli import main
from pipeline.config.load import load_config
from pipeline.stages.table import STAGES


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_stage_is_a_verb(stage, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([stage.name, "--help"])
    text = capsys.readouterr().out
    assert stage.help in " ".join(text.split()) and ("--dry-run" in text) == stage.has_dry_run


def test_the_option_with_metric_learner_is_its_key(capsys, monkeypatch, repository):
    asked = []

    def load(file, overrides):
        asked.append(overrides)
        return load_config(file, overrides)

    monkeypatch.setattr("pipeline.config.load.load_config", load)
    config = str(repository / "configs" / "quickstart.yaml")
    where = "run_dir=/nowhere/run"
    assert main(["bundle", config, where, "--with-metric-learner", "post.weight_format=int8"]) == 2
    assert asked == [[where, "post.weight_format=int8", "post.with_metric_learner=true"]]
    errors = capsys.readouterr().err
    assert "with_metric_learner needs weight_format fp32, not int8" in errors and errors.count("\n") == 1
