"""Ranks: starting them on this machine, knowing which one this is under torchrun or Slurm, and leaving cleanly."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from megahp.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

SECONDS_TO_EXPLAIN = 2.0  # how long the ranks are left alone once one has failed, to say why
TOLD = "user error told"
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class World:
    """Which rank this is, of how many, and which on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def world(environment: Mapping[str, str] = os.environ) -> World:
    """This process's place, from torchrun's variables, else srun's, else alone."""
    if "WORLD_SIZE" in environment:
        if "RANK" not in environment:
            raise UserError("WORLD_SIZE is set and RANK is not; start with --ranks, torchrun or srun, or unset it")
        size = int(environment["WORLD_SIZE"])
        return World(
            int(environment["RANK"]),
            size,
            int(environment.get("LOCAL_RANK", 0)),
            int(environment.get("LOCAL_WORLD_SIZE", size)),
        )
    if "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:
        local = int(environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0])
        return World(
            int(environment["SLURM_PROCID"]),
            int(environment["SLURM_STEP_NUM_TASKS"]),
            int(environment["SLURM_LOCALID"]),
            local,
        )
    return World()


def is_first_here(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the first of its machine's ranks, or alone."""
    return environment.get("LOCAL_RANK", environment.get("SLURM_LOCALID", "0")) == "0"


def spawn(arguments: Sequence[str], ranks: int, program: Sequence[str] = ("-m", "megahp")) -> int:
    """Run `python PROGRAM ARGUMENTS` as so many local ranks. Returns 0, or the first failing rank's exit code;
    the others are ended then, since a rank without its peers can only hang."""
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
    for ending in (signal.SIGTERM, signal.SIGHUP):  # so that the ranks are ended too
        signal.signal(ending, lambda number, _: sys.exit(128 + number))
    command = [sys.executable, *program, *arguments]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=common | place, preexec_fn=_die_with_parent))
        while any(process.poll() is None for process in processes):
            if failed := [process.returncode for process in processes if process.poll()]:
                _wait(processes, SECONDS_TO_EXPLAIN)
                return _exit_code(failed[0])
            time.sleep(0.05)
        return next((_exit_code(process.returncode) for process in processes if process.returncode), 0)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        _end(processes)


def _die_with_parent() -> None:
    """Ask Linux to end this process when the launcher is killed, which could not end it itself."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def join(place: World, cuda: bool) -> Store:
    """Initialise the default process group: gloo for CPU tensors, NCCL for CUDA's. Returns the store the ranks share.

    Raises UserError when torchrun's or srun's variables do not lead to the first rank.
    """
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if place.size == 1:
        alone = dist.HashStore()
        dist.init_process_group(backend, store=alone, rank=0, world_size=1)
        return alone
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _first_host(os.environ.get("SLURM_STEP_NODELIST", ""))
    if "MASTER_PORT" not in os.environ:  # the same on all ranks of a job, different between jobs of one user
        os.environ["MASTER_PORT"] = str(20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000)
    timeout = timedelta(minutes=10)
    store, _, _ = next(dist.rendezvous("env://", place.rank, place.size, timeout=timeout))
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=timeout)
    return store


def is_first_to_tell(store: Store) -> bool:
    """Whether no other rank has told the user of a mistake before: one line is enough for what all ranks meet."""
    return store.add(TOLD, 1) == 1


def is_told(store: Store) -> bool:
    """Whether some rank has told, or is about to tell, the user of a mistake: then this rank's failure is its echo."""
    time.sleep(SECONDS_TO_EXPLAIN / 4)
    try:
        return store.check([TOLD])
    except RuntimeError:  # the store has gone with the rank that held it
        return False


def leave(code: int) -> None:
    """End this process. destroy_process_group() races with gloo's threads and now and then aborts, so it is skipped."""
    import torch.distributed as dist

    if code == 0 and dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _first_host(nodes: str) -> str:
    """First name of a Slurm node list: n[3-5,9],m1 -> n3."""
    match = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
    if not match:
        raise UserError("MASTER_ADDR is not set and there is no Slurm node list; start with --ranks, torchrun or srun")
    return match[1] + (match[2] or "")


def _exit_code(returncode: int) -> int:
    return 128 - returncode if returncode < 0 else returncode


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    _wait(processes, 5.0)
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def _wait(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
