"""Where ranks meet."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from launch.test_environment import MPICH, OPEN_MPI, SRUN

from megahp.errors import Fault, UserError
from megahp.launch import World, meet
from megahp.launch.rendezvous import PORTS, _first_host, _port


@pytest.mark.parametrize(
    "environment",
    [{}, OPEN_MPI, OPEN_MPI | {"SLURM_STEP_NODELIST": "n2"}],  # on two hosts, of which nothing, or a daemon's, is told
)
def test_no_way_to_the_first_host_is_a_mistake(environment: dict[str, str]) -> None:
    with pytest.raises(UserError, match="set MASTER_ADDR"):
        _first_host(environment)


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
        (MPICH, "nothing names rank 0's port"),  # and another run on these machines would take the same one
        ({"MASTER_PORT": "x"}, "MASTER_PORT = 'x' is not an integer"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT = 70000 is not a port"),
    ],
)
def test_a_port_that_cannot_be(environment: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        _port(environment)


class Mpi:
    """mpi4py.MPI as one of two ranks sees it that follow each other in one process."""

    def __init__(self) -> None:
        self.COMM_WORLD, self.size, self.finalized = self, 2, 0
        self.told = bytearray()

    def Bcast(self, message: bytearray) -> None:
        self.told = self.told or message  # the first rank's
        message[:] = self.told

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
        with pytest.raises(Fault, match="rank 0 cannot reach the others at nowhere.invalid"):
            meet(World(rank, 2, 0, 1), timedelta(seconds=0.2))
    assert mpi.finalized == 2


@pytest.mark.parametrize("host", ["nowhere.invalid", "x" * 64 + ".example"])
def test_a_name_that_cannot_be_resolved_is_a_mistake_at_once(
    host: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MASTER_ADDR", host)
    monkeypatch.setenv("MASTER_PORT", "29511")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    began = time.monotonic()
    with pytest.raises(UserError, match=f"MASTER_ADDR = '{host}', where rank 0 is, cannot be resolved") as told:
        meet(World(1, 2, 0, 1))
    assert time.monotonic() - began < 30 and not told.value.may_pass and not capfd.readouterr().err
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(UserError) as told:
        meet(World(1, 2, 0, 1))
    assert told.value.may_pass


def test_gloo_and_nccl_stay_on_the_loopback_interface_unless_told() -> None:
    words = "import os; from megahp import launch; launch.join(launch.World(), False)"
    words += (
        "; print(*(os.environ[f'{library}_SOCKET_IFNAME'] for library in ('GLOO', 'NCCL')), flush=True); os._exit(0)"
    )
    ours = {name: value for name, value in os.environ.items() if not name.endswith("_SOCKET_IFNAME")}
    for more, told in (({}, "lo lo\n"), ({"NCCL_SOCKET_IFNAME": "ib0"}, "lo ib0\n")):
        assert subprocess.check_output([sys.executable, "-c", words], env=ours | more, text=True) == told


def listening(session: int) -> set[str]:
    """The addresses, in the kernel's hexadecimal words, at which the processes of a session listen."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if os.getsid(int(process.name)) != session:
                continue
            sockets = {os.readlink(descriptor)[8:-1] for descriptor in (process / "fd").iterdir()}
            for table in ("tcp", "tcp6"):
                rows = [line.split() for line in (process / "net" / table).read_text().splitlines()[1:]]
                found |= {row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in sockets}
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_local_run_listens_to_no_network(tmp_path: Path) -> None:
    """The ranks' store, gloo's groups and what the check of a cluster tells the time by: on the loopback interface."""
    check = [sys.executable, "-m", "megahp", "check-cluster", "--ranks", "2", "--device", "cpu"]
    ours = {name: value for name, value in os.environ.items() if not name.endswith("_SOCKET_IFNAME")}
    found: set[str] = set()
    with subprocess.Popen(check, cwd=tmp_path, env=ours, stdout=subprocess.DEVNULL, start_new_session=True) as run:
        while run.poll() is None:
            found |= listening(run.pid)
            time.sleep(0.05)
    assert found == {"0100007F"}
