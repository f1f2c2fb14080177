"""`pldr run`, the stages and `pldr plan`: every row of the table of stages is a verb."""

import pytest

from launch.cli import main
from pipeline.stages.table import STAGES


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_stage_is_a_verb(stage, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([stage.name, "--help"])
    text = capsys.readouterr().out
    assert stage.help in " ".join(text.split()) and ("--dry-run" in text) == stage.has_dry_run
