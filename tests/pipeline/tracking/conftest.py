"""Empty MLflow stores to copy."""

import pytest

from pipeline.tracking.sqlite_store import make_store


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """The store of one run. MLflow takes seconds to make a SQLite file; the tests copy one."""
    file = tmp_path_factory.mktemp("run") / "mlflow.db"
    (file.parent / "run.json").write_text("")
    make_store(file)
    return file


@pytest.fixture(scope="session")
def empty_shared_store(tmp_path_factory):
    """The store of several runs."""
    file = tmp_path_factory.mktemp("runs") / "mlflow.db"
    make_store(file)
    return file
