"""The machine that a plan is for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Devices in nodes of equal size. Rates are of one direction; the defaults are an H100's (data sheets)."""

    devices: int
    """Ranks, one a device, N."""
    gpus_per_node: int = 8
    """Devices of one node, n; a cluster with fewer devices is one node."""
    link_gbps: float = 400.0
    """Gbit/s between a node and the others, all its network cards together."""
    nvlink_gbps: float = 3600.0
    """Gbit/s of one device within its node (NVLink 4: 450 GB/s)."""
    link_latency_us: float = 10.0
    """Microseconds of one message between nodes: alpha."""
    nvlink_latency_us: float = 3.0
    """Microseconds of one message within a node."""
    gpu_memory_gb: float = 80.0
    """GB (1e9 bytes) of one device."""
    peak_tflops: float = 989.0
    """Dense peak of one device (H100, bf16)."""
    mfu: float = 0.4
    """Share of the peak that the computation alone reaches, 0..1: without communication."""
    mtbf_hours: float = 50_000.0
    """Mean hours between two failures of one device, with its share of host and network. Llama 3's report: 419 unexpected
    interruptions of 16,384 GPUs in 54 days, one in 50,700 device hours (arXiv 2407.21783)."""
    restart_minutes: float = 10.0
    """From a failure until training computes again: noticing it, a new node, starting; without reading the checkpoint."""
    repair_hours: float = 24.0
    """Until a failed node can be used again."""
    storage_gb_per_s: float = 10.0
    """GB/s of the shared file system, all ranks together, for writing and for reading."""
    disk_gb_per_s: float = 2.0
    """GB/s of one node's own disk (train.staging)."""
    price_per_gpu_hour: float | None = None
    """Of one device; None: no cost is shown."""
    backend: Literal["nccl", "gloo"] = "nccl"
    """gloo (CPU ranks) hides nothing behind computation, and reduces and scatters by an all-reduce."""

    def of(self, devices: int) -> Cluster:
        """The same machine with another number of devices."""
        return replace(self, devices=devices)

    def with_memory(self, gigabytes: float) -> Cluster:
        """The same machine with other devices."""
        return replace(self, gpu_memory_gb=gigabytes)

    @property
    def per_node(self) -> int:
        """Devices on each node, n."""
        return min(self.gpus_per_node, self.devices)

    @property
    def nodes(self) -> int:
        """Nodes, m: the last one may not be full."""
        return -(-self.devices // self.per_node)

    @property
    def job_mtbf_s(self) -> float:
        """Seconds between two failures of any device: they are independent, so their rates add."""
        return self.mtbf_hours * 3600 / self.devices
