"""Which rank a process is and where the first one is, from what its launcher says."""

from __future__ import annotations

import pytest

from megahp.errors import UserError
from megahp.launch import PORTS, World, _first_host, _port, is_first_here, world

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}

# recorded: rank 1 of 2 under Open MPI 4.1.4, the same under MPICH 4.0.2
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
    "OMPI_UNIVERSE_SIZE": "2",
    "PMIX_RANK": "1",
    "PMIX_NAMESPACE": "360579073",
}
MPICH = {"PMI_FD": "8", "PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
PMI2 = {**SRUN, "PMI_RANK": "3", "PMI_SIZE": "4", "PMI_FD": "20"}  # srun --mpi=pmi2
# a rank on another node than mpirun's: Slurm's variables are those of the daemon that started it
DAEMON = {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}


def test_torchrun_mpirun_srun_and_alone() -> None:
    assert world(TORCHRUN) == World(5, 8, 1, 4)
    assert world(OPEN_MPI) == world(MPICH) == World(1, 2, 1, 2)
    assert world(DAEMON | OPEN_MPI) == world(DAEMON | MPICH) == World(1, 2, 1, 2)
    assert world(OPEN_MPI | TORCHRUN) == world(TORCHRUN)  # one torchrun a node, started by mpirun
    assert world(SRUN) == world(PMI2) == World(3, 4, 1, 2)
    assert world({}) == World(0, 1, 0, 1)
    assert world({"SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}) == World()  # a batch script, not a step
    seconds = (TORCHRUN, SRUN, OPEN_MPI, MPICH, DAEMON | OPEN_MPI)
    assert not any(is_first_here(place) for place in seconds)
    firsts = ({}, {"SLURM_LOCALID": "0"}, OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "0"})
    assert all(is_first_here(place) for place in firsts)


@pytest.mark.parametrize(
    ("environment", "words"), [({"WORLD_SIZE": "2"}, "RANK is not"), ({"PMI_RANK": "0"}, "MPI_LOCALRANKID is not")]
)
def test_half_an_environment_is_a_mistake(environment: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        world(environment)


@pytest.mark.parametrize(
    ("nodes", "first"), [("n1", "n1"), ("n1,n2", "n1"), ("n[3-5,9],m1", "n3"), ("gpu-07-[012-020]", "gpu-07-012")]
)
def test_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert _first_host(World(0, 4, 0, 2), {"SLURM_STEP_NODELIST": nodes}) == first


def test_ranks_on_one_host_need_no_node_list() -> None:
    assert _first_host(World(1, 2, 1, 2), OPEN_MPI) == "127.0.0.1"


@pytest.mark.parametrize(
    ("place", "environment"),
    [
        (World(0, 4, 0, 2), {}),
        (World(0, 4, 0, 2), OPEN_MPI),  # on two hosts, of which nothing is told
        (World(0, 4, 0, 2), OPEN_MPI | {"SLURM_STEP_NODELIST": "n2"}),  # where its daemon runs
        (World(0, 2, 0, 2), MPICH),  # nothing tells this job's port from another's
    ],
)
def test_no_way_to_the_first_host_is_a_mistake(place: World, environment: dict[str, str]) -> None:
    with pytest.raises(UserError, match="set MASTER_ADDR"):
        _first_host(place, environment)


def test_a_port_is_a_job_steps_own() -> None:
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    steps = (step, step | {"SLURM_STEP_ID": "1"}, step | {"SLURM_JOB_ID": "8"}, OPEN_MPI)
    assert len({_port(each) for each in steps}) == len(steps)
    assert all(PORTS[0] <= _port(each) < 32768 for each in steps)
    assert _port(OPEN_MPI) == _port(step | OPEN_MPI)  # of whose ranks only some see a step
