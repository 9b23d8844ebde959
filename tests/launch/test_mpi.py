"""Training, benchmarking and checking under mpirun, without torchrun and without mpi4py."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from corpus import write_corpus

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
BENCHMARK = "--sizes 1K --repeats 1 --operations all-reduce reduce-scatter --json found.json"

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(not shutil.which("mpirun"), reason="there is no mpirun; apt-get install openmpi-bin"),
]


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


def test_benchmark_and_check_under_mpirun(tmp_path: Path) -> None:
    """On four ranks, over MPI itself where mpi4py is there."""
    found, backend = tmp_path / "found.json", "mpi" if importlib.util.find_spec("mpi4py") else "gloo"
    words = [f"{TOOLS}/benchmark_communication.py", "--backend", backend, *BENCHMARK.split()]
    benchmark = run(["mpirun", "-n", "4", sys.executable, *words], tmp_path)
    assert benchmark.returncode == 0, benchmark.stdout + benchmark.stderr
    told = json.loads(found.read_text())
    assert told["backend"] == backend
    assert [(row["ranks"], row["wrong"]) for row in told["rows"]] == [(4, 0)] * 2
    words = [f"{TOOLS}/check_cluster.py", "--slack", "0.99", "--json", "found.json"]
    check = run(["mpirun", "-n", "4", sys.executable, *words], tmp_path)
    told = json.loads(found.read_text())
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
