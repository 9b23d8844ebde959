"""The device mesh: every group of ranks the model, the optimizer and the checkpoints talk over."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megahp import launch
from megahp.config import Config
from megahp.parallel.device import device_of, uses_cuda
from megahp.parallel.layout import AXES, Layout

SHARDS = ("dp_shard", "ep", "cp")  # the axes that share out a weight between them, beside tensor parallelism
WITHIN_STAGE = ("dp_replicate", "dp_shard", "ep", "cp", "tp")  # the axes of one pipeline stage
EXPERT_SHARDS = ("dp_shard", "cp")  # and an expert's, which lies on one rank along ep


@dataclass(frozen=True)
class Axis:
    """This rank's place on one axis of the mesh."""

    size: int
    rank: int
    group: dist.ProcessGroup


@dataclass(frozen=True)
class TensorAxis(Axis):
    """This rank's place on the tensor-parallel axis, and on the others that layers need to know of."""

    sequence_parallel: bool
    tokens: dist.ProcessGroup  # the ranks an example's tokens lie on outside the matrix products
    heads: dist.ProcessGroup  # the ranks its tokens and heads lie on inside attention
    context: Axis
    experts: Axis

    @property
    def spread(self) -> tuple[str, ...]:
        """Axes besides the data-parallel ones over which a weight outside the matrix products has its uses."""
        return ("tp",) if self.sequence_parallel else ()


@dataclass(frozen=True)
class Mesh:
    """A layout laid over the ranks of the default process group."""

    layout: Layout
    device: torch.device
    devices: DeviceMesh
    embedding_group: dist.ProcessGroup | None  # first and last rank of this rank's pipeline, if it is one of them

    def rank(self, axis: str) -> int:
        return self.devices.get_local_rank(axis)

    def over(self, *axes: str) -> DeviceMesh:
        """One axis over all ranks along these two or more, adjacent or not."""
        return self.devices[axes]._flatten()

    def group(self, *axes: str) -> dist.ProcessGroup:
        """This rank's group of the ranks that differ along these axes alone."""
        return self.over(*axes).get_group() if len(axes) > 1 else self.devices.get_group(axes[0])

    def axis(self, axis: str) -> Axis:
        return Axis(self.group(axis).size(), self.rank(axis), self.group(axis))

    def tensor_axis(self, sequence_parallel: bool) -> TensorAxis:
        return TensorAxis(
            **vars(self.axis("tp")),
            sequence_parallel=sequence_parallel,
            tokens=self.group("cp", "tp") if sequence_parallel else self.group("cp"),
            heads=self.group("cp", "tp"),
            context=self.axis("cp"),
            experts=self.axis("ep"),
        )

    @property
    def data_rank(self) -> int:
        """0 .. dp-1: which part of every global batch is this rank's."""
        shard = self.rank("dp_shard") * self.layout.ep + self.rank("ep")
        return self.rank("dp_replicate") * self.layout.dp_shard + shard

    def fsdp(self, shards: tuple[str, ...] = SHARDS) -> DeviceMesh:
        """The mesh FSDP2 shards over: one axis, or replicas x shards (HSDP)."""
        flat = self.over(*shards)
        if self.layout.dp_replicate == 1:
            return flat
        return DeviceMesh._concatenate([self.devices["dp_replicate"], flat])

    def is_rank0(self, axes: tuple[str, ...]) -> bool:
        """Whether this rank speaks for all ranks along these axes, where they hold the same value."""
        return all(self.rank(axis) == 0 for axis in axes)


def make_mesh(layout: Layout, device: torch.device) -> Mesh:
    """The mesh over the default process group, whose size must be the layout's product."""
    devices = init_device_mesh(device.type, layout.shape, mesh_dim_names=AXES)
    mesh = Mesh(layout, device, devices, _embedding_group(devices) if layout.pp > 1 else None)
    for axes in (SHARDS, EXPERT_SHARDS, ("cp", "tp"), WITHIN_STAGE):
        mesh.over(*axes)  # here, since all ranks must make a group at one time, and not all have experts
    return mesh


def single_rank_mesh(config: Config) -> Mesh:
    """The mesh of this process alone, which joins a group of its own if it is in none."""
    if not dist.is_initialized():
        launch.join(launch.World(), uses_cuda(config))
    return make_mesh(Layout(), device_of(config, launch.World()))


def _embedding_group(devices: DeviceMesh) -> dist.ProcessGroup | None:
    """This rank's group of the two ends of a pipeline. All ranks must make all groups, in one order."""
    mine = None
    for pipeline in devices.mesh.flatten(1).T.tolist():
        group = dist.new_group([pipeline[0], pipeline[-1]])
        if dist.get_rank() in (pipeline[0], pipeline[-1]):
            mine = group
    return mine
