"""A real Slurm on this machine: one slurmctld, a slurmd for each of some emulated nodes, as the user who runs it.

Nodes are named by addresses of this machine, 127.0.0.1 and on, so that names that scripts derive lead somewhere.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "shellcheck")
MISSING = [name for name in NEEDED if not shutil.which(name)]

CONF = """
ClusterName=test
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
TmpFS={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=6
KillWait=5
MailProg=/bin/true
PropagateResourceLimits=NONE
PartitionName=test Nodes=ALL Default=YES MaxTime=60 State=UP
"""


class Cluster:
    """Its nodes, and commands to it."""

    def __init__(self, folder: Path, nodes: int, first_job: int = 1) -> None:
        self.folder, self.names = folder, [f"127.0.0.{number}" for number in range(1, nodes + 1)]
        host, ports = socket.gethostname().split(".")[0], free_ports(nodes + 1)
        text = CONF.format(host=host, port=ports[0], user=getpass.getuser(), folder=folder, first_job=first_job)
        for name, port in zip(self.names, ports[1:], strict=True):
            (folder / name).mkdir(parents=True)
            text += f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=1000\n"
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(text)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        ours = {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.environment = {**os.environ, **ours}
        self.controller = self._start("slurmctld", "-D", "-c")
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        for name in self.names:
            self.start(name)
        self.wait(lambda: self("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == str(nodes), 30)

    def start(self, name: str) -> None:
        """A node's daemon, at first or after it was killed."""
        self.nodes[name] = self._start("slurmd", "-D", "-N", name, SLURMD_NODENAME=name)

    def __call__(self, *command: str, **more: str) -> str:
        """What a command prints; its environment is the cluster's, and more."""
        done = subprocess.run(command, env={**self.environment, **more}, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def state(self, job: str) -> str:
        """Of a job or an array: RUNNING, COMPLETED, ... of its elements, each once."""
        return " ".join(sorted(set(self("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").split())))

    def finished(self, job: str) -> str:
        """Its state when it has left the queue."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        self.wait(lambda: set(self.state(job).split()) <= over, 300)
        return self.state(job)

    def wait(self, until: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline, self("squeue", "-t", "all") + self("sinfo", "-N", "-l")
            time.sleep(0.3)

    def close(self) -> None:
        """End jobs, whose steps would outlive their slurmd, and daemons."""
        self("scancel", "--user", getpass.getuser())
        self.wait(lambda: not self("squeue", "-h"), 30)
        for daemon in (*self.nodes.values(), self.controller):
            daemon.terminate()
            daemon.wait(30)

    def _start(self, *command: str, **more: str) -> subprocess.Popen[bytes]:
        log = (self.folder / "daemons.log").open("ab")
        return subprocess.Popen(command, env={**self.environment, **more}, stdout=log, stderr=log)


@contextmanager
def running(folder: Path, nodes: int, first_job: int = 1) -> Iterator[Cluster]:
    """A cluster of its own: others, with other numbers of jobs, have other ports."""
    cluster = Cluster(folder, nodes, first_job)
    try:
        yield cluster
    finally:
        cluster.close()


def free_ports(count: int) -> list[int]:
    """Which the system has just had to give; all are held until the last is known."""
    held = [socket.socket() for _ in range(count)]
    for each in held:
        each.bind(("", 0))
    ports = [each.getsockname()[1] for each in held]
    for each in held:
        each.close()
    return ports
