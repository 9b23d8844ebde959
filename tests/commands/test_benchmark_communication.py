"""Test the communication benchmark: figures by definition, wrong results, the mesh's groups."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megahp import cli
from megahp.plan.machine import FOLDER, load_machine

SCRIPT = Path(__file__).parents[2] / "tools" / "benchmark_communication.py"
COMMAND = ["benchmark", "communication"]
RUN = "[parallel]\ntp = 2\n"
# doc/PERFORMANCE.md of NVIDIA/nccl-tests: bus over algorithm bandwidth of n ranks
FACTORS = {
    "all-reduce": {2: 1, 4: 1.5},
    "all-gather": {2: 0.5, 4: 0.75},
    "reduce-scatter": {2: 0.5, 4: 0.75},
    "all-to-all": {2: 0.5, 4: 0.75},
    "send-receive": {2: 1, 4: 1},
}


def test_real_ranks(tmp_path: Path) -> None:
    """Four ranks: every operation in the world, and along both axes of a run's mesh."""
    (tmp_path / "run.toml").write_text(RUN)
    (tmp_path / "mine.toml").write_text((FOLDER / "cpu.toml").read_text())
    words = "--ranks 4 --run run.toml --groups world node tp --sizes 1K 256K --repeats 2 --json f.json --plot f.svg"
    words += " --cluster-file mine.toml"
    command = [sys.executable, str(SCRIPT), *words.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "f.json").read_text())
    assert results["backend"] == "gloo" and len(results["nodes"]) == 4
    rows = results["rows"]
    cases = [(row["group"], row["groups"], row["operation"], row["bytes"]) for row in rows]
    assert cases == [
        (name, groups, operation, size)
        for name, groups in (("world, node", [[0, 1, 2, 3]]), ("tp", [[0, 1], [2, 3]]))
        for operation in FACTORS
        for size in (1024, 262144)
    ]
    for row in rows:
        assert row["wrong"] == 0
        assert row["quartiles"][0] <= row["seconds"] <= row["quartiles"][1]
        assert row["algorithm_bandwidth"] == pytest.approx(row["bytes"] / row["seconds"])
        factor = FACTORS[row["operation"]][row["ranks"]]
        assert row["bus_bandwidth"] == pytest.approx(factor * row["algorithm_bandwidth"])
    assert "all-reduce, tp: 2 x 2 ranks, gloo" in done.stdout
    assert (tmp_path / "f.svg").stat().st_size > 1000
    small, large = (row for row in rows if (row["group"], row["operation"]) == ("world, node", "all-reduce"))
    links = load_machine(str(tmp_path / "mine.toml")).links
    assert links.node_bandwidth == pytest.approx(large["bus_bandwidth"], rel=1e-3)
    assert links.node_latency == pytest.approx(small["seconds"] / 6, rel=1e-3)


@pytest.mark.parametrize(
    ("words", "mistake"),
    [
        ([], "there is one rank"),
        (["--ranks", "1"], "there is one rank"),
        (["--ranks", "0"], "--ranks 0 must be at least 1"),
        (["--ranks", "2", "--sizes", "3X"], "--sizes 3X is no size in bytes"),
        (["--ranks", "2", "--repeats", "0"], "--repeats 0 must be at least 1"),
        (["--ranks", "2", "--settings", "parallel.tp=2"], "--settings need --run"),
        (["--ranks", "2", "--cluster-file", "none.toml"], "cluster file none.toml does not exist"),
        (["--ranks", "2", "--plot", "f.doc"], "name a .svg"),
        (["--ranks", "2", "--json", "nowhere/f.json"], "nowhere is no folder"),
        (["--ranks", "2", "--backend", "mpi"], "start them by mpirun"),
    ],
)
def test_mistakes(words: list[str], mistake: str, tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*COMMAND, *words]) == 2
    assert mistake in capsys.readouterr().err
