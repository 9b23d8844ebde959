"""Training, benchmarking and checking under mpirun, without torchrun; with mpi4py and without."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from corpus import write_corpus

from megahp.benchmark.communication import OPERATIONS
from megahp.log.metrics import read_events, read_metrics

RUN = """
[model]
layers = 1
width = 32
heads = 4
[data]
train = ["corpus"]
sequence_length = 16
[batch]
global_batch = 8
micro_batch = 1
[parallel]
tp = 2
[train]
tokens = 5120
steps = 4
validation_samples = 0
[log]
tensorboard = false
every = 1
"""
# Open MPI's, harmless under others: more ranks than cores, and root, as on CI's machines
ALLOWED = {
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}
TOOLS = Path(__file__).parents[2] / "tools"
# Joins where nothing but MPI can tell the ranks an address, and sums over them.
JOINING = """
import torch, torch.distributed as dist
from megahp import launch
from megahp.launch import rendezvous
rendezvous._port = rendezvous._first_host = None
world = launch.world()
launch.join(world, cuda=False)
total = torch.tensor(world.rank)
dist.all_reduce(total)
print(f"sum {total.item()}\\n", end="", flush=True)  # one write: mpirun mixes those of its ranks
launch.leave(0)
"""

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(not shutil.which("mpirun"), reason="there is no mpirun; apt-get install openmpi-bin"),
]


@pytest.fixture
def without_mpi4py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks cannot import mpi4py, as where it is not installed."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "sitecustomize.py").write_text("import sys; sys.modules['mpi4py'] = None")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "hidden"), os.environ.get("PYTHONPATH", "")]))


@pytest.mark.usefixtures("without_mpi4py")
def test_training_under_mpirun_is_training(tmp_path: Path) -> None:
    """On four ranks, two by two, the losses are one rank's, as are those of --ranks 4 (test_layouts.py); and a mistake
    is told once, and its exit code is mpirun's too."""
    write_corpus(tmp_path / "corpus")
    (tmp_path / "run.toml").write_text(RUN)
    train = [sys.executable, "-m", "megahp", "train", "run.toml"]
    alone = run([*train, "log.name=alone", "parallel.tp=1"], tmp_path)
    four = run(["mpirun", "-n", "4", *train, "log.name=four"], tmp_path)
    assert alone.returncode == four.returncode == 0, alone.stderr + four.stdout + four.stderr
    started = read_events(tmp_path / "runs/four")[0]
    assert (started["layout"]["dp_shard"], started["layout"]["tp"]) == (2, 2)
    assert losses(tmp_path / "runs/four") == pytest.approx(losses(tmp_path / "runs/alone"), rel=1e-5)
    mistaken = run(["mpirun", "-n", "2", *train, "batch.size=3"], tmp_path)
    assert mistaken.returncode == 2
    assert mistaken.stderr.count("batch.size") == 1


def test_ranks_meet_by_mpi(tmp_path: Path) -> None:
    pytest.importorskip("mpi4py")
    found = run(["mpirun", "-n", "4", sys.executable, "-c", JOINING], tmp_path)
    assert found.returncode == 0 and found.stdout.count("sum 6") == 4, found.stdout + found.stderr


@pytest.mark.parametrize("backend", ["gloo", "mpi"])
def test_benchmark_under_mpirun(tmp_path: Path, backend: str) -> None:
    """On four ranks, by gloo and by MPI itself: every operation, its numbers checked."""
    if backend == "mpi":
        pytest.importorskip("mpi4py")
    words = [f"{TOOLS}/benchmark_communication.py", "--backend", backend, "--sizes", "1K", "--repeats", "1"]
    benchmark = run(["mpirun", "-n", "4", sys.executable, *words, "--json", "found.json"], tmp_path)
    assert benchmark.returncode == 0, benchmark.stdout + benchmark.stderr
    told = json.loads((tmp_path / "found.json").read_text())
    assert told["backend"] == backend and ("mpi4py" in told["versions"]) == (backend == "mpi")
    measured = {row["operation"]: (row["ranks"], row["wrong"]) for row in told["rows"]}
    assert measured == dict.fromkeys(OPERATIONS, (4, 0))


def test_check_under_mpirun(tmp_path: Path) -> None:
    words = [f"{TOOLS}/check_cluster.py", "--slack", "0.99", "--json", "found.json"]
    check = run(["mpirun", "-n", "4", sys.executable, *words], tmp_path)
    told = json.loads((tmp_path / "found.json").read_text())
    assert {problem["node"] for problem in told["problems"]} <= {
        socket.gethostname().split(".")[0]
    }  # the cores are few
    assert check.returncode == (1 if told["problems"] else 0), check.stdout + check.stderr
    assert [each["world"]["wrong"] for each in told["found"]["all-reduce"]] == [0] * 4


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MASTER_")}
    environment |= ALLOWED | {"OMP_NUM_THREADS": "1", "HOME": str(folder)}  # which then keeps the secret
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def losses(directory: Path) -> list[float]:
    return [step["loss"] for step in read_metrics(directory)]
