"""A Slurm cluster of two nodes, made of the two hosts of hosts.py: munged, slurmctld and a slurmd on each host. Needs root.

Everything is its own: folder, munge key and socket, configuration, and (inside the hosts' network namespaces) ports. A Slurm or
munge of this machine is neither used nor disturbed. The controller is on the first host, where `cluster.enter` runs commands.
Each daemon is in a PID namespace and dies with the process that started it: killing it kills everything on its node, as a power
cut does, and nothing survives a test, also not one that was killed.
"""

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.hosts import Network, two_hosts

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "sinfo", "scancel", "srun", "setpriv")
# Before a command: its own PID namespace. The shell is process 1 there, and reaps what the command's processes leave.
ALONE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", "$0 & wait $!"]
CPUS, MEMORY_MB = 4, 16_000  # of each node, whatever this machine has
CONF = """ClusterName=pldr
SlurmctldHost={names[0]}({addresses[0]})
SlurmctldPort=6817
SlurmdPort=6818
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PluginDir={plugins}
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
SlurmdTimeout=300
ReturnToService=2
MinJobAge=300
KillWait=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobcomp.log
{more}
"""
NODES = """NodeName={name} NodeAddr={address} CPUs={cpus} RealMemory={memory} Gres=gpu:a100:2
"""
# A job in `urgent` takes the nodes of those in `main`, which have a minute to save.
COMMON = "Nodes=ALL MaxTime=2:00:00 DefMemPerNode=1000"
# A job in `urgent` takes the nodes of those in `main`, which have a minute to save.
PARTITIONS = f"""PartitionName=main {COMMON} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent {COMMON} PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """`cluster.slurm("squeue")` runs a command of Slurm's; `cluster.enter` are the words before one of ours."""

    def __init__(self, folder: Path, network: Network) -> None:
        self.folder, self.network, self.names = folder, network, network.names
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "SLURM_TIME_FORMAT": "%s"}
        self._daemons: dict[str, subprocess.Popen] = {}

    @property
    def enter(self) -> list[str]:
        return self.network.enter(0)

    def start(self, *, settings: str = "") -> None:
        """settings: more lines of slurm.conf."""
        for name in ("state", *self.names):
            (self.folder / name).mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o400)
        nodes = "".join(
            NODES.format(name=name, address=address, cpus=CPUS, memory=MEMORY_MB)
            for name, address in zip(self.names, self.network.addresses, strict=True)
        )
        plugins = next(Path("/usr/lib").glob("**/auth_munge.so")).parent
        facts = {"names": self.names, "addresses": self.network.addresses, "folder": self.folder, "plugins": plugins}
        text = CONF.format(more=settings, **facts) + nodes + PARTITIONS
        (self.folder / "slurm.conf").write_text(text)
        for number in range(2):  # Slurm counts them; nothing computes on them
            os.mknod(self.folder / f"gpu{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(f"Name=gpu Type=a100 File={self.folder}/gpu[0-1]\n")
        # No cgroups: they are not in a namespace's /sys, and slurmd would look for them there.
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={self.folder}/cgroup\n")
        munge = [f"--{kind}={self.folder}/munge.{kind.removesuffix('-file')}"
                 for kind in ("key-file", "pid-file", "log-file", "seed-file", "socket")]  # fmt: skip
        self._run("munged", ["munged", "--foreground", "--force", "--num-threads=2", *munge])
        self._wait((self.folder / "munge.socket").exists, "munged")
        self._run("slurmctld", [*self.enter, *ALONE, "slurmctld -D"])
        for host in (0, 1):
            self.power_on(host)
        self.wait_until_idle()

    def power_on(self, host: int) -> None:
        """Start a node."""
        name = self.names[host]
        self._run(name, [*self.network.enter(host), *ALONE, f"slurmd -D -N {name}"])

    def power_off(self, host: int) -> None:
        """Kill everything that runs on a node, at once."""
        self._kill(self.names[host])

    def wait_until_idle(self) -> None:
        """Both nodes are there and run nothing."""
        self._wait(lambda: self.node_states() == ["idle", "idle"], "the nodes", 120)

    def node_states(self) -> list[str]:
        return self.slurm("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T").split()

    def slurm(self, *words: str) -> str:
        """What a command prints; nothing when it fails."""
        done = subprocess.run(
            [*self.enter, *words], capture_output=True, text=True, env={**os.environ, **self.environment}
        )
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """PENDING, RUNNING, …; empty for a job that is not known."""
        return self.slurm("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")

    def close(self) -> None:
        for name in reversed(list(self._daemons)):
            self._kill(name)

    def _run(self, name: str, command: list[str]) -> None:
        with open(self.folder / f"{name}.out", "ab") as out:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *command], stdout=out, stderr=out, stdin=subprocess.DEVNULL,
                env={**os.environ, **self.environment}, start_new_session=True,
            )  # fmt: skip

    def _kill(self, name: str) -> None:
        daemon = self._daemons.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(daemon.pid, signal.SIGKILL)  # unshare's child, process 1 of its namespace, dies with it
        daemon.wait()

    def _wait(self, ready, what: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not ready():
            logs = {path.name: path.read_text(errors="replace")[-1500:] for path in self.folder.glob("*.[lo][ou][gt]")}
            dead = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            assert time.monotonic() < end and not dead, f"{what} did not come up, {dead} ended: {logs}"
            time.sleep(0.2)


@contextlib.contextmanager
def slurm_cluster(folder: Path, **settings: str) -> Iterator[Cluster]:
    """A Cluster; skips the test, with the reason, where this machine is not allowed to make it."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)}: not installed (apt install slurm-wlm munge)")
    folder.mkdir(exist_ok=True)
    with two_hosts(folder, ssh=False) as network:
        cluster = Cluster(folder, network)
        try:
            cluster.start(**settings)
            yield cluster
        finally:
            cluster.close()


@pytest.fixture(scope="session")
def make_slurm():
    """`make_slurm(folder)`: a context with a Slurm cluster of two nodes."""
    return slurm_cluster
