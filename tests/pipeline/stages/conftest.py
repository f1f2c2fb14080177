"""A pipeline whose data stages can run."""

import pytest

from tests.helpers.stages import make_in


@pytest.fixture
def make(tmp_path):
    return make_in(tmp_path)
