"""Time collective operations over groups of ranks, and check their results against arithmetic."""

import math
import time
from collections.abc import Sequence
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

PERIOD = 251  # of the values sent: whole numbers, whose sums over 5,000 ranks are exact in float32
BYTES = 4  # of a value
MAX_CALLS = 100  # in one repeat
REPEAT_SECONDS = 0.05  # a repeat makes as many calls as take this long, at most MAX_CALLS

Groups = list[list[int]]  # ranks: every rank is in one of them, and all communicate at the same time


OPERATIONS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "send-receive")


def pattern(rank: int, begin: int, end: int) -> Tensor:
    """Return elements begin to end of what a rank sends."""
    return torch.arange(begin, end).remainder(PERIOD).add(rank).to(torch.float32)


def expected_target(operation: str, rank: int, ranks: int, size: int) -> Tensor:
    """Return what must be in a rank's target after an operation. size: elements of the larger of its two buffers."""
    part = size // ranks

    def summed(begin: int, end: int) -> Tensor:
        return pattern(0, begin, end) * ranks + ranks * (ranks - 1) // 2

    def gathered(begin: int, end: int) -> Tensor:
        return torch.cat([pattern(other, begin, end) for other in range(ranks)])

    match operation:
        case "all-reduce":
            return summed(0, size)
        case "all-gather":
            return gathered(0, part)
        case "reduce-scatter":
            return summed(rank * part, (rank + 1) * part)
        case "all-to-all":
            return gathered(rank * part, (rank + 1) * part)
        case _:
            return pattern((rank - 1) % ranks, 0, size)


class TorchGroup:
    """This rank's group over torch.distributed: gloo or NCCL, depending on the device."""

    def __init__(self, groups: Groups, device: torch.device, timeout: timedelta) -> None:
        self.group, _ = dist.new_subgroups_by_enumeration(groups, timeout=timeout)
        self.rank, self.size, self.device = dist.get_rank(self.group), dist.get_world_size(self.group), device

    def run(self, operation: str, source: Tensor, target: Tensor) -> None:
        """Run an operation to its end. all-reduce works in place, on the target; send-receive goes around a ring."""
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

    def reduce_world(self, value: float, largest: bool) -> float:
        """Return the maximum, or the sum, over all ranks, of other groups too: a barrier for all of them."""
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
        return tensor.item()


class MpiGroup:
    """The same over mpi4py, from the CPU's memory."""

    def __init__(self, groups: Groups, mpi: Any) -> None:
        self.mpi, self.world = mpi, mpi.COMM_WORLD
        index = next(index for index, ranks in enumerate(groups) if self.world.rank in ranks)
        self.group = self.world.Split(index, groups[index].index(self.world.rank))
        self.rank, self.size, self.device = self.group.rank, self.group.size, torch.device("cpu")

    def run(self, operation: str, source: Tensor, target: Tensor) -> None:
        send, receive = source.numpy(), target.numpy()
        match operation:
            case "all-reduce":
                self.group.Allreduce(self.mpi.IN_PLACE, receive)
            case "all-gather":
                self.group.Allgather(send, receive)
            case "reduce-scatter":
                self.group.Reduce_scatter_block(send, receive)
            case "all-to-all":
                self.group.Alltoall(send, receive)
            case "send-receive":
                after, before = ((self.rank + by) % self.size for by in (1, -1))
                self.group.Sendrecv(send, after, recvbuf=receive, source=before)

    def reduce_world(self, value: float, largest: bool) -> float:
        return self.world.allreduce(value, self.mpi.MAX if largest else self.mpi.SUM)


Group = TorchGroup | MpiGroup


@dataclass(frozen=True)
class Timing:
    """The measurement of one operation at one size."""

    size: int  # bytes of the larger of a rank's two buffers
    seconds: list[float]  # of one call on the slowest rank; one per repeat
    wrong: int  # elements, over all ranks, that differ from the expected

    def bus_bandwidth(self, operation: str, ranks: int, seconds: float) -> float:
        """Return bytes per second by doc/PERFORMANCE.md of NVIDIA/nccl-tests: what a link of every rank must carry at
        least. send-receive, which it does not define, counts what it sends."""
        share = (ranks - 1) / ranks
        return self.size / seconds * {"all-reduce": 2 * share, "send-receive": 1.0}.get(operation, share)


def time_operation(group: Group, operation: str, size: int, repeats: int) -> Timing:
    """Time an operation on about `size` bytes, and check it before and after the timed calls."""
    part = max(size // (BYTES * group.size), 1)
    elements = part * group.size
    source = torch.empty(part if operation == "all-gather" else elements, device=group.device)
    expected = expected_target(operation, group.rank, group.size, elements).to(group.device)
    target = torch.empty_like(expected)

    def count_wrong() -> int:
        source.copy_(pattern(group.rank, 0, source.numel()))
        target.copy_(source) if operation == "all-reduce" else target.fill_(-1)
        group.run(operation, source, target)
        return int((target != expected).sum())

    def seconds(calls: int) -> float:
        group.reduce_world(0, largest=True)  # start together
        began = time.perf_counter()
        for _ in range(calls):
            group.run(operation, source, target)
        return group.reduce_world((time.perf_counter() - began) / calls, largest=True)

    wrong = count_wrong()
    target.zero_()  # repeated sums in place stay zero, and do not overflow
    calls = max(1, min(MAX_CALLS, int(REPEAT_SECONDS / seconds(1))))
    times = [seconds(calls) for _ in range(repeats)]
    wrong += count_wrong()
    return Timing(elements * BYTES, times, int(group.reduce_world(wrong, largest=False)))


def groups_of_nodes(nodes: Sequence[str]) -> dict[str, Groups]:
    """Return groups of the ranks that run on these nodes: world; within a node; between nodes, of the n-th ranks of
    each. Groups of one rank, and of nodes with different numbers of ranks, are omitted."""
    by_node = [[rank for rank, node in enumerate(nodes) if node == name] for name in dict.fromkeys(nodes)]
    kinds = {"world": [list(range(len(nodes)))]}
    if len({len(ranks) for ranks in by_node}) == 1:
        kinds |= {"node": by_node, "between nodes": [list(ranks) for ranks in zip(*by_node, strict=True)]}
    return {kind: groups for kind, groups in kinds.items() if len(groups[0]) > 1}


def groups_of_layout(layout: Layout) -> dict[str, Groups]:
    """Return groups along every axis of a run's mesh that has more than one rank (megahp/parallel/mesh.py)."""
    ranks = np.arange(math.prod(layout.shape)).reshape(layout.shape)
    by_axis = {axis: np.moveaxis(ranks, index, -1) for index, axis in enumerate(AXES)}
    return {axis: grid.reshape(-1, grid.shape[-1]).tolist() for axis, grid in by_axis.items() if grid.shape[-1] > 1}


def warm_up(device: torch.device) -> None:
    """Run the first collective on the device: NCCL needs all ranks in it, and later messages are between pairs."""
    dist.all_reduce(torch.zeros(1, device=device))


def device_of_rank(choice: str, world: World) -> torch.device:
    """Return this rank's device for auto, cpu or cuda. Raises UserError on all ranks of a machine with too few."""
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if world.local_size > torch.cuda.device_count():
        few = f"{node_name()} has {torch.cuda.device_count()} CUDA devices for {world.local_size} ranks"
        raise UserError(f"{few}; start one rank per device, or use the CPU")
    torch.cuda.set_device(world.local_rank)
    return torch.device("cuda", world.local_rank)
