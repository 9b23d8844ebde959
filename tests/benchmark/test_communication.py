"""Test groups of ranks and their timing."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from distributed import world
from torch.testing._internal.distributed.fake_pg import FakeStore

from megahp.benchmark import communication
from megahp.parallel.layout import AXES, Layout
from megahp.parallel.mesh import make_mesh


class Alone:
    """A group of three ranks from rank 0, in which one received element is changed."""

    rank, size, device = 0, 3, torch.device("cpu")

    def run(self, operation: str, source: torch.Tensor, target: torch.Tensor) -> None:
        assert operation == "send-receive"
        target.copy_(source + 2)  # rank 2's pattern
        target[-1] += 1

    def reduce_world(self, value: float, largest: bool) -> float:
        return max(value, 1e-3)


class Slow(Alone):
    """The same without the change, and with slow calls."""

    def run(self, operation: str, source: torch.Tensor, target: torch.Tensor) -> None:
        time.sleep(0.01)
        target.copy_(source + 2)


def test_a_changed_element_is_counted_before_and_after() -> None:
    assert communication.time_operation(Alone(), "send-receive", 1200, 1).wrong == 2


def test_seconds_are_those_of_one_call() -> None:
    seconds = communication.time_operation(Slow(), "send-receive", 1200, 3).seconds
    assert len(seconds) == 3 and all(0.01 <= each < 0.03 for each in seconds)


def slowest_and_sum() -> tuple[float, float]:
    from megahp.benchmark.communication import TorchGroup

    group, rank = TorchGroup([[0], [1]], torch.device("cpu"), timedelta(seconds=9)), dist.get_rank()
    return group.reduce_world(rank, largest=True), group.reduce_world(rank + 1, largest=False)


def test_the_slowest_rank_counts() -> None:
    assert world.run(2, slowest_and_sum) == [(1, 3)] * 2


@pytest.mark.parametrize("layout", [Layout(tp=2, pp=2, dp_shard=2), Layout(dp_replicate=2, dp_shard=4, ep=2)])
def test_groups_are_those_of_the_mesh(layout: Layout) -> None:
    results = communication.groups_of_layout(layout)
    assert list(results) == [axis for axis, size in zip(AXES, layout.shape, strict=True) if size > 1]
    for rank in range(8):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=8)
        mesh = make_mesh(layout, torch.device("cpu"))
        local = {axis: dist.get_process_group_ranks(mesh.group(axis)) for axis in results}
        dist.destroy_process_group()
        assert {axis: next(ranks for ranks in groups if rank in ranks) for axis, groups in results.items()} == local


def test_groups_of_nodes() -> None:
    assert communication.groups_of_nodes(["a", "a", "b", "b"]) == {
        "world": [[0, 1, 2, 3]],
        "node": [[0, 1], [2, 3]],
        "between nodes": [[0, 2], [1, 3]],
    }
    assert communication.groups_of_nodes(["a", "b", "a", "b"])["node"] == [[0, 2], [1, 3]]
    assert communication.groups_of_nodes(["a", "b"]) == {"world": [[0, 1]], "between nodes": [[0, 1]]}
    assert communication.groups_of_nodes(["a", "a", "b"]) == {"world": [[0, 1, 2]]}
