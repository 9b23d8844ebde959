"""Collective operations under test: who talks to whom, what must come out, and how long it takes."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megahp.benchmark.machine import synchronize
from megahp.errors import UserError
from megahp.launch import World, node_name
from megahp.parallel.collectives import gather_into, reduce_scatter_into
from megahp.parallel.layout import AXES, Layout

PERIOD = 251  # of the values sent, whole numbers, whose sums over 5,000 ranks float32 holds exactly
BYTES = 4  # of one
MOST_CALLS = 100  # in one repeat
REPEAT_SECONDS = 0.05  # of calls, as far as so many take so long

Groups = list[list[int]]  # ranks: every rank is in one of them, and all talk at the same time


@dataclass(frozen=True)
class Operation:
    """A collective over n ranks. Its size S is that of the larger of a rank's two buffers, in elements here.

    bus: bus bandwidth over S / seconds, by doc/PERFORMANCE.md of NVIDIA/nccl-tests: what a link of every rank must
    carry at least. send-receive, of which it says nothing, counts what it sends.
    """

    bus: Callable[[int], float]  # of n
    source: Callable[[int, int], int]  # of S and n: elements
    target: Callable[[int, int], int]
    result: Callable[[int, int, int], Tensor]  # of rank, n and S: float32, what must be in the target


def pattern(rank: int, begin: int, end: int) -> Tensor:
    """Elements begin to end of what a rank sends."""
    return torch.arange(begin, end).remainder(PERIOD).add(rank).to(torch.float32)


def total(ranks: int, begin: int, end: int) -> Tensor:
    """Their sum over the ranks."""
    return pattern(0, begin, end) * ranks + ranks * (ranks - 1) // 2


def exchanged(rank: int, ranks: int, size: int) -> Tensor:
    """The rank's part of what every rank sends, in the order of the ranks."""
    part = size // ranks
    return torch.cat([pattern(other, rank * part, (rank + 1) * part) for other in range(ranks)])


def whole(size: int, ranks: int) -> int:
    return size


def part(size: int, ranks: int) -> int:
    return size // ranks


OPERATIONS = {
    "all-reduce": Operation(lambda n: 2 * (n - 1) / n, whole, whole, lambda rank, n, size: total(n, 0, size)),
    "all-gather": Operation(
        lambda n: (n - 1) / n,
        part,
        whole,
        lambda rank, n, size: torch.cat([pattern(other, 0, size // n) for other in range(n)]),
    ),
    "reduce-scatter": Operation(
        lambda n: (n - 1) / n, whole, part, lambda rank, n, size: total(n, rank * (size // n), (rank + 1) * (size // n))
    ),
    "all-to-all": Operation(lambda n: (n - 1) / n, whole, whole, exchanged),
    "send-receive": Operation(lambda n: 1.0, whole, whole, lambda rank, n, size: pattern((rank - 1) % n, 0, size)),
}


class TorchGroup:
    """This rank's one of some groups, over torch.distributed: gloo or NCCL, by the device."""

    def __init__(self, groups: Groups, device: torch.device, patience: timedelta) -> None:
        self.group, _ = dist.new_subgroups_by_enumeration(groups, timeout=patience)
        self.rank, self.size, self.device = dist.get_rank(self.group), dist.get_world_size(self.group), device

    def run(self, operation: str, source: Tensor, target: Tensor) -> None:
        """Once, to its end. all-reduce works in place, on the target; send-receive goes round in a ring."""
        match operation:
            case "all-reduce":
                dist.all_reduce(target, group=self.group)
            case "all-gather":
                gather_into(target, source, group=self.group)
            case "reduce-scatter":
                reduce_scatter_into(target, source, group=self.group)
            case "all-to-all":
                dist.all_to_all_single(target, source, group=self.group)
            case "send-receive":
                after, before = (dist.get_global_rank(self.group, (self.rank + by) % self.size) for by in (1, -1))
                both = [dist.P2POp(dist.isend, source, after), dist.P2POp(dist.irecv, target, before)]
                for work in dist.batch_isend_irecv(both):
                    work.wait()
        synchronize(self.device)

    def over_all(self, value: float, largest: bool) -> float:
        """The largest, or the sum, of all ranks' values, those of other groups included: they meet here."""
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
        return tensor.item()


class MpiGroup:
    """The same over mpi4py, from the CPU's memory."""

    def __init__(self, groups: Groups, mpi: Any) -> None:
        self.mpi, self.world = mpi, mpi.COMM_WORLD
        mine = next(number for number, ranks in enumerate(groups) if self.world.rank in ranks)
        self.group = self.world.Split(mine, groups[mine].index(self.world.rank))
        self.rank, self.size, self.device = self.group.rank, self.group.size, torch.device("cpu")

    def run(self, operation: str, source: Tensor, target: Tensor) -> None:
        give, take = source.numpy(), target.numpy()
        match operation:
            case "all-reduce":
                self.group.Allreduce(self.mpi.IN_PLACE, take)
            case "all-gather":
                self.group.Allgather(give, take)
            case "reduce-scatter":
                self.group.Reduce_scatter_block(give, take)
            case "all-to-all":
                self.group.Alltoall(give, take)
            case "send-receive":
                after, before = ((self.rank + by) % self.size for by in (1, -1))
                self.group.Sendrecv(give, after, recvbuf=take, source=before)

    def over_all(self, value: float, largest: bool) -> float:
        return self.world.allreduce(value, self.mpi.MAX if largest else self.mpi.SUM)


Group = TorchGroup | MpiGroup


@dataclass(frozen=True)
class Timing:
    """What came of one operation at one size."""

    size: int  # bytes, by the definition of Operation
    seconds: list[float]  # of one call, the slowest rank's; one a repeat
    wrong: int  # elements, of all ranks, that are not what arithmetic says

    def bus_bandwidth(self, operation: str, ranks: int, seconds: float) -> float:
        """Bytes a second."""
        return self.size / seconds * OPERATIONS[operation].bus(ranks)


def timed(group: Group, operation: str, size: int, repeats: int) -> Timing:
    """Run an operation on about so many bytes, checked before and after the repeats that count."""
    shape, n = OPERATIONS[operation], group.size
    elements = max(size // (BYTES * n), 1) * n
    source = torch.empty(shape.source(elements, n), device=group.device)
    target = torch.empty(shape.target(elements, n), device=group.device)
    expected = shape.result(group.rank, n, elements).to(group.device)

    def wrong() -> int:
        source.copy_(pattern(group.rank, 0, source.numel()))
        target.copy_(source) if operation == "all-reduce" else target.fill_(-1)
        group.run(operation, source, target)
        return int((target != expected).sum())

    def seconds(calls: int) -> float:
        group.over_all(0, largest=True)
        began = time.perf_counter()
        for _ in range(calls):
            group.run(operation, source, target)
        return group.over_all((time.perf_counter() - began) / calls, largest=True)

    mistakes = wrong()
    target.zero_()  # sums of it stay what they are
    calls = max(1, min(MOST_CALLS, int(REPEAT_SECONDS / seconds(1))))
    times = [seconds(calls) for _ in range(repeats)]
    mistakes += wrong()
    return Timing(elements * BYTES, times, int(group.over_all(mistakes, largest=False)))


def groups_of_nodes(nodes: Sequence[str]) -> dict[str, Groups]:
    """Groups of the ranks that run on these nodes: world; within a node; between nodes, of the ranks that are alike
    there. Groups of one rank, and of nodes that hold different numbers of ranks, are left out."""
    within = [[rank for rank, node in enumerate(nodes) if node == one] for one in dict.fromkeys(nodes)]
    found = {"world": [list(range(len(nodes)))]}
    if len({len(ranks) for ranks in within}) == 1:
        found |= {"node": within, "between nodes": [list(ranks) for ranks in zip(*within, strict=True)]}
    return {name: groups for name, groups in found.items() if len(groups[0]) > 1}


def groups_of_layout(layout: Layout) -> dict[str, Groups]:
    """Groups along every axis of a run's mesh that has more than one rank (megahp/parallel/mesh.py)."""
    ranks = np.arange(math.prod(layout.shape)).reshape(layout.shape)
    along = {axis: np.moveaxis(ranks, place, -1) for place, axis in enumerate(AXES)}
    return {axis: each.reshape(-1, each.shape[-1]).tolist() for axis, each in along.items() if each.shape[-1] > 1}


def greet(device: torch.device) -> None:
    """The first call on the device: NCCL wants all ranks in it, and a pair's messages are of two."""
    dist.all_reduce(torch.zeros(1, device=device))


def device_of_rank(choice: str, place: World) -> torch.device:
    """This rank's device for auto, cpu or cuda. Raises UserError on all ranks of a machine with too few."""
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if place.local_size > torch.cuda.device_count():
        few = f"{node_name()} has {torch.cuda.device_count()} CUDA devices for {place.local_size} ranks"
        raise UserError(f"{few}; start a rank a device, or stay on the CPU")
    torch.cuda.set_device(place.local_rank)
    return torch.device("cuda", place.local_rank)
