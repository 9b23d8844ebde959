"""Ranks from the environment, as torchrun, mpirun or srun set it: a process's rank, world size, and its job's nodes."""

import itertools
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from megahp.errors import UserError

# mpirun's variables: rank, size, local rank, local size. They go before srun's, since in a Slurm job mpirun starts its
# daemons, and so the ranks, by srun.
OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
HYDRA = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")  # MPICH's and Intel's


@dataclass(frozen=True)
class World:
    """This process's rank and the number of ranks, overall and on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def world(environment: Mapping[str, str] = os.environ) -> World:
    """Return this process's ranks from torchrun's variables, else mpirun's, else srun's, else those of one process.
    Raises UserError for impossible ones."""
    found = _from_launcher(environment)
    if not (0 <= found.rank < found.size and 0 <= found.local_rank < found.local_size <= found.size):
        ranks = f"rank {found.rank} of {found.size}, {found.local_rank} of {found.local_size} on this machine"
        raise UserError(f"RANK, WORLD_SIZE or the launcher's variables say {ranks}; unset what is left over")
    return found


def _from_launcher(environment: Mapping[str, str]) -> World:
    # fewer ranks than srun has started tasks: WORLD_SIZE was exported where the job was submitted
    left_over = "SLURM_STEP_ID" in environment and int_variable(environment, "WORLD_SIZE", 0) < int_variable(
        environment, "SLURM_STEP_NUM_TASKS", 0
    )
    if "WORLD_SIZE" in environment and not left_over:
        if "RANK" not in environment:
            raise UserError("WORLD_SIZE is set and RANK is not; start with --ranks, torchrun or srun, or unset it")
        rank, size, local_rank = (int_variable(environment, name, 0) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        tasks = _tasks_per_node(environment)  # enroot's hook does not set LOCAL_WORLD_SIZE
        local_size = tasks[int_variable(environment, "SLURM_NODEID")] if tasks and sum(tasks) == size else size
        return World(rank, size, local_rank, int_variable(environment, "LOCAL_WORLD_SIZE", local_size))
    if names := mpirun_variables(environment):
        return World(*(int_variable(environment, name) for name in names))
    if "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NODEID")
        rank, size, local_rank, node = (int_variable(environment, name) for name in names)
        return World(rank, size, local_rank, _tasks_per_node(environment)[node])
    if "PMI_RANK" in environment:
        others = "RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE"
        raise UserError(f"PMI_RANK is set and MPI_LOCALRANKID is not; set {others}")
    return World()


def is_single_node(world: World, environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether all ranks are known to be on this machine. WORLD_SIZE without LOCAL_WORLD_SIZE leaves it open."""
    tasks = sum(_tasks_per_node(environment))
    is_known = "WORLD_SIZE" not in environment or "LOCAL_WORLD_SIZE" in environment or tasks == world.size
    return world.local_size == world.size and is_known


def launch_id(environment: Mapping[str, str]) -> str:
    """Return what ranks of one launch share, and those of another do not have: the id of the torchrun, of the mpirun,
    or of the job step and its restart."""
    if mpirun_variables(environment):
        names: tuple[str, ...] = ("PMIX_NAMESPACE",)
    elif "WORLD_SIZE" in environment:
        names = ("TORCHELASTIC_RUN_ID",)  # not its count of restarts, which is each torchrun's own
    else:
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    return " ".join(environment.get(name, "") for name in names)


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """Return Slurm's name of this machine, as --exclude takes it, else its short host name. Under mpirun always the
    latter, since Hydra passes its own machine's variables to all."""
    slurm_name = "" if mpirun_variables(environment) else environment.get("SLURMD_NODENAME", "")
    return slurm_name or socket.gethostname().split(".")[0]


def ranks_per_node(size: int, environment: Mapping[str, str] = os.environ) -> dict[str, int]:
    """Return how many of `size` ranks each node of this job step has, in Slurm's order; nothing where srun started
    another number."""
    tasks = _tasks_per_node(environment)
    hosts = expand_hostlist(environment.get("SLURM_STEP_NODELIST", ""))
    return dict(zip(hosts, tasks, strict=True)) if sum(tasks) == size and len(tasks) == len(hosts) else {}


def has_own_device(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether a rank that sees one GPU sees its own: where srun has started several tasks on this node, which
    --gpus-per-task or --gpu-bind=single show one each. If they share it after all, make_mesh refuses it."""
    tasks = _tasks_per_node(environment)
    return bool(tasks) and tasks[int_variable(environment, "SLURM_NODEID", 0)] > 1


def is_local_rank0(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process is the first of its machine's ranks, or alone."""
    names = ("LOCAL_RANK", OPEN_MPI[2], HYDRA[2], "SLURM_LOCALID")
    return next((environment[name] for name in names if name in environment), "0") == "0"


def int_variable(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Return a variable as an integer. Raises UserError."""
    if name not in environment and default is not None:
        return default
    value = environment.get(name, "")
    try:
        return int(value)
    except ValueError:
        raise UserError(f"{name} = {value!r} is not an integer; the launcher should set it") from None


def mpirun_variables(environment: Mapping[str, str]) -> tuple[str, ...] | None:
    """Return the names of the variables of the mpirun that started this process, if one did."""
    return next((names for names in (OPEN_MPI, HYDRA) if all(name in environment for name in names)), None)


def expand_hostlist(nodes: str) -> list[str]:
    """Return the names in Slurm's hostlist: n[08-10,12],m1 -> n08 n09 n10 n12 m1."""
    hosts = []
    for name in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        parts = re.split(r"\[(.*?)\]", name)  # every second one is ranges
        choices = [_expand_ranges(part) if index % 2 else [part] for index, part in enumerate(parts)]
        hosts += ["".join(each) for each in itertools.product(*choices)]
    return hosts


def _expand_ranges(ranges: str) -> list[str]:
    """08-10,12 -> 08 09 10 12."""
    ends = [(first, last or first) for first, _, last in (each.partition("-") for each in ranges.split(","))]
    return [str(n).zfill(len(first)) for first, last in ends for n in range(int(first), int(last) + 1)]


def _tasks_per_node(environment: Mapping[str, str]) -> list[int]:
    """Return how many ranks srun has started on each node of its step, 2(x3),1 -> 2 2 2 1; nothing under mpirun."""
    text = "" if mpirun_variables(environment) else environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    return [int(tasks) for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(times or 1))]
