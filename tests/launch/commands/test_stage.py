"""`pldr run`, the stages and `pldr plan`: the verbs are the stages, in their order."""

from launch.commands.stage import STAGE_HELP
from pipeline.stages.runner import NAMES


def test_every_stage_is_a_verb():
    assert tuple(STAGE_HELP) == tuple(NAMES)
