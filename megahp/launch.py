"""Ranks: starting them here, knowing which one this is under torchrun, mpirun or Slurm, and leaving cleanly."""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from megahp.errors import Fault, UserError
from megahp.exit_codes import FINAL, FINISHED, STOPPED

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore

SECONDS_TO_EXPLAIN = 2.0  # how long the ranks are left alone once one has failed, to say why
NOTICES = (signal.SIGTERM, signal.SIGUSR1)  # of an end: scancel's and `kill`'s; Slurm's --signal=USR1@120
SAME = 5.0  # seconds within which a second signal is the first one's echo, from a launcher or a process group
PATIENCE = timedelta(minutes=10)  # of ranks that wait for each other
PORTS = (20000, 12768)  # the first, and how many: below those that Linux gives to outgoing connections
PR_SET_PDEATHSIG = 1

# What mpirun tells a rank: its number, how many there are, and the same on its host. It goes before what srun tells,
# since in a Slurm job mpirun starts its daemons, and so the ranks, by srun.
OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
HYDRA = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")  # MPICH's and Intel's


@dataclass(frozen=True)
class World:
    """Which rank this is, of how many, and which on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def world(environment: Mapping[str, str] = os.environ) -> World:
    """This process's place, from torchrun's variables, else mpirun's, else srun's, else alone."""
    if "WORLD_SIZE" in environment:
        if "RANK" not in environment:
            raise UserError(
                "WORLD_SIZE is set and RANK is not; start with --ranks, torchrun, mpirun or srun, or unset it"
            )
        rank, size, local_rank = (_whole(environment, name, 0) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        tasks = _tasks_of_nodes(environment)  # enroot's hook leaves out LOCAL_WORLD_SIZE
        here = tasks[_whole(environment, "SLURM_NODEID")] if sum(tasks) == size else size
        return World(rank, size, local_rank, _whole(environment, "LOCAL_WORLD_SIZE", here))
    if names := _mpirun(environment):
        return World(*(_whole(environment, name) for name in names))
    if "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NODEID")
        rank, size, local_rank, node = (_whole(environment, name) for name in names)
        return World(rank, size, local_rank, _tasks_of_nodes(environment)[node])
    if "PMI_RANK" in environment:
        raise UserError(
            "PMI_RANK is set and MPI_LOCALRANKID is not; set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE"
        )
    return World()


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """What Slurm calls this machine, which is what --exclude wants, else its short host name. Under mpirun it is the
    latter, for Hydra hands its own machine's variables to all."""
    told = "" if _mpirun(environment) else environment.get("SLURMD_NODENAME", "")
    return told or socket.gethostname().split(".")[0]


def ranks_of_nodes(size: int, environment: Mapping[str, str] = os.environ) -> dict[str, int]:
    """How many of so many ranks each node of this job step has, in Slurm's order; nothing where srun started others."""
    tasks = _tasks_of_nodes(environment)
    hosts = _hosts(environment.get("SLURM_STEP_NODELIST", ""))
    return dict(zip(hosts, tasks, strict=True)) if sum(tasks) == size and len(tasks) == len(hosts) else {}


def is_first_here(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the first of its machine's ranks, or alone."""
    names = ("LOCAL_RANK", OPEN_MPI[2], HYDRA[2], "SLURM_LOCALID")
    return next((environment[name] for name in names if name in environment), "0") == "0"


def spawn(arguments: Sequence[str], ranks: int, program: Sequence[str] = ("-m", "megahp")) -> int:
    """Run `python PROGRAM ARGUMENTS` as so many local ranks. Returns 0, or the first failing rank's exit code;
    the others are ended then, since a rank without its peers can only hang. Signals that give notice are passed on."""
    from torch.distributed import TCPStore

    # this process holds the store, on a port the system picks, so that two runs never want the same one
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    command = [sys.executable, *program, *arguments]
    processes: list[subprocess.Popen[bytes]] = []
    notices: list[tuple[float, int]] = []  # when, which signal

    def pass_on(number: int, _: object) -> None:
        notices.append((time.monotonic(), number))
        again = notices[-1][0] - notices[0][0] > SAME  # a rank that hangs would not take it
        for process in processes:
            process.send_signal(signal.SIGKILL if again else number)

    for number in NOTICES:
        signal.signal(number, pass_on)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # not under nohup
        signal.signal(signal.SIGHUP, lambda number, _: sys.exit(128 + number))
    try:
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=common | place, preexec_fn=die_with_parent))
        codes: list[int | None] = [None]
        while None in codes and not any(codes):
            time.sleep(0.05)
            codes = [process.poll() for process in processes]
        code = _first_failure(codes)
        return 128 + notices[0][1] if notices and code not in FINAL else code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        for number in NOTICES:
            signal.signal(number, signal.SIG_DFL)
        _end(processes)


def die_with_parent() -> None:
    """Ask Linux to end this process when the one that started it is killed, which could not end it itself."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def join(place: World, cuda: bool, patience: timedelta = PATIENCE, store: Store | None = None) -> Store:
    """Initialise the default process group: gloo for CPU tensors, NCCL for CUDA's, whose collectives fail after waiting
    for so long. Returns the store the ranks share, the given one if they have met.

    Raises UserError when what the launcher tells does not lead to the first rank, Fault when nobody answers there.
    """
    import torch.distributed as dist

    store = store or meet(place)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=patience)
    return store


def meet(place: World, patience: timedelta = PATIENCE, all_of_them: bool = True) -> Store:
    """The store the ranks share, which the first one holds, or the torchrun or --ranks that started them. The first one
    waits there for all of them, unless it is to find out who does not come.

    MASTER_ADDR and MASTER_PORT name its place; else MPI tells it; else it follows from Slurm's or Open MPI's variables.
    Raises UserError or Fault, as join() does.
    """
    import torch.distributed as dist

    if place.size == 1:
        return dist.HashStore()
    if "MASTER_ADDR" not in os.environ and (store := _meet_by_mpi(place, patience)):
        return store
    host = os.environ.get("MASTER_ADDR") or _first_host(place, os.environ)
    holds = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return _store(place, host, _port(os.environ), patience, holds, all_of_them)


def _store(place: World, host: str, port: int, patience: timedelta, holds: bool, all_of_them: bool = False) -> TCPStore:
    """One end of the store at this address. Raises Fault where nobody answers there."""
    import torch.distributed as dist

    try:
        return dist.TCPStore(host, port, place.size, holds, patience, all_of_them)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        where, why = f"{host}:{port} (MASTER_ADDR:MASTER_PORT)", str(error).splitlines()[0]
        raise Fault(f"rank {place.rank} does not meet the others at {where}: {why}") from None


def _meet_by_mpi(place: World, patience: timedelta) -> Store | None:
    """The first rank's store, its address and a free port told by MPI; None where mpi4py is not there, or is of
    another MPI than mpirun and sees one rank. MPI is finalized at once, so that a rank may end in any way later.
    Raises Fault on all ranks where the first has no store."""
    if not _mpirun(os.environ):
        return None
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):  # not installed; no MPI library found
        return None
    store: TCPStore | None = None
    told: tuple[str, int] | Fault | None = None
    try:
        if MPI.COMM_WORLD.size != place.size:
            return None
        if place.rank == 0:
            host = "127.0.0.1" if place.local_size == place.size else socket.gethostname()
            try:
                store = _store(place, host, 0, patience, True)
                told = host, store.port
            except Fault as fault:
                told = fault
        heard = MPI.COMM_WORLD.bcast(told)
        if isinstance(heard, Fault):
            raise heard
        return store or _store(place, heard[0], heard[1], patience, False)
    finally:
        MPI.Finalize()


def is_first_to_tell(store: Store, what: str) -> bool:
    """Whether no other rank has told this before: one line is enough for what all ranks meet."""
    try:
        return store.add(f"told {what}", 1) == 1
    except RuntimeError:  # the store has gone with the rank that held it
        return True


def is_told(store: Store, what: str) -> bool:
    """Whether some rank has told this, or is about to: then this rank's failure is its echo."""
    time.sleep(SECONDS_TO_EXPLAIN / 4)
    try:
        return store.check([f"told {what}"])
    except RuntimeError:
        return False


def outlast_questions(place: World) -> None:
    """Let the first rank, which may hold the store, stay until the others have asked it what was told."""
    if place.rank == 0 and place.size > 1:
        time.sleep(SECONDS_TO_EXPLAIN / 2)


def is_lost_connection(error: Exception) -> bool:
    """Whether a collective failed since another rank has gone, in gloo's or NCCL's words."""
    from torch.distributed import DistBackendError

    return isinstance(error, DistBackendError) or "gloo/transport" in str(error)


def leave(code: int) -> None:
    """End this process. destroy_process_group() races with gloo's threads and now and then aborts, so it is skipped."""
    import torch.distributed as dist

    if code in (FINISHED, STOPPED) and dist.is_initialized():  # a launcher ends all when one is gone with another code
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _whole(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    """A variable that is a number. Raises UserError."""
    if name not in environment and default is not None:
        return default
    try:
        return int(environment[name])
    except (KeyError, ValueError):
        raise UserError(
            f"{name} = {environment.get(name, '')!r} is no whole number; it is the launcher's to set"
        ) from None


def _mpirun(environment: Mapping[str, str]) -> tuple[str, ...] | None:
    """The names of the variables of the mpirun that started this process."""
    return next((names for names in (OPEN_MPI, HYDRA) if all(name in environment for name in names)), None)


def _first_host(place: World, environment: Mapping[str, str]) -> str:
    """Where rank 0 is: on this machine if all are, else on the first of Slurm's node list: n[3-5,9],m1 -> n3."""
    if "PMIX_NAMESPACE" in environment and _mpirun(environment) and place.local_size == place.size:
        return "127.0.0.1"
    nodes = _hosts(environment.get("SLURM_STEP_NODELIST", ""))
    if _mpirun(environment) or not nodes:
        raise UserError(
            "MASTER_ADDR is not set and nothing else names the first rank's host; start with --ranks, torchrun or "
            "srun; under mpirun install mpi4py for its MPI, or set MASTER_ADDR and MASTER_PORT for all ranks"
        )
    return nodes[0]


def _hosts(nodes: str) -> list[str]:
    """The names in a node list of Slurm's: n[08-10,12],m1 -> n08 n09 n10 n12 m1."""
    found = []
    for name in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        parts = re.split(r"\[(.*?)\]", name)  # every second is ranges
        choices = [_numbers(part) if place % 2 else [part] for place, part in enumerate(parts)]
        found += ["".join(each) for each in itertools.product(*choices)]
    return found


def _numbers(ranges: str) -> list[str]:
    """08-10,12 -> 08 09 10 12."""
    ends = [(first, last or first) for first, _, last in (each.partition("-") for each in ranges.split(","))]
    return [str(n).zfill(len(first)) for first, last in ends for n in range(int(first), int(last) + 1)]


def _tasks_of_nodes(environment: Mapping[str, str]) -> list[int]:
    """How many ranks srun has started on each node of its step, 2(x3),1 -> 2 2 2 1; nothing where it was mpirun."""
    text = "" if _mpirun(environment) else environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    return [int(tasks) for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(times or 1))]


def _port(environment: Mapping[str, str]) -> int:
    """MASTER_PORT; else the same on all ranks of an mpirun or a job step, very likely another for any other."""
    if "MASTER_PORT" in environment:
        port = _whole(environment, "MASTER_PORT")
        if not 0 < port < 2**16:
            raise UserError(f"MASTER_PORT = {port} is no port; take one of 1 to {2**16 - 1}")
        return port
    names = ("PMIX_NAMESPACE",) if _mpirun(environment) else ("SLURM_JOB_ID", "SLURM_STEP_ID")
    step = " ".join(environment.get(name, "") for name in names)
    if not step.strip():
        raise UserError("MASTER_ADDR is set and MASTER_PORT is not; set both for all ranks")
    return PORTS[0] + zlib.crc32(step.encode()) % PORTS[1]


def _first_failure(returncodes: Sequence[int | None]) -> int:
    """The exit code of these ranks together: that of one that was ended by a signal, which is told, before others'."""
    for rank, code in enumerate(returncodes):
        if code and code < 0:
            print(f"megahp: rank {rank} was ended by {signal.Signals(-code).name}", file=sys.stderr, flush=True)
            return 128 - code
    return next((code for code in returncodes if code), 0)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the ranks that do not end by themselves. What they write is whole or is not there."""
    _wait(processes, SECONDS_TO_EXPLAIN)
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def _wait(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
