"""`pldr launch kubernetes`: a training job for Kubeflow Trainer v2, and its submission with kubectl.

Decision: Trainer v2's TrainJob and not v1's PyTorchJob, which is no longer developed. Patching a cluster's shared runtime has
been renamed from release to release (podTemplateOverrides, runtimePatches), so the job brings a TrainingRuntime of its own.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import yaml

from launch.backends.template import fill_in
from pipeline.config.run import RunConfig
from pipeline.errors import ConfigError, UserError

NAME = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"


def render(
    config: RunConfig,
    *,
    image: str,
    volume: str,
    namespace: str,
    secret: str | None,
    nodes: int,
    ranks_per_node: int,
    gpus_per_node: int,
    cpus_per_rank: int,
    memory: str,
    max_restarts: int,
    grace_s: int,
    arguments: Sequence[str],
    template: str | None = None,
) -> tuple[str, str]:
    """(the job's name, its manifests). volume: CLAIM:/mount/path; run_dir lies in it. Raises ConfigError."""
    claim, _, mount = volume.partition(":")
    if not re.fullmatch(NAME, claim) or not mount.startswith("/"):
        raise ConfigError(f"--volume {volume}: write CLAIM:/PATH, a persistent volume claim and where it is mounted")
    if not PurePosixPath(config.run_dir).is_relative_to(mount):
        raise ConfigError(
            f"run_dir {config.run_dir}: is not in the volume, so that a pod's checkpoints would go with it; "
            f"set run_dir={mount.rstrip('/')}/{config.name}"
        )
    for option, value in {"--namespace": namespace, "--secret": secret}.items():
        if value is not None and not re.fullmatch(NAME, value):
            raise ConfigError(f"{option} {value}: is no name in Kubernetes (lower case letters, digits, -)")
    job_name = "pldr-" + re.sub(r"[^a-z0-9]+", "-", config.name.lower()).strip("-")[:40].strip("-")
    text = fill_in(
        "trainjob.yaml",
        {
            "name": config.name,
            "job_name": job_name,
            "namespace": namespace,
            "image": image,
            "claim": claim,
            "mount": mount,
            "secret": secret,
            "nodes": nodes,
            "ranks_per_node": ranks_per_node,
            "gpus_per_node": gpus_per_node,
            "cpus_per_node": cpus_per_rank * ranks_per_node,
            "memory": memory,
            "max_restarts": max_restarts,
            "grace_s": grace_s,
            "arguments": shlex.join(arguments),
            "files": _files(config),
        },
        own=template,
    )
    check(text)
    return job_name, text


def _files(config: RunConfig) -> dict[str, str]:
    """What the pods find in /etc/pldr: the whole configuration, overrides included, and DeepSpeed's JSON."""
    tree, files = config.as_dict(), {}
    if config.train.deepspeed is not None:
        try:
            files["deepspeed.json"] = Path(config.train.deepspeed).read_text(encoding="utf-8").rstrip("\n")
        except OSError as error:
            raise ConfigError(f"train.deepspeed: {config.train.deepspeed}: {error.strerror}") from None
        tree["train"]["deepspeed"] = "deepspeed.json"
    return {"run.yaml": yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).rstrip("\n"), **files}


def check(manifests: str) -> None:
    """Raises ConfigError when it is no YAML of the three objects."""
    try:
        kinds = [document["kind"] for document in yaml.safe_load_all(manifests)]
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise ConfigError(f"the manifests are no Kubernetes YAML ({' '.join(str(error).split())[:200]})") from None
    if "TrainJob" not in kinds:
        raise ConfigError(f"the manifests hold {', '.join(kinds)} and no TrainJob; mend the template")


def submit(file: Path) -> str:
    """Hand the manifests to kubectl; what it says. Raises UserError, also when a TrainJob of that name is there already."""
    if shutil.which("kubectl") is None:
        raise UserError(f"kubectl is not installed here; where it is: kubectl apply -f {file}")
    asked = subprocess.run(["kubectl", "apply", "-f", str(file)], capture_output=True, text=True, errors="replace")
    if asked.returncode:
        raise UserError(
            f"kubectl refused {file} ({' '.join(asked.stderr.split())[:300]}); mend the options or the cluster"
        )
    said = " ".join(asked.stdout.split())
    if not re.search(r"\btrainjob\S* created", said):  # unchanged or configured
        raise UserError(
            f"{file}: a TrainJob of that name is there already, and nothing was started ({said[:300]}); when it has ended: "
            f"kubectl delete -f {file}, then launch again"
        )
    return asked.stdout.strip()
