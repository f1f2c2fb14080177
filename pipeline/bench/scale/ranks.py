"""Starts the ranks of a measurement on two hosts, and reads what they found."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.bench.scale.hosts import ADDRESSES, INTERFACE, TwoHosts
from pipeline.environment import without_other_jobs
from pipeline.errors import UserError

CONFIG = """
name: scale
run_dir: {folder}/run
data: {{sources: [{{url: none.txt}}]}}
model: {{vocab_size: {vocabulary}, context_length: {context}, num_layers: {layers}, num_heads: {heads}, head_dim: {head_dim}}}
train: {{steps: 100, warmup_steps: 1, precision: fp32, timeout_s: 600, deepspeed: "zero{{stage}}"}}
"""


@dataclass(frozen=True)
class Sizes:
    """Of the model and the batch: as many gradients as a slow link feels, and little to compute."""

    vocabulary: int = 8192
    context: int = 16
    layers: int = 2
    heads: int = 4
    head_dim: int = 64
    micro_batch: int = 1
    micro_batches: int = 2
    """That a rank runs in a step."""

    def write(self, folder: Path) -> Path:
        """The YAML of a run."""
        file = folder / "scale.yaml"
        names = ("vocabulary", "context", "layers", "heads", "head_dim")
        file.write_text(CONFIG.format(folder=folder, **{name: getattr(self, name) for name in names}))
        return file

    def overrides(self, stage: int, ranks: int) -> list[str]:
        """How many ranks share the batch, at a stage."""
        batch = self.micro_batch * self.micro_batches * ranks
        return [f"train.zero_stage={stage}", f"train.global_batch={batch}", f"train.micro_batch={self.micro_batch}"]


@dataclass(frozen=True)
class Ranks:
    """Where ranks run, and with what."""

    hosts: TwoHosts
    folder: Path
    sizes: Sizes
    steps: int

    def together(self, stage: int, mbit: list[float | None], *, port: int) -> list[dict[str, Any]]:
        """What the two ranks of one training found."""
        return self._run(stage, mbit, world=2, port=port)

    def alone(self, stage: int, *, port: int) -> list[dict[str, Any]]:
        """Two trainings of one rank each at the same time: what a rank computes beside the other, with nothing to send."""
        return self._run(stage, [None], world=1, port=port)

    def _run(self, stage: int, mbit: list[float | None], *, world: int, port: int) -> list[dict[str, Any]]:
        config, out = self.sizes.write(self.folder), self.folder / f"zero{stage}-{world}"
        outs = [out if world == 2 else out.with_name(f"{out.name}-{host}") for host in (0, 1)]
        with contextlib.ExitStack() as stack:
            ranks = []
            for host in (0, 1):
                job = self.folder / f"job{host}.json"
                overrides = self.sizes.overrides(stage, world)
                job.write_text(
                    json.dumps(
                        {
                            "config": str(config),
                            "overrides": overrides,
                            "mbit": mbit,
                            "steps": self.steps,
                            "out": str(outs[host]),
                        }
                    )
                )
                log = stack.enter_context(open(self.folder / f"rank{host}.log", "w+b"))
                environment = {
                    **without_other_jobs(os.environ),
                    "RANK": str(host if world == 2 else 0),
                    "LOCAL_RANK": "0",
                    "WORLD_SIZE": str(world),
                    "MASTER_ADDR": ADDRESSES[0 if world == 2 else host],
                    "MASTER_PORT": str(port),
                    "GLOO_SOCKET_IFNAME": INTERFACE,
                    "DS_ACCELERATOR": "cpu",
                    "CUDA_VISIBLE_DEVICES": "",
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]),
                }
                command = [*self.hosts.enter(host), sys.executable, "-m", "pipeline.bench.scale.worker", str(job)]
                process = subprocess.Popen(
                    command, cwd=self.folder, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log
                )
                stack.callback(_end, process)
                ranks.append((process, log))
            for host, (process, log) in enumerate(ranks):
                if process.wait() != 0:
                    log.seek(0)
                    last = log.read().decode(errors="replace")[-2000:]
                    raise UserError(f"rank {host} at ZeRO stage {stage} ended with {process.returncode}:\n{last}")
        return [json.loads(Path(f"{outs[host]}.{host if world == 2 else 0}").read_text()) for host in (0, 1)]


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a rank: its stdin, a pipe, closes."""
    assert process.stdin is not None
    process.stdin.close()
    process.kill()
    process.wait()
