"""The device mesh: every process group that the model, the optimizer and the checkpoints communicate over."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megahp import launch
from megahp.config import Config
from megahp.errors import UserError
from megahp.parallel.device import claim_device, uses_cuda
from megahp.parallel.layout import AXES, EXPERT_SHARDS, SHARDS, WITHIN_REPLICA, Layout
from megahp.parallel.messages import all_gather_json


@dataclass(frozen=True)
class Axis:
    """This rank's position on one axis of the mesh."""

    size: int
    rank: int
    group: dist.ProcessGroup


@dataclass(frozen=True)
class TensorAxis(Axis):
    """This rank's position on the tensor-parallel axis, and what else layers need of the mesh."""

    sequence_parallel: bool
    tokens: dist.ProcessGroup  # ranks that share an example's tokens outside the matrix products
    heads: dist.ProcessGroup  # ranks that share its tokens and heads inside attention
    context: Axis
    experts: Axis

    @property
    def sum_over(self) -> tuple[str, ...]:
        """Return the axes, besides the data-parallel ones, that sum the gradient of a weight outside the matrix
        products. Without sequence parallelism every tp rank sees all tokens, and has the whole gradient."""
        return ("tp",) if self.sequence_parallel else ()


@dataclass(frozen=True)
class Mesh:
    """The device mesh of this run, and this rank's place in it."""

    layout: Layout
    device: torch.device
    devices: DeviceMesh
    embedding_group: dist.ProcessGroup | None  # first and last rank of this rank's pipeline, if it is one of them

    def rank(self, axis: str) -> int:
        return self.devices.get_local_rank(axis)

    def group(self, *axes: str) -> dist.ProcessGroup:
        """Return this rank's group of the ranks that differ along these axes alone."""
        return self.devices[axes]._flatten().get_group() if len(axes) > 1 else self.devices.get_group(axes[0])

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
        """Return which part of every global batch this rank reads, 0 .. dp-1."""
        shard = self.rank("dp_shard") * self.layout.ep + self.rank("ep")
        return self.rank("dp_replicate") * self.layout.dp_shard + shard

    def fsdp(self, shards: tuple[str, ...] = SHARDS) -> DeviceMesh:
        """Return the mesh FSDP2 shards over: one axis, or replicas x shards (HSDP)."""
        flat = self.devices[shards]._flatten()
        if self.layout.dp_replicate == 1:
            return flat
        return DeviceMesh._concatenate([self.devices["dp_replicate"], flat])

    def is_rank0(self, axes: tuple[str, ...]) -> bool:
        """Return whether this rank is the first along these axes: of ranks with equal values only it enters a sum."""
        return all(self.rank(axis) == 0 for axis in axes)


def make_mesh(layout: Layout, device: torch.device) -> Mesh:
    """Return the mesh over the default process group, whose size must be the layout's product. Raises UserError on all
    ranks where two of them compute on one CUDA device."""
    if device.type == "cuda":
        refuse_shared(device)
    devices = init_device_mesh(device.type, layout.shape, mesh_dim_names=AXES)
    # Making a group is a collective of all ranks, in one order. So all groups are made here: later, only the stages
    # with experts would ask for theirs, and the others would not be there.
    for axes in (SHARDS, EXPERT_SHARDS, ("cp", "tp"), WITHIN_REPLICA):
        devices[axes]._flatten()
    embedding_group = None
    if layout.pp > 1:
        for pipeline in devices.mesh.flatten(1).T.tolist():
            ends = [pipeline[0], pipeline[-1]]
            group = dist.new_group(ends)
            if dist.get_rank() in ends:
                embedding_group = group
    return Mesh(layout, device, devices, embedding_group)


def refuse_shared(device: torch.device) -> None:
    """Raise UserError, on every rank, where two ranks have one CUDA device, as a launcher can bind them: NCCL would end
    each with its own trace."""
    owners: dict[str, int] = {}
    uuid = torch.cuda.get_device_properties(device).uuid
    for rank, name in enumerate(all_gather_json(f"{uuid} of {launch.node_name()}")):
        if (first := owners.setdefault(name, rank)) != rank:
            raise UserError(
                f"ranks {first} and {rank} compute on one CUDA device ({name}), and NCCL needs one for each rank; bind "
                "each its own, e.g. by srun --gpus-per-task=1, or set train.device=cpu"
            )


def single_rank_mesh(config: Config) -> Mesh:
    """Return the mesh of this process alone; it joins a process group of its own if it is in none."""
    if not dist.is_initialized():
        launch.join(launch.World(), uses_cuda(config))
    return make_mesh(Layout(), claim_device(config, launch.World()))
