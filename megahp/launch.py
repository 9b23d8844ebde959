"""Ranks: starting them on this machine, knowing which one this is under torchrun or Slurm, and leaving cleanly."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from megahp.errors import UserError

SECONDS_TO_EXPLAIN = 2.0  # the first rank speaks for all: how long it is left alone once another has failed


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


def spawn(arguments: Sequence[str], ranks: int) -> int:
    """Run `python -m megahp ARGUMENTS` as so many local ranks. Returns 0, or the first failing rank's exit code;
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the ranks are ended too
    command = [sys.executable, "-m", "megahp", *arguments]
    processes = [subprocess.Popen(command, env=common | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(ranks)]
    try:
        while any(process.poll() is None for process in processes):
            if failed := [process.returncode for process in processes if process.poll()]:
                _wait(processes[:1], SECONDS_TO_EXPLAIN)
                return _exit_code(failed[0])
            time.sleep(0.05)
        return next((_exit_code(process.returncode) for process in processes if process.returncode), 0)
    except KeyboardInterrupt:
        return 130
    finally:
        _end(processes)


def join(place: World, cuda: bool) -> None:
    """Initialise the default process group: gloo for CPU tensors, NCCL for CUDA's.

    Raises UserError when torchrun's or srun's variables do not lead to the first rank.
    """
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if place.size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _first_host(os.environ.get("SLURM_STEP_NODELIST", ""))
    if "MASTER_PORT" not in os.environ:  # the same on all ranks of a job, different between jobs of one user
        os.environ["MASTER_PORT"] = str(20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000)
    dist.init_process_group(backend, rank=place.rank, world_size=place.size, timeout=timedelta(minutes=10))


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
