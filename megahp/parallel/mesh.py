"""The device mesh: every group of ranks the model, the optimizer and the checkpoints talk over."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megahp.parallel.layout import AXES, Layout


@dataclass(frozen=True)
class TensorAxis:
    """This rank's place on the tensor-parallel axis, as the layers need it."""

    size: int
    rank: int
    group: dist.ProcessGroup
    sequence_parallel: bool

    @property
    def spread(self) -> tuple[str, ...]:
        """Axes that share out the tokens outside the matrix products: ("tp",) under sequence parallelism."""
        return ("tp",) if self.sequence_parallel else ()


@dataclass(frozen=True)
class Mesh:
    """A layout laid over the ranks of the default process group."""

    layout: Layout
    device: torch.device
    devices: DeviceMesh

    def rank(self, axis: str) -> int:
        return self.devices.get_local_rank(axis)

    def group(self, axis: str) -> dist.ProcessGroup:
        return self.devices.get_group(axis)

    def tensor_axis(self, sequence_parallel: bool) -> TensorAxis:
        return TensorAxis(self.layout.tp, self.rank("tp"), self.group("tp"), sequence_parallel)

    @property
    def data_rank(self) -> int:
        """0 .. dp-1: which part of every global batch is this rank's."""
        return self.rank("dp_replicate") * self.layout.dp_shard + self.rank("dp_shard")

    @property
    def fsdp(self) -> DeviceMesh:
        """The mesh FSDP2 shards over: one axis, or replicas x shards (HSDP)."""
        return self.devices["dp_replicate", "dp_shard"] if self.layout.dp_replicate > 1 else self.devices["dp_shard"]

    def is_first(self, axes: tuple[str, ...]) -> bool:
        """Whether this rank speaks for all ranks along these axes, where they hold the same value."""
        return all(self.rank(axis) == 0 for axis in axes)


def make_mesh(layout: Layout, device: torch.device) -> Mesh:
    """The mesh over the default process group, whose size must be the layout's product."""
    return Mesh(layout, device, init_device_mesh(device.type, layout.shape, mesh_dim_names=AXES))
