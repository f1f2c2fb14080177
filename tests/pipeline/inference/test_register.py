"""A bundle in MLflow: registered with its lineage, loaded by alias, used to generate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.errors import UserError
from pipeline.inference.register import register
from pipeline.inference.runtime import Bundle

Make = Callable[..., Path]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SimpleNamespace]:
    """An SQLite store with local artifacts and a training run in it that is still running."""
    import mlflow

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = mlflow.MlflowClient(uri, uri)
    experiment = client.create_experiment("x", artifact_location=str(tmp_path / "artifacts"))
    run_id = client.create_run(experiment).info.run_id
    yield SimpleNamespace(uri=uri, client=client, run_id=run_id)
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # which also unsets the variable


def test_a_registered_bundle_is_loaded_by_alias_and_generates(
    store: SimpleNamespace, make_bundle: Make, tiny: SimpleNamespace, text: torch.Tensor
) -> None:
    import mlflow

    good = make_bundle("good")
    where = {"tracking_uri": store.uri, "run_id": store.run_id, "name": "pldr"}
    first = register(good, **where, certified=True)
    assert first == {"version": "1", "uri": "models:/pldr/1", "alias": "certified"}
    assert register(good, **where, certified=True) == first  # again: the same version
    with pytest.raises(UserError, match="cannot be registered as certified"):
        register(make_bundle("bad", uncertified=True), **where, certified=True)
    variant = tiny.make_model(gain=1.0, seed=5)
    bad = make_bundle("bad", model=variant, certificate=tiny.certify(variant, text), uncertified=True)
    second = register(bad, **where, certified=False)
    assert second == {"version": "2", "uri": "models:/pldr/2", "alias": None}
    version = store.client.get_model_version_by_alias("pldr", "certified")
    assert version.version in ("1", 1) and version.run_id == store.run_id
    assert version.tags["data_fingerprint"] == "f00d" and version.tags["verdict"] == "certified"
    assert version.tags["checkpoint"] == "step-000007" and version.tags["certified"] == "true"
    assert store.client.get_model_version("pldr", "2").tags["certified"] == "false"
    assert store.client.get_run(store.run_id).info.status == "RUNNING"  # the run is not ours to end
    names = {Path(p).suffix for p in Path(store.client.get_run(store.run_id).info.artifact_uri).rglob("*")}
    assert not names & {".pkl", ".pickle", ".pt", ".pth"}

    mlflow.set_tracking_uri(store.uri)
    model = mlflow.pyfunc.load_model("models:/pldr@certified")
    bundle = Bundle.load(good)
    texts = ["the quick", "a"]
    expected = bundle.generate(texts, max_new_tokens=6)
    params = {"max_new_tokens": 6}
    served = [{"prompt": np.array(text)} for text in texts]  # how MLflow's server hands over {"inputs": [{...}]}
    for asked in (texts, [{"prompt": t} for t in texts], pd.DataFrame({"prompt": texts}), np.array(texts), served):
        assert model.predict(asked, params=params) == expected
    sampled = {"max_new_tokens": 9, "temperature": 1.0, "top_p": 0.9, "top_k": 20, "seed": 7, "stop": ["e"]}
    assert model.predict(texts, params=sampled) == bundle.generate(texts, **sampled)
    assert model.predict(texts, params={**sampled, "seed": 8}) != model.predict(texts, params=sampled)
    with pytest.warns(UserWarning, match="UNCERTIFIED"):
        other = mlflow.pyfunc.load_model("models:/pldr/2")
    assert other.predict(texts, params=params) != expected
    for nonsense in ([], [3], pd.DataFrame({"a": ["x"], "b": ["y"]})):
        with pytest.raises(UserError, match="input: "):
            model.predict(nonsense, params=params)


def test_a_run_or_server_that_is_not_there_is_one_line(store: SimpleNamespace, make_bundle: Make) -> None:
    with pytest.raises(UserError, match=r"MLflow at sqlite.*not found") as caught:
        register(make_bundle(), tracking_uri=store.uri, run_id="0" * 32, name="pldr", certified=True)
    assert "\n" not in str(caught.value)
    assert store.client.search_model_versions("name = 'pldr'") == []


def test_a_damaged_bundle_is_not_registered(store: SimpleNamespace, make_bundle: Make) -> None:
    bundle = make_bundle()
    torch.save({}, bundle / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        register(bundle, tracking_uri=store.uri, run_id=store.run_id, name="pldr", certified=True)


def test_one_bundle_registered_by_several_at_once_is_one_version(
    store: SimpleNamespace, make_bundle: Make, at_once: Callable[..., list[dict[str, str]]]
) -> None:
    good = make_bundle("good")
    where = {"tracking_uri": store.uri, "run_id": store.run_id, "name": "pldr", "certified": True}
    found = at_once(lambda turn, number: register(good, **where), processes=3)
    assert [one["version"] for one in found] == ["1"] * 3
    assert [str(one.version) for one in store.client.search_model_versions("name = 'pldr'")] == ["1"]
    assert str(store.client.get_model_version_by_alias("pldr", "certified").version) == "1"
