"""The benchmark of communication: figures by the definition, wrong results noticed, groups as the mesh has them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from distributed import world
from torch.testing._internal.distributed.fake_pg import FakeStore

from megahp import cli
from megahp.parallel.layout import AXES, Layout
from megahp.parallel.mesh import make_mesh

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
    """Four: every operation in the world, and along both axes of a run's mesh."""
    (tmp_path / "run.toml").write_text(RUN)
    words = "--ranks 4 --run run.toml --groups world node tp --sizes 1K 256K --repeats 2 --json f.json --plot f.svg"
    command = [sys.executable, str(SCRIPT), *words.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["backend"] == "gloo" and len(found["nodes"]) == 4
    rows = found["rows"]
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


class Alone:
    """A rank's view of three that all sent what it did, with one element changed on the way."""

    rank, size, device = 0, 3, torch.device("cpu")

    def run(self, operation: str, source: torch.Tensor, target: torch.Tensor) -> None:
        assert operation == "send-receive"
        target.copy_(source + 2)  # rank 2's pattern
        target[-1] += 1

    def over_all(self, value: float, largest: bool) -> float:
        return max(value, 1e-3)


class Slow(Alone):
    """The same, right, and with a call that lasts."""

    def run(self, operation: str, source: torch.Tensor, target: torch.Tensor) -> None:
        time.sleep(0.01)
        target.copy_(source + 2)


def test_a_changed_element_is_counted_before_and_after(tool: ModuleType) -> None:
    assert tool.timed(Alone(), "send-receive", 1200, 1).wrong == 2


def test_seconds_are_those_of_one_call(tool: ModuleType) -> None:
    seconds = tool.timed(Slow(), "send-receive", 1200, 3).seconds
    assert len(seconds) == 3 and all(0.01 <= each < 0.03 for each in seconds)


def slowest_and_sum() -> tuple[float, float]:
    from megahp.benchmark.communication import TorchGroup

    group, rank = TorchGroup([[0], [1]], torch.device("cpu"), timedelta(seconds=9)), dist.get_rank()
    return group.over_all(rank, largest=True), group.over_all(rank + 1, largest=False)


def test_the_slowest_rank_counts(tool: ModuleType) -> None:
    assert world.run(2, slowest_and_sum) == [(1, 3)] * 2


@pytest.mark.parametrize("layout", [Layout(tp=2, pp=2, dp_shard=2), Layout(dp_replicate=2, dp_shard=4, ep=2)])
def test_groups_are_those_of_the_mesh(layout: Layout, tool: ModuleType) -> None:
    found = tool.groups_of_layout(layout)
    assert list(found) == [axis for axis, size in zip(AXES, layout.shape, strict=True) if size > 1]
    for rank in range(8):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=8)
        mesh = make_mesh(layout, torch.device("cpu"))
        mine = {axis: dist.get_process_group_ranks(mesh.group(axis)) for axis in found}
        dist.destroy_process_group()
        assert {axis: next(ranks for ranks in groups if rank in ranks) for axis, groups in found.items()} == mine


def test_groups_of_nodes(tool: ModuleType) -> None:
    assert tool.groups_of_nodes(["a", "a", "b", "b"]) == {
        "world": [[0, 1, 2, 3]],
        "node": [[0, 1], [2, 3]],
        "between nodes": [[0, 2], [1, 3]],
    }
    assert tool.groups_of_nodes(["a", "b", "a", "b"])["node"] == [[0, 2], [1, 3]]
    assert tool.groups_of_nodes(["a", "b"]) == {"world": [[0, 1]], "between nodes": [[0, 1]]}
    assert tool.groups_of_nodes(["a", "a", "b"]) == {"world": [[0, 1, 2]]}


@pytest.mark.parametrize(
    ("words", "mistake"),
    [
        ([], "there is one rank"),
        (["--ranks", "1"], "there is one rank"),
        (["--ranks", "0"], "--ranks 0 must be at least 1"),
        (["--ranks", "2", "--sizes", "3X"], "--sizes 3X is no size in bytes"),
        (["--ranks", "2", "--repeats", "0"], "--repeats 0 must be at least 1"),
        (["--ranks", "2", "--settings", "parallel.tp=2"], "go with --run"),
        (["--ranks", "2", "--plot", "f.doc"], "name a .svg"),
        (["--ranks", "2", "--json", "nowhere/f.json"], "nowhere is no folder"),
        (["--ranks", "2", "--backend", "mpi"], "start them by mpirun"),
    ],
)
def test_mistakes(words: list[str], mistake: str, tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*COMMAND, *words]) == 2
    assert mistake in capsys.readouterr().err
