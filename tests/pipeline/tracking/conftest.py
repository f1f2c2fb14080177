"""An empty MLflow store to copy."""

import pytest

from pipeline.tracking.sqlite_store import make_store


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """MLflow takes seconds to make a SQLite file; the tests copy one."""
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    make_store(file)
    return file
