"""Runs of tests/pipeline/train/recipe_worker.py, which several test files read: one start of the ranks for all."""

import pytest

RECIPE_WORKER = "tests.pipeline.train.recipe_worker"


@pytest.fixture(scope="session")
def recipe_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recipe")


@pytest.fixture(scope="session")
def recipe_runs(start_ranks, recipe_folder):
    return start_ranks(RECIPE_WORKER, recipe_folder, "quick", "fp32")


@pytest.fixture(scope="session")
def more_recipe_runs(start_ranks, recipe_folder):
    return start_ranks(RECIPE_WORKER, recipe_folder, "more", "fp32")


@pytest.fixture(scope="session")
def recipe_runs_on_one_rank(start_ranks, recipe_folder, recipe_runs):
    return start_ranks(RECIPE_WORKER, recipe_folder, "from", "fp32", world=1)
