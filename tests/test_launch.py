"""Which rank a process is, from what its launcher says."""

from __future__ import annotations

import pytest

from megahp.errors import UserError
from megahp.launch import World, _first_host, is_first_here, world

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}


def test_torchrun_srun_and_alone() -> None:
    assert world(TORCHRUN) == World(5, 8, 1, 4)
    assert world(SRUN) == World(3, 4, 1, 2)
    assert world({}) == World(0, 1, 0, 1)
    assert world({"SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}) == World()  # a batch script, not a step
    assert [is_first_here(place) for place in (TORCHRUN, SRUN, {}, {"SLURM_LOCALID": "0"})] == [
        False,
        False,
        True,
        True,
    ]


def test_half_an_environment_is_a_mistake() -> None:
    with pytest.raises(UserError, match="RANK is not"):
        world({"WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("nodes", "first"), [("n1", "n1"), ("n1,n2", "n1"), ("n[3-5,9],m1", "n3"), ("gpu-07-[012-020]", "gpu-07-012")]
)
def test_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert _first_host(nodes) == first


def test_no_node_list_is_a_mistake() -> None:
    with pytest.raises(UserError, match="MASTER_ADDR"):
        _first_host("")
