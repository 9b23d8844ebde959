"""Where ranks meet."""

from __future__ import annotations

import socket
import sys
from datetime import timedelta
from types import SimpleNamespace

import pytest
from launch.test_environment import MPICH, OPEN_MPI, SRUN

from megahp.errors import Fault, UserError
from megahp.launch import World, meet
from megahp.launch.rendezvous import PORTS, _first_host, _port


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
    assert len({_port(SRUN | step | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}) for rank in "0123"}) == 1
    assert _port(step | {"MASTER_PORT": "29500"}) == 29500


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (MPICH, "MASTER_PORT is not; set both"),  # and another run on these machines would take the same one
        ({"MASTER_PORT": "x"}, "MASTER_PORT = 'x' is no whole number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT = 70000 is no port"),
    ],
)
def test_a_port_that_cannot_be(environment: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        _port(environment)


class Mpi:
    """mpi4py.MPI as one of two ranks sees it that follow each other in one process."""

    def __init__(self) -> None:
        self.COMM_WORLD, self.size, self.told, self.finalized = self, 2, None, 0

    def bcast(self, told: object) -> object:
        self.told = told or self.told
        return self.told

    def Finalize(self) -> None:
        self.finalized += 1


@pytest.fixture
def mpi(monkeypatch: pytest.MonkeyPatch) -> Mpi:
    stand_in = Mpi()
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=stand_in))
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in OPEN_MPI.items():
        monkeypatch.setenv(name, value)
    return stand_in


def test_mpi_tells_where_the_first_rank_is(mpi: Mpi) -> None:
    first, second = (meet(World(rank, 2, rank, 2), timedelta(seconds=9)) for rank in range(2))
    first.set("said", "yes")
    assert second.get("said") == b"yes" and mpi.finalized == 2


def test_all_ranks_hear_that_the_first_has_no_store(mpi: Mpi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "nowhere.invalid")
    for rank in range(2):
        with pytest.raises(Fault, match="rank 0 does not meet the others at nowhere.invalid"):
            meet(World(rank, 2, 0, 1), timedelta(seconds=0.2))
    assert mpi.finalized == 2
