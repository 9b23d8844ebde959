"""Which rank a process is and where the first one is, from what its launcher says."""

from __future__ import annotations

import socket

import pytest

from megahp.errors import UserError
from megahp.launch import World, has_own_device, is_local_rank0, is_single_node, node_name, ranks_per_node, world
from megahp.launch.environment import launch_id
from megahp.launch.rendezvous import _first_host

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_NODEID": "1",
    "SLURMD_NODENAME": "n2",
}
# what enroot's hook 50-slurm-pytorch adds to it in a container
ENROOT = SRUN | {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}

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
    assert world(SRUN) == world(PMI2) == world(ENROOT) == World(3, 4, 1, 2)
    assert world({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}) == World(3, 4, 3, 4)
    assert world({}) == World(0, 1, 0, 1)
    assert world({"SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}) == World()  # a batch script, not a step
    seconds = (TORCHRUN, SRUN, OPEN_MPI, MPICH, DAEMON | OPEN_MPI)
    assert not any(is_local_rank0(place) for place in seconds)
    firsts = ({}, {"SLURM_LOCALID": "0"}, OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "0"})
    assert all(is_local_rank0(place) for place in firsts)


def test_what_was_exported_where_the_job_was_submitted_is_left_alone() -> None:
    """Fewer ranks than Slurm has started tasks; a torchrun a node, or a script of a site's, has as many or more."""
    for left_over in ({"WORLD_SIZE": "1", "RANK": "0"}, {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}):
        assert world(SRUN | left_over) == world(SRUN)
    assert world(SRUN | TORCHRUN) == world(TORCHRUN)


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "7", "WORLD_SIZE": "4", "LOCAL_RANK": "0"},
        {"RANK": "-1", "WORLD_SIZE": "4", "LOCAL_RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "0"},
        TORCHRUN | {"LOCAL_RANK": "4"},
        TORCHRUN | {"LOCAL_WORLD_SIZE": "9"},
        OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "2"},
        SRUN | {"SLURM_PROCID": "4"},
    ],
)
def test_a_place_that_cannot_be_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(UserError, match="say rank .* unset what is left over"):
        world(environment)


@pytest.mark.parametrize(("tasks", "here"), [("2,1", 1), ("2(x3),1", 2), ("3", 3), ("1(x2),4(x2)", 1)])
def test_a_nodes_ranks_are_its_own(tasks: str, here: int) -> None:
    """By the node's place in the step; enroot's variables lead to the same."""
    step = {"SLURM_NODEID": "0" if tasks == "3" else "1", "SLURM_STEP_TASKS_PER_NODE": tasks}
    size = {"2,1": "3", "2(x3),1": "7", "3": "3"}.get(tasks, "10")
    step |= {"SLURM_STEP_NUM_TASKS": size, "SLURM_PROCID": "2", "RANK": "2", "SLURM_LOCALID": "0", "LOCAL_RANK": "0"}
    assert world(SRUN | step).local_size == here
    assert world(ENROOT | step | {"WORLD_SIZE": size}).local_size == here
    assert world(TORCHRUN | SRUN | step | {"WORLD_SIZE": "12"}).local_size == 4


BY_HAND = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
A_TASK_A_NODE = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_NODEID": "0"}
ONE_NODE = {"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0", "SLURM_LOCALID": "3"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        OPEN_MPI,
        MPICH,
        BY_HAND | {"LOCAL_WORLD_SIZE": "4"},
        SRUN | ONE_NODE,
        ENROOT | ONE_NODE,
        SRUN | ONE_NODE | {"WORLD_SIZE": "2", "RANK": "0"},  # left over
    ],
)
def test_ranks_are_known_to_be_on_one_machine(environment: dict[str, str]) -> None:
    assert is_single_node(world(environment), environment)


@pytest.mark.parametrize(
    "environment",
    [
        TORCHRUN,
        SRUN,
        ENROOT,
        BY_HAND,
        OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
        SRUN | BY_HAND,
        SRUN | A_TASK_A_NODE | BY_HAND,
    ],
)
def test_ranks_may_be_on_several(environment: dict[str, str]) -> None:
    assert not is_single_node(world(environment), environment)


def test_a_launch_is_not_another() -> None:
    """And all of its ranks call it the same."""
    step, torchrun = SRUN | {"SLURM_JOB_ID": "7"}, TORCHRUN | {"TORCHELASTIC_RUN_ID": "a"}
    others = [step | {"SLURM_JOB_ID": "8"}, step | {"SLURM_STEP_ID": "1"}, step | {"SLURM_RESTART_COUNT": "1"}]
    others += [torchrun, torchrun | {"TORCHELASTIC_RUN_ID": "b"}]
    others += [OPEN_MPI, OPEN_MPI | {"PMIX_NAMESPACE": "2"}, step]
    assert len({launch_id(each) for each in others}) == len(others)
    assert launch_id(step) == launch_id(step | {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"})
    assert launch_id(torchrun) == launch_id(torchrun | SRUN | {"SLURM_JOB_ID": "7"})  # of which ssh knows nothing
    assert launch_id(torchrun) == launch_id(torchrun | {"TORCHELASTIC_RESTART_COUNT": "1"})  # which each agent counts
    assert launch_id(OPEN_MPI) == launch_id(DAEMON | OPEN_MPI)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is not"),
        ({"PMI_RANK": "0"}, "MPI_LOCALRANKID is not"),
        (TORCHRUN | {"RANK": ""}, "RANK = '' is not an integer"),
        (TORCHRUN | {"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two' is not an integer"),
        (SRUN | {"SLURM_LOCALID": "x"}, "SLURM_LOCALID = 'x' is not an integer"),
    ],
)
def test_half_an_environment_is_a_mistake(environment: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        world(environment)


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ("n1", ["n1"]),
        ("n1,n2", ["n1", "n2"]),
        ("n[3-5,9],m1", ["n3", "n4", "n5", "n9", "m1"]),
        ("gpu-07-[009-011]", ["gpu-07-009", "gpu-07-010", "gpu-07-011"]),
        ("r[1-2]n[08-09]-ib,x", ["r1n08-ib", "r1n09-ib", "r2n08-ib", "r2n09-ib", "x"]),
    ],
)
def test_a_node_list_is_spelled_out(nodes: str, names: list[str]) -> None:
    assert _first_host({"SLURM_STEP_NODELIST": nodes}) == names[0]
    count = len(names)
    step = {"SLURM_STEP_NODELIST": nodes, "SLURM_STEP_TASKS_PER_NODE": f"2(x{count})"}
    assert ranks_per_node(2 * count, step) == dict.fromkeys(names, 2)
    assert ranks_per_node(3 * count, step) == ranks_per_node(2 * count, step | OPEN_MPI) == {}


def test_a_node_is_called_what_slurm_calls_it() -> None:
    """But for mpirun's ranks, which may have the variables of the machine where it was called."""
    here = socket.gethostname().split(".")[0]
    assert node_name(SRUN) == node_name(PMI2) == node_name(TORCHRUN | SRUN) == "n2"
    assert node_name({}) == node_name(MPICH | {"SLURMD_NODENAME": "n2"}) == node_name(SRUN | OPEN_MPI) == here


def test_tasks_that_see_one_gpu_see_their_own() -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "4,1", "SLURM_NODEID": "0"}
    assert has_own_device(step)
    assert not has_own_device(step | {"SLURM_NODEID": "1"})  # one torchrun there, say
    assert not has_own_device({})
