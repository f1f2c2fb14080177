"""launch/backends/kubernetes.py: what is checked before kubectl gets a job, and what is in the manifests."""

import json
import os
from pathlib import Path
from typing import get_args, get_origin

import pytest
import yaml
from pydantic import ValidationError

from launch.backends import kubernetes
from launch.cli import main
from pipeline.config.load import load_config
from pipeline.errors import UserError

SIZES = ("--nodes", "1", "--ranks-per-node", "1", "--gpus-per-node", "0")


@pytest.fixture
def run(tmp_path, make_run, monkeypatch):
    """A YAML whose run directory holds folders named as checkpoints."""
    config = make_run(tmp_path)
    (tmp_path / "run" / "checkpoints" / "step-000100").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return str(config)


@pytest.mark.parametrize("given", ["tiny/checkpoints/step-000100", "/runs/tiny/checkpoints/step-000100"])
def test_kubernetes_would_go_back_at_every_start(run, capsys, given):
    words = ["--image", "i", "--volume", "claim:/runs", "run_dir=/runs/tiny", "--resume", given, "--dry-run"]
    assert main(["launch", "kubernetes", run, *SIZES, *words]) == 2
    assert "would go back to it at every start" in capsys.readouterr().err


def test_another_runs_checkpoint_does_not_go_back(run, capsys):
    words = ["--image", "i", "--volume", "claim:/runs", "run_dir=/runs/tiny", "--dry-run"]
    given = "/runs/other/checkpoints/step-000100"
    assert main(["launch", "kubernetes", run, *SIZES, *words, "--resume", given]) == 0
    assert Path(given).name in capsys.readouterr().out


@pytest.mark.parametrize("verdict", ["created", "unchanged", "configured"])
def test_a_trainjob_that_already_exists_does_not_count_as_started(tmp_path, monkeypatch, verdict):
    kinds = (f"configmap/pldr-a created\ntrainjob.trainer.kubeflow.org/pldr-a {verdict}\n").splitlines()
    (tmp_path / "kubectl").write_text("#!/bin/sh\n" + "".join(f"echo {line}\n" for line in kinds))
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    if verdict == "created":
        assert "trainjob" in kubernetes.submit(Path("pldr-a.yaml"))
        return
    with pytest.raises(UserError, match="nothing was started .*: kubectl delete -f pldr-a.yaml, then launch again"):
        kubernetes.submit(Path("pldr-a.yaml"))


def test_the_trainjob_brings_its_configuration(capsys, monkeypatch, tmp_path, make_run):
    config = make_run(tmp_path)
    (tmp_path / "own.json").write_text('{\n "zero_optimization": {}\n}\n')
    monkeypatch.chdir(tmp_path)
    overrides = ("run_dir=/runs/tiny", "train.steps=70", "train.deepspeed=own.json")
    sizes = ("--nodes", "2", "--ranks-per-node", "1", "--image", "reg/pldr:1", "--volume", "claim:/runs")
    words = (*overrides, *sizes, "--secret", "s3", "--resume", "abc", "--dry-run", "--json")
    assert main(["launch", "kubernetes", str(config), *words]) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    (text,) = result["files"].values()
    configmap, runtime, job = yaml.safe_load_all(text)
    for name, content in configmap["data"].items():
        (tmp_path / "pod").mkdir(exist_ok=True)
        (tmp_path / "pod" / name).write_text(content)
    there, here = load_config(tmp_path / "pod" / "run.yaml"), load_config(config, list(overrides))
    assert there == here and there.train.deepspeed == {"zero_optimization": {}}
    assert job["spec"]["runtimeRef"] == {"kind": "TrainingRuntime", "name": runtime["metadata"]["name"]}
    jobs = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    (container,) = jobs[0]["template"]["spec"]["template"]["spec"]["containers"]
    assert "--resume abc" in container["args"][0] and "--stopped-code 75" in container["args"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_kubernetes_refuses_a_run_directory_outside_the_volume(capsys, tmp_path, make_run):
    sizes = ("--nodes", "2", "--ranks-per-node", "1", "--image", "i", "--volume", "claim:/runs")
    assert main(["launch", "kubernetes", str(make_run(tmp_path)), *sizes, "--dry-run"]) == 2
    assert "set run_dir=/runs/tiny" in capsys.readouterr().err


def unknown_keys(kind: type, value: object, where: str) -> list[str]:
    """Keys of a manifest that the model of its kind does not have: the models ignore them, a cluster drops them."""
    if isinstance(value, list):
        return [key for i, item in enumerate(value) for key in unknown_keys(kind, item, f"{where}[{i}]")]
    if not isinstance(value, dict) or not hasattr(kind, "model_fields"):
        return []
    fields = {field.alias or name: field.annotation for name, field in kind.model_fields.items()}
    found = []
    for key, inner in value.items():
        if key not in fields:
            found.append(f"{where}.{key}")
        else:
            models = [one for one in _parts(fields[key]) if hasattr(one, "model_fields")]
            found += [bad for model in models for bad in unknown_keys(model, inner, f"{where}.{key}")]
    return found


def wrong_values(kind: type, manifest: object) -> list[dict]:
    """What the model of a manifest's kind refuses: types, what is missing. A quantity, as 64Gi, is a class without fields."""
    try:
        kind.model_validate(manifest)
    except ValidationError as error:
        return [one for one in error.errors() if not one.get("ctx", {}).get("class_name", "").endswith("Quantity")]
    return []


def _parts(annotation: object) -> list[type]:
    """The classes in an annotation such as Optional[list[Container]]; not the values of a mapping."""
    if get_origin(annotation) is dict:
        return []
    inner = get_args(annotation)
    return [part for one in inner for part in _parts(one)] if inner else [annotation]


@pytest.fixture
def model_of():
    """The model of a manifest, by its kind: what Kubeflow generates from the definitions of its CRDs."""
    pytest.importorskip("kubeflow_trainer_api", reason="pip install kubeflow-trainer-api (the extra dev)")
    from kubeflow_trainer_api import models

    return {
        "ConfigMap": models.IoK8sApiCoreV1ConfigMap,
        "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
        "TrainJob": models.TrainerV1alpha1TrainJob,
    }.__getitem__


@pytest.mark.parametrize("options", [(), ("--gpus-per-node", "8", "--secret", "s3")], ids=["CPUs", "GPUs and a secret"])
def test_the_manifests_are_what_the_crds_take(model_of, capsys, tmp_path, monkeypatch, make_run, options):
    monkeypatch.chdir(tmp_path)
    sizes = ("--nodes", "2", "--ranks-per-node", "1", "--image", "reg/pldr:1", "--volume", "claim:/runs", *options)
    config = str(make_run(tmp_path))
    assert main(["launch", "kubernetes", config, "run_dir=/runs/tiny", *sizes, "--dry-run", "--json"]) == 0
    (text,) = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["files"].values()
    manifests = list(yaml.safe_load_all(text))
    assert [one["kind"] for one in manifests] == ["ConfigMap", "TrainingRuntime", "TrainJob"]
    for manifest in manifests:
        model = model_of(manifest["kind"])
        assert wrong_values(model, manifest) == []
        assert unknown_keys(model, manifest, manifest["kind"]) == []


def test_what_the_crds_do_not_take_is_found(model_of):
    pod = {"spec": {"containers": [{"name": "n", "img": "x", "resources": {"limits": {"memory": "1Gi"}}}]}}
    jobs = [{"name": "node", "template": {"spec": {"template": pod, "backoffLimit": "0"}}}]
    spec = {"mlPolicy": {"numNodes": 2, "nodes": 2}, "template": {"spec": {"replicatedJobs": jobs}}}
    job = ".spec.template.spec.replicatedJobs[0].template.spec"
    keys = unknown_keys(model_of("TrainingRuntime"), {"spec": spec}, "")
    assert keys == [".spec.mlPolicy.nodes", f"{job}.template.spec.containers[0].img"]
    (wrong,) = wrong_values(model_of("TrainingRuntime"), {"spec": spec})
    assert wrong["loc"][-1] == "backoffLimit"
