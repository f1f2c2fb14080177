"""A bundle in MLflow: registered with its lineage, loaded by alias, used to generate."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND

from pipeline.errors import UserError
from pipeline.inference.register import register, save_pyfunc
from pipeline.inference.runtime import Bundle

Make = Callable[..., Path]


@pytest.fixture
def store(tmp_path: Path, empty_mlflow: Path) -> Iterator[SimpleNamespace]:
    """An SQLite store with local artifacts and a training run in it that is still running."""
    import mlflow

    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
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
    sampled = {"max_new_tokens": 9, "temperature": 1.0, "top_p": 0.9, "top_k": 20, "seed": 7, "stop": ["e"]} | {
        "min_p": 0.01,
        "repetition_penalty": 1.1,
    }
    assert model.predict(texts, params=sampled) == bundle.generate(texts, **sampled)
    assert model.predict(texts, params={**sampled, "seed": 8}) != model.predict(texts, params=sampled)
    with pytest.warns(UserWarning, match="UNCERTIFIED"):
        other = mlflow.pyfunc.load_model("models:/pldr/2")
    assert other.predict(texts, params=params) != expected


def logged_models(store: SimpleNamespace) -> list:
    return store.client.search_logged_models([store.client.get_run(store.run_id).info.experiment_id])


def test_a_bundle_is_a_logged_model_with_its_run_numbers_and_data(store: SimpleNamespace, make_bundle: Make) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

    inputs = [
        DatasetInput(Dataset(f"x {use}", "f00d", "local", "{}"), [InputTag("mlflow.data.context", use)])
        for use in ("training", "validation")
    ]
    store.client.log_inputs(store.run_id, inputs)
    points = [
        Metric("val/loss_cached", 2.0, 11, 6),
        Metric("val/loss_cached", 1.5, 12, 7),
        Metric("train/old", 1, 9, 5),
    ]
    points += [Metric("train/loss", 1.25, 12, 7), Metric("system/rss_gb", 1, 12, 7)]
    store.client.log_batch(store.run_id, metrics=points, params=[Param("train.steps", "7")])
    bundle = make_bundle()
    where = {"tracking_uri": store.uri, "run_id": store.run_id, "name": "team.pldr"}
    for _ in range(2):
        register(bundle, **where, certified=True)
    (model,) = logged_models(store)
    assert model.name == "team-pldr" and model.status == "READY" and model.source_run_id == store.run_id
    assert model.params == {"train.steps": "7", "weight_format": "fp32"}
    assert model.tags["verdict"] == "certified" and model.tags["tier"] and model.tags["data_fingerprint"] == "f00d"
    measured = {(metric.key, metric.value, metric.dataset_name) for metric in model.metrics}
    assert {("val/loss_cached", 1.5, "x validation"), ("train/loss", 1.25, "x training")} < measured
    assert {key for key, _, _ in measured} >= {"certificate/relative_deviation_g", "certificate/loss_cached"}
    assert not {"train/old", "system/rss_gb"} & {key for key, _, _ in measured}
    version = store.client.get_model_version_by_alias("team.pldr", "certified")
    assert (version.tags["logged_model"], version.source) == (model.model_id, model.artifact_location)
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "team.pldr", "version": 1}]
    run = store.client.get_run(store.run_id)
    assert [one.model_id for one in run.outputs.model_outputs] == [model.model_id]
    history = store.client.get_metric_history(store.run_id, "val/loss_cached")
    assert sorted((point.step, point.value) for point in history) == [(6, 2.0), (7, 1.5)], (
        "no point of the run is doubled"
    )


def test_an_interrupted_registration_is_completed_with_the_same_logged_model(
    store: SimpleNamespace, make_bundle: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    bundle, where = make_bundle(), {"tracking_uri": store.uri, "run_id": store.run_id, "name": "pldr"}
    with monkeypatch.context() as patch, pytest.raises(UserError, match="gone"):
        patch.setattr(mlflow.MlflowClient, "create_model_version", lambda *_, **__: _gone())
        register(bundle, **where, certified=True)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="gone"):
        patch.setattr(mlflow.MlflowClient, "log_model_artifacts", lambda *_, **__: _gone())
        register(make_bundle("other", notes=["other"]), **where, certified=False)
    (ready,) = [model for model in logged_models(store) if model.status == "READY"]
    register(bundle, **where, certified=True)
    version = store.client.get_model_version_by_alias("pldr", "certified")
    assert version.tags["logged_model"] == ready.model_id and len(logged_models(store)) == 2


@pytest.mark.slow
def test_a_server_takes_the_bundle_and_gives_it_back(server: Any, make_bundle: Make) -> None:
    """A server checks that a version's files are those of its run or logged model."""
    import mlflow

    server.start()
    client, before = mlflow.MlflowClient(server.uri, server.uri), mlflow.get_tracking_uri()
    run_id = client.create_run(client.create_experiment("x")).info.run_id
    register(make_bundle(), tracking_uri=server.uri, run_id=run_id, name="pldr", certified=True)
    (model,) = client.search_logged_models([client.get_run(run_id).info.experiment_id])
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "pldr", "version": 1}]
    mlflow.set_tracking_uri(server.uri)
    try:
        assert mlflow.pyfunc.load_model("models:/pldr@certified").predict(["a"], params={"max_tokens": 3})
    finally:
        mlflow.set_tracking_uri(before)


def _gone() -> None:
    raise OSError("gone")


def test_a_server_without_logged_models_gets_the_bundle_among_the_runs_artifacts(
    store: SimpleNamespace, make_bundle: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    from mlflow.exceptions import MlflowException

    def older(*_: object, **__: object) -> None:
        raise MlflowException("no such endpoint", error_code=ENDPOINT_NOT_FOUND)

    monkeypatch.setattr(mlflow.MlflowClient, "search_logged_models", older)
    register(make_bundle(), tracking_uri=store.uri, run_id=store.run_id, name="pldr", certified=True)
    version = store.client.get_model_version_by_alias("pldr", "certified")
    assert version.source.startswith(store.client.get_run(store.run_id).info.artifact_uri)
    mlflow.set_tracking_uri(store.uri)
    assert mlflow.pyfunc.load_model("models:/pldr@certified").predict(["a"], params={"max_tokens": 3})
    monkeypatch.undo()
    assert register(
        Path(version.source.removeprefix("file://")) / "artifacts" / "bundle",
        tracking_uri=store.uri, run_id=store.run_id, name="pldr", certified=True,
    )["version"] == "1", "a version of before logged models is found again"  # fmt: skip


@pytest.fixture
def served(tmp_path: Path, make_bundle: Make) -> Any:
    """The model as MLflow loads it."""
    import mlflow

    save_pyfunc(make_bundle(), tmp_path / "model")
    return mlflow.pyfunc.load_model(str(tmp_path / "model"))


def test_a_request_that_cannot_be_answered_is_refused_as_mlflow_refuses(served: Any) -> None:
    from mlflow.exceptions import MlflowException

    wrong: list[tuple[Any, dict[str, Any], str]] = [
        ([], {}, "input: no texts"),
        ([3], {}, "input: no texts"),
        (pd.DataFrame({"a": ["x"], "b": ["y"]}), {}, "input: no column 'prompt' among a, b"),
        (
            [{"prompt": "a", "max_tokens": 3}],
            {},
            "input: there is no max_tokens beside 'prompt'; settings go into `params`",
        ),
        ({"prompt": "a", "best_of": 3}, {}, "input: there is no best_of beside 'prompt'"),
        (["a"], {"best_of": 3}, "params: there is no best_of; there are max_new_tokens, max_tokens, temperature"),
        (["a"], {"max_tokens": 3, "max_new_tokens": 4}, "params: max_tokens 3 and max_new_tokens 4 are two names"),
        (["a"], {"max_tokens": "many"}, "Invalid parameters found: .*max_tokens"),
        (["a"], {"max_new_tokens": 2.5}, "Invalid parameters found: .*max_new_tokens"),
        (["a"], {"stop": "x"}, "Invalid parameters found: .*stop"),
        (["a"], {"temperature": -1.0}, "temperature: -1.0 must be 0"),
        (["a"], {"temperature": float("nan")}, "temperature: nan must be 0"),
        (["a"], {"temperature": "0.8"}, "Invalid parameters found: .*temperature"),
        (["a"], {"top_p": float("inf")}, "top_p: inf must be in"),
        (["a"], {"min_p": -0.5}, "min_p: -0.5 must be in"),
        (["a"], {"repetition_penalty": 0.0}, "repetition_penalty: 0.0 must be a positive"),
        (["a"], {"seed": 2**70}, "seed: 1180591620717411303424 must have at most 64 bits"),
        (["a"], {"stop": ["x" * 1001]}, r"stop\[0\]: 1001 characters"),
        (["a\ud800"], {}, r"prompts\[0\]: not valid UTF-8"),
        (["the " * (1 << 19)], {}, r"prompts\[0\]: 2097152 bytes or more leave no room"),
        (["a"], {"stop": [""]}, "stop: a list of non-empty strings"),
        (["the quick brown fox " * 9], {}, r"prompts\[0\]: \d+ tokens leave no room"),
    ]
    for asked, params, message in wrong:
        calls = [served.predict]
        if isinstance(asked, list) and len(asked) == 1:
            calls.append(lambda *args, **kwargs: list(served.predict_stream(*args, **kwargs)))
        for call in calls:
            with pytest.raises(MlflowException, match=message) as caught:
                call(asked, params=params)
            assert caught.value.get_http_status_code() == 400 and "\n" not in caught.value.message


def test_max_tokens_is_another_name_and_a_stream_is_the_text_in_pieces(served: Any) -> None:
    from mlflow.exceptions import MlflowException

    expected = served.predict(["the quick"], params={"max_new_tokens": 7})
    for params in (
        {"max_tokens": 7},
        {"max_tokens": 7, "max_new_tokens": 7},
        {"max_tokens": None, "max_new_tokens": 7},
    ):
        assert served.predict(["the quick"], params=params) == expected
        for one in ("the quick", ["the quick"], [{"prompt": "the quick"}], pd.DataFrame({"prompt": ["the quick"]})):
            pieces = list(served.predict_stream(one, params=params))
            assert "".join(pieces) == expected[0] and len(pieces) > 2
    assert len(served.predict(["a"])[0]) > len(served.predict(["a"], params={"max_tokens": 3})[0])
    with pytest.raises(MlflowException, match="single input"):
        list(served.predict_stream(["a", "b"]))


def test_a_prompt_without_logits_is_named_in_one_line(served: Any) -> None:
    from mlflow.exceptions import MlflowException

    bundle = served.unwrap_python_model().bundle
    with torch.no_grad():
        bundle.model.embedding.weight[bundle.tokenizer.encode("jumps")[-1]] = 3e38
    assert len(served.predict(["a", "the quick"], params={"max_tokens": 3})) == 2
    for call in (served.predict, lambda *args, **kwargs: list(served.predict_stream(*args, **kwargs))):
        asked = ["a", "jumps"] if call == served.predict else ["jumps"]
        with pytest.raises(MlflowException, match=r"prompts\[\d\]: .* NaN or infinite .*; leave it out$") as caught:
            call(asked, params={"max_tokens": 3})
        assert caught.value.get_http_status_code() == 400 and "\n" not in caught.value.message


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
    version = store.client.get_model_version_by_alias("pldr", "certified")
    assert str(version.version) == "1"
    assert [model.model_id for model in logged_models(store)] == [version.tags["logged_model"]]
