"""DeepSpeed's launcher: on one node, over ssh on all hosts of a hostfile, or one launcher on each node."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.backends.dry_run import dry_run
from launch.backends.environment import rank_environment
from launch.backends.hosts import (
    SSH_ARGS,
    Host,
    carried,
    environment_file,
    is_private,
    kill_leftovers,
    private_file,
    ssh_options,
)
from launch.backends.job import WORKER, Report, run_job, stopped_exit_code
from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.devices import has_gpu
from pipeline.environment import ENVIRONMENT_FILE, search_path, without_other_jobs
from pipeline.errors import Stopped, UserError
from pipeline.io import storage
from pipeline.network import free_port
from pipeline.stages.runner import Pipeline, exclusive
from pipeline.train import signals
from pipeline.train.signals import PARENT_PIPE

PORT_TAKEN = "EADDRINUSE"
RUNNER = [sys.executable, "-m", "deepspeed.launcher.runner"]
LAUNCHER = [sys.executable, "-u", "-m", "deepspeed.launcher.launch"]  # what the runner starts on each node


def launch(config: RunConfig, job_file: Path, ranks: int, *, report: Report) -> None:
    """Run the job on this node until it ends. `report` gets each status line; all output is kept in `logs/train.log`.

    Raises Stopped and UserError as `run_job` does.
    """
    # A shell may name an interface for other hosts.
    environment = rank_environment(ranks) | {"GLOO_SOCKET_IFNAME": "lo"}
    log_file = RunPaths(config.run_dir).logs / "train.log"

    def run() -> None:
        run_job(command(job_file, ranks), environment=environment, ranks=ranks, log_file=log_file, report=report)

    try:
        run()
    except UserError as error:
        if PORT_TAKEN not in str(error):
            raise
        report("another process took the ranks' port before they did; once more, with another port")
        run()


def command(job_file: Path, ranks: int) -> list[str]:
    """The launcher's command line for one node, run with this Python.

    Without the runner (`deepspeed`), which on one node only starts this: it would hold 260 MB, import torch for seconds, and
    take the job for one over ssh where a cloud has put a /job/hostfile. The launcher sets CUDA_VISIBLE_DEVICES to the devices
    that it is told, so the chosen ones are named.
    """
    chosen = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    devices: list[int | str] = list(range(ranks))
    if has_gpu() and chosen:  # numbers, or GPU-… and MIG-… names
        devices = [int(name) if name.isdigit() else name for name in chosen[:ranks]]
    world = base64.urlsafe_b64encode(json.dumps({"localhost": devices}).encode()).decode()
    where = [f"--world_info={world}", *_rendezvous("127.0.0.1", free_port())]
    return [*LAUNCHER, *where, "--module", "--log_level=info", WORKER, str(job_file)]


def ssh_command(job_file: Path, *, hostfile: str, address: str, port: int, ssh_port: int | None) -> list[str]:
    """The launcher's command line for all hosts of a hostfile, over pdsh and ssh.

    DeepSpeed's own check of the first host ignores the ssh options that pdsh gets, and its log shows every exported variable.
    """
    options = [
        "--hostfile",
        hostfile,
        "--force_multi",
        "--launcher",
        "pdsh",
        "--no_ssh_check",
        "--log_level",
        "warning",
    ]
    if ssh_port is not None:
        options += ["--ssh_port", str(ssh_port)]
    return [*RUNNER, *options, *_rendezvous(address, port), "--module", WORKER, str(job_file)]


def node_command(job_file: Path, *, hostfile: str, node_rank: int, address: str, port: int) -> list[str]:
    """The launcher's command line for one node of a hostfile; every node runs its own."""
    options = ["--hostfile", hostfile, "--no_ssh", "--node_rank", str(node_rank)]
    return [*RUNNER, *options, *_rendezvous(address, port), "--module", WORKER, str(job_file)]


def _rendezvous(address: str, port: int) -> list[str]:
    return ["--master_addr", address, "--master_port", str(port)]


@dataclass(frozen=True)
class SshJob:
    """Where a job over ssh runs, and how its hosts are reached."""

    hostfile: str
    hosts: list[Host]
    address: str  # rank 0's
    port: int
    ssh_port: int | None
    env: Sequence[str]  # further variables for the ranks, NAME or NAME=VALUE

    @property
    def ranks(self) -> int:
        """How many train, on all hosts."""
        return sum(host.slots for host in self.hosts)

    def files(self, logs: Path) -> dict[Path, dict[str, str]]:
        """The environment files of the job -> their variables: DeepSpeed's, then the private one (empty: not written)."""
        variables = carried(self.env)
        private = {k: v for k, v in variables.items() if is_private(k, v)}
        public = {k: v for k, v in variables.items() if k not in private}
        public |= {
            signals.HEAD_FILE: str(logs / "head.json"),
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **search_path(),  # in place of DeepSpeed's, which begins with the working directory
        }
        private_path = logs / "environment.json"
        if private:
            public[ENVIRONMENT_FILE] = str(private_path)
        return {logs / "deepspeed_env": public, private_path: private}

    def environment(self, logs: Path) -> dict[str, str]:
        """What DeepSpeed's launcher itself gets."""
        _, private = self.files(logs).values()  # otherwise it exports MLFLOW_TRACKING_PASSWORD itself
        kept = {k: v for k, v in without_other_jobs(os.environ).items() if k != PARENT_PIPE and k not in private}
        return {**kept, "DS_ENV_FILE": str(logs / "deepspeed_env"), SSH_ARGS: ssh_options()}

    def command(self, job_file: Path) -> list[str]:
        """The launcher's command line."""
        return ssh_command(
            job_file, hostfile=self.hostfile, address=self.address, port=self.port, ssh_port=self.ssh_port
        )

    def dry_run(self, logs: Path, report: Report) -> dict[str, Any]:
        """Report what would be written and started; of private variables the names only."""
        (public_path, public), (private_path, private) = self.files(logs).items()
        files = {public_path: environment_file(public)}
        if private:
            files[private_path] = "".join(f"{name}=…\n" for name in sorted(private))
        job_file = logs / "job.json"
        environment = self.environment(logs)
        return dry_run(files, [self.command(job_file)], environment, report=report, job_file=job_file)


def train_over_ssh(
    config: RunConfig,
    job: SshJob,
    *,
    resume: str,
    force: bool,
    stopped_code: int,
    report: Report,
    live: Report,
) -> dict[str, Any]:
    """The stage `train` on all hosts of a job. `live` gets each status line. Raises UserError; Stopped with stopped_code."""

    def start(config: RunConfig, job_file: Path, ranks: int) -> None:
        launch_over_ssh(config, job_file, ranks, job, report=live)

    pipeline = Pipeline(config, launch=start, report=report, ranks=job.ranks)
    with stopped_exit_code(stopped_code), exclusive(pipeline.paths, report):
        return pipeline.stage("train", resume=resume, force=force)


def launch_over_ssh(config: RunConfig, job_file: Path, ranks: int, job: SshJob, *, report: Report) -> None:
    """Run the job on all hosts until it ends, as `launch` does on one. After a failure its processes there are killed."""
    logs = RunPaths(config.run_dir).logs
    (env_path, public), (private_path, private) = job.files(logs).items()
    storage.publish_bytes(env_path, environment_file(public).encode())
    try:
        if private:
            private_file(private, private_path)
        with signals.Head(logs / "head.json") as head:
            run_job(
                job.command(job_file),
                environment=job.environment(logs),
                ranks=ranks,
                log_file=logs / "train.log",
                report=report,
                head=head,
            )
    except Stopped:
        raise
    except BaseException:
        for host in kill_leftovers(job.hosts, job_file, ssh_port=job.ssh_port):
            report(
                f"warning: {host} is unreachable; ranks that still run there exit by themselves within train.timeout_s"
            )
        raise
    finally:
        private_path.unlink(missing_ok=True)
