"""What a parameter *is*, in one declarative row, and everything that only needs the row: where it lies on the mesh,
over which axes its gradient is summed, who counts it in a norm.

Weights are DTensors on the `tp` mesh (FSDP2 adds the data-parallel axes); the forward pass computes on `local(weight)`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from megahp.parallel.layout import AXES
from megahp.parallel.mesh import EXPERT_SHARDS, SHARDS, Mesh
from megahp.scaling.parameterization import Role

FLATTENED = {"_".join(axes): axes for axes in (SHARDS, EXPERT_SHARDS)}  # the name DeviceMesh gives them as one


@dataclass(frozen=True)
class Row:
    """What a parameter is, beside its name and global shape."""

    role: Role
    tp_dim: int | None = None  # the dimension split over tp; None = every tp rank holds all of it
    experts: bool = False  # one matrix for each expert along dimension 0, which is split over ep
    sum_over: tuple[str, ...] = ()  # besides data parallelism, the axes its gradient is summed over; for a norm
    # weight also before its per-example gradients are squared: an example's tokens or the weight's uses lie there
    start: float | None = None  # a constant to start from; None = drawn at random
    tied: bool = False  # the last pipeline stage has a copy too, whose gradient is summed with the first's
    # rows of the matrices that lie together in each of its equal groups of rows, if several
    fused: tuple[int, ...] = ()
    density: float = 1.0  # share of its entries that are drawn; the others are masked, 0
    trained: bool = True  # or it stays as it is, and has no gradient

    @property
    def split(self) -> dict[str, int | None]:
        """The axes of the mesh it is laid over -> the dimension that each splits, if any."""
        return {"ep": 0, "tp": self.tp_dim} if self.experts else {"tp": self.tp_dim}

    def matrices(self, whole: Tensor) -> list[Tensor]:
        """The matrices a whole weight is made of, each [rows, columns], from first to last."""
        if self.experts:
            return list(whole)
        if not self.fused:
            return [whole]
        return [part.flatten(0, 1) for part in whole.unflatten(0, (-1, sum(self.fused))).split(self.fused, 1)]

    def fuse(self, matrices: Sequence[Tensor]) -> Tensor:
        """The inverse of `matrices`."""
        if self.experts:
            return torch.stack(tuple(matrices))
        if not self.fused:
            return matrices[0]
        groups = [part.unflatten(0, (-1, size)) for part, size in zip(matrices, self.fused, strict=True)]
        return torch.cat(groups, 1).flatten(0, 1)


class Module(nn.Module):
    """A module that says of each of its own parameters what it is: rows[name].

    Parameters are made in their global shape; a model is built on `meta`, then made real by `distribute` and
    `initialise`, so that no rank ever holds more than its part.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    probe: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, Row] = {}

    def parameter(self, name: str, shape: tuple[int, ...], row: Row) -> None:
        value = torch.empty(shape) if row.start is None else torch.full(shape, row.start)
        self.register_parameter(name, nn.Parameter(value))
        self.rows[name] = row


def rows(model: nn.Module) -> dict[str, Row]:
    """Fully qualified name -> row, for every parameter but the probes. A tied weight stands once."""
    table = {}
    for prefix, module in model.named_modules():
        if isinstance(module, Module):
            table.update({f"{prefix}.{name}" if prefix else name: row for name, row in module.rows.items()})
    named = dict(parameters(model))
    assert table.keys() == named.keys(), table.keys() ^ named.keys()
    return {name: table[name] for name in named}


def parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights by name: all parameters but the probes."""
    return ((name, p) for name, p in model.named_parameters() if not _is_probe(name))


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a model: weights, as they lie on the ranks, and buffers, which are equal on all."""
    tensors = (*parameters(model), *model.named_buffers())
    return {f"model.{name}": tensor.detach() for name, tensor in tensors}


def probes(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name of the norm, if the noise scale is measured, or router -> its probe, whose gradient is what it measures."""
    return {name.removesuffix(".probe"): p for name, p in model.named_parameters() if _is_probe(name)}


def local(weight: Tensor) -> Tensor:
    """This rank's part of a weight, inside autograd. The weight may also be a plain tensor."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def distribute(model: nn.Module, mesh: Mesh, dtype: torch.dtype) -> None:
    """Replace each global `meta` parameter by a `meta` DTensor of this rank's part, as its row says.

    dtype is that of the master weights, and of the probes.
    """
    for module in model.modules():
        for name, row in getattr(module, "rows", {}).items():
            shape = list(getattr(module, name).shape)
            stride = getattr(module, name).stride()
            part = list(shape)
            for axis, dim in row.split.items():
                if dim is not None:
                    part[dim] //= getattr(mesh.layout, axis)
            shard = DTensor.from_local(
                torch.empty(part, dtype=dtype, device="meta"),
                mesh.devices[tuple(row.split)],
                [Replicate() if dim is None else Shard(dim) for dim in row.split.values()],
                run_check=False,
                shape=torch.Size(shape),
                stride=stride,
            )
            setattr(module, name, nn.Parameter(shard, requires_grad=row.trained))
    for probe in probes(model).values():
        probe.data = probe.data.to(dtype)


def extent(weight: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and sizes, in the global weight, of the part this rank stores."""
    if not isinstance(weight, DTensor):
        return (0,) * weight.dim(), tuple(weight.shape)
    (chunk,) = weight.__create_chunk_list__()
    return tuple(chunk.offsets), tuple(chunk.sizes)


def indices(weight: Tensor) -> Tensor:
    """Where in the global weight, row by row, the entries of this rank's part stand: int64, as the part is laid out."""
    index = torch.zeros((), dtype=torch.int64, device=weight.device)
    for start, size, whole in zip(*extent(weight), weight.shape, strict=True):
        index = index[..., None] * whole + torch.arange(start, start + size, device=weight.device)
    return index


def storage(weight: Tensor) -> Tensor:
    """The plain tensor a weight is stored in on this rank, outside autograd."""
    weight = weight.detach()
    return weight.to_local() if isinstance(weight, DTensor) else weight


def like(weight: Tensor, part: Tensor) -> Tensor:
    """A tensor laid out over the ranks as the weight is, from this rank's part of it."""
    if not isinstance(weight, DTensor):
        return part
    return DTensor.from_local(
        part, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )


def whole(weight: Tensor, part: Tensor) -> Tensor:
    """The global tensor, on every rank, from the ranks' parts laid out as the weight is. A collective."""
    if not isinstance(weight, DTensor):
        return part
    mesh, shape, stride = weight.device_mesh, weight.shape, weight.stride()
    left = [Replicate() if mesh.size(axis) == 1 else placed for axis, placed in enumerate(weight.placements)]
    laid_out = DTensor.from_local(part, mesh, left, run_check=False, shape=shape, stride=stride)
    for axis in range(mesh.ndim):  # data-parallel axes first: they split what tensor parallelism had left
        left[axis] = Replicate()
        laid_out = laid_out.redistribute(placements=left)
    return laid_out.to_local()


def part_of(weight: Tensor, whole: Tensor) -> Tensor:
    """This rank's part of a global tensor that is to lie as the weight does."""
    return whole[tuple(slice(start, start + size) for start, size in zip(*extent(weight), strict=True))]


def replicated_axes(weight: Tensor, row: Row) -> set[str]:
    """The axes along which ranks hold equal copies of their part of this weight."""
    copied = {axis for axis in AXES if axis != "pp" or row.tied}
    if isinstance(weight, DTensor):
        for name, placement in zip(weight.device_mesh.mesh_dim_names or (), weight.placements, strict=True):
            if not placement.is_replicate():  # FSDP2 has a kind of shard that says it is none
                copied -= set(FLATTENED.get(name, (name,)))
    return copied


def is_first_replica(weight: Tensor, row: Row, mesh: Mesh) -> bool:
    """Whether this rank's part of the weight enters a sum over all ranks: of equal copies only the first does."""
    return mesh.is_rank0(tuple(replicated_axes(weight, row)))


@torch.no_grad()
def sum_gradients(weights: Mapping[str, Tensor], table: Mapping[str, Row], mesh: Mesh) -> None:
    """Sum each gradient over its row's axes, with one collective an axis. Data parallelism has been summed by FSDP2."""
    for axis in AXES:
        if (group := mesh.group(axis)).size() > 1:
            _sum([weight.grad for name, weight in weights.items() if axis in table[name].sum_over], group)
    if mesh.embedding_group:
        _sum([weight.grad for name, weight in weights.items() if table[name].tied], mesh.embedding_group)


def _sum(grads: Sequence[Tensor | None], group: dist.ProcessGroup) -> None:
    """Sum each over the group, in place, with one collective."""
    if parts := [local(grad) for grad in grads if grad is not None]:
        flat = torch.cat([part.reshape(-1) for part in parts])
        dist.all_reduce(flat, group=group)
        sums = flat.split([part.numel() for part in parts])
        torch._foreach_copy_(parts, [total.view_as(part) for total, part in zip(sums, parts, strict=True)])


def _is_probe(name: str) -> bool:
    return name.rpartition(".")[2] == "probe"
