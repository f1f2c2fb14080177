"""`pldr launch kubernetes`: a training job for Kubeflow Trainer v2, and its submission with kubectl.

Decision: Trainer v2's TrainJob and not v1's PyTorchJob, which is no longer developed. The fields that patch a cluster's shared
runtime were renamed between releases (podTemplateOverrides, runtimePatches), so the job has its own TrainingRuntime.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from launch.backends.dry_run import dry_run
from launch.backends.job import Report
from launch.backends.scheduled import ScheduledJob, fill_in
from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.errors import ConfigError, UserError
from pipeline.io import storage
from pipeline.train.deepspeed_config import accumulation_steps

NAME = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"


GRACE_S = 180  # from SIGTERM to SIGKILL: the ranks save


@dataclass(frozen=True)
class KubernetesOptions:
    """What only Kubernetes has."""

    image: str
    volume: str  # CLAIM:/mount/path; run_dir is in it
    namespace: str = "default"
    secret: str | None = None  # a Secret with environment variables
    memory: str = "64Gi"  # of a node
    max_restarts: int = 10  # of all pods

    @property
    def mount(self) -> str:
        """Where the volume is mounted: the pods' working directory."""
        return self.volume.partition(":")[2]


def launch_kubernetes(
    config: RunConfig, job: ScheduledJob, options: KubernetesOptions, *, dry: bool, report: Report
) -> dict[str, Any]:
    """Apply the manifests. Raises UserError or ConfigError."""
    job.check_resume(RunPaths(config.run_dir), base=Path(options.mount))
    accumulation_steps(config.train, job.ranks)  # raises when they do not divide
    name, manifests = render(config, job, options, job.node_arguments())
    file = Path(f"{name}.yaml")  # run_dir is in the cluster's volume, not here
    if dry:
        return dry_run({file: manifests}, [["kubectl", "apply", "-f", str(file)]], os.environ, report=report)
    storage.publish_bytes(file, manifests.encode())
    report(submit(file))
    report(f"watch       kubectl -n {options.namespace} get trainjob {name} -w")
    pods = f"kubectl -n {options.namespace} describe pods -l jobset.sigs.k8s.io/jobset-name={name}"
    report(f"waits?      {pods}   (Events: no room, no image, no volume)")
    report(f"again       kubectl delete -f {file} && kubectl apply -f {file}   (resumes from the last commit)")
    return {"job": name, "file": str(file)}


def render(
    config: RunConfig, job: ScheduledJob, options: KubernetesOptions, arguments: Sequence[str]
) -> tuple[str, str]:
    """(the job's name, its manifests). arguments: those of `pldr launch torchrun`. Raises ConfigError."""
    claim, mount = options.volume.partition(":")[0], options.mount
    if not re.fullmatch(NAME, claim) or not mount.startswith("/"):
        raise ConfigError(
            f"--volume {options.volume}: write CLAIM:/PATH, a persistent volume claim and where it is mounted"
        )
    if not PurePosixPath(config.run_dir).is_relative_to(mount):
        raise ConfigError(
            f"run_dir {config.run_dir}: is outside the volume, so a pod's checkpoints would be lost with it; "
            f"set run_dir={mount.rstrip('/')}/{config.name}"
        )
    for option, value in {"--namespace": options.namespace, "--secret": options.secret}.items():
        if value is not None and not re.fullmatch(NAME, value):
            raise ConfigError(f"{option} {value}: is not a Kubernetes name (lower case letters, digits, -)")
    job_name = "pldr-" + re.sub(r"[^a-z0-9]+", "-", config.name.lower()).strip("-")[:40].strip("-")
    text = fill_in(
        "trainjob.yaml",
        {
            "name": config.name,
            "job_name": job_name,
            "namespace": options.namespace,
            "image": options.image,
            "claim": claim,
            "mount": mount,
            "secret": options.secret,
            "nodes": job.nodes,
            "ranks_per_node": job.ranks_per_node,
            "gpus_per_node": job.gpus_per_node,
            "cpus_per_node": job.cpus_per_rank * job.ranks_per_node,
            "memory": options.memory,
            "max_restarts": options.max_restarts,
            "grace_s": GRACE_S,
            "arguments": shlex.join(arguments),
            "files": _files(config),
        },
        own=job.template,
    )
    check(text)
    return job_name, text


def _files(config: RunConfig) -> dict[str, str]:
    """What the pods find in /etc/pldr: the whole configuration, overrides and DeepSpeed's keys included."""
    return {"run.yaml": yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True).rstrip("\n")}


def check(manifests: str) -> None:
    """Raises ConfigError when it is not the YAML of a TrainJob and what it needs."""
    try:
        kinds = [document["kind"] for document in yaml.safe_load_all(manifests)]
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise ConfigError(f"the manifests are not Kubernetes YAML ({' '.join(str(error).split())[:200]})") from None
    if "TrainJob" not in kinds:
        raise ConfigError(f"the manifests hold {', '.join(kinds)} and no TrainJob; fix the template")


def submit(file: Path) -> str:
    """Apply the manifests; returns kubectl's output. Raises UserError, also when a TrainJob of that name already exists."""
    if shutil.which("kubectl") is None:
        raise UserError(f"kubectl is not installed here; on a machine that has it: kubectl apply -f {file}")
    done = subprocess.run(["kubectl", "apply", "-f", str(file)], capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise UserError(
            f"kubectl refused {file} ({' '.join(done.stderr.split())[:300]}); fix the options or the cluster"
        )
    output = " ".join(done.stdout.split())
    if not re.search(r"\btrainjob\S* created", output):  # unchanged or configured
        raise UserError(
            f"{file}: a TrainJob of that name already exists, and nothing was started ({output[:300]}); when it has ended: "
            f"kubectl delete -f {file}, then launch again"
        )
    return done.stdout.strip()
