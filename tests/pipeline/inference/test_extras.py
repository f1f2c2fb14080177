"""A missing extra is one line with the command that installs it."""

import pytest

from pipeline.errors import UserError
from pipeline.inference.extras import require


def test_what_is_installed_is_imported():
    require("json", "torch", extra="hf")


def test_the_first_missing_package_is_named():
    with pytest.raises(UserError) as caught:
        require("json", "absent_package.part", "another_absent", extra="serve")
    assert (
        str(caught.value) == "absent_package is not installed; pip install 'pldr[serve]'"
        and caught.value.exit_code == 2
    )
