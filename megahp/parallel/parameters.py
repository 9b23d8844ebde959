"""What a parameter *is*, in one declarative Row, and everything that needs the Row alone: where the weight lies on the
mesh, over which axes its gradient is summed, which rank counts it in a norm.

Weights that tp or ep splits are DTensors on that mesh, the others plain (FSDP2 makes DTensors of all, with the
data-parallel axes added); the forward pass computes on `local(weight)`.

A gradient is complete once it is summed over every axis along which ranks compute different terms of the loss with the
same entries of the weight:
- the data-parallel axes and cp, since ranks have different tokens: FSDP2's reduce-scatter does that, or `sum_gradients`
  where nothing is sharded;
- the axes of `Row.sum_over`: `sum_gradients`;
- the two copies of a tied weight under pipelines, one for the embedding and one for the unembedding: `sum_gradients`.
Other axes need nothing: a weight split over tp or ep has the whole gradient of its part, and where all ranks compute
the same from an input they share, `collectives.copy_to` has summed the input's gradient. All are sums, not means, since
each rank's loss is divided by the tokens of the whole global batch.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megahp.parallel.layout import AXES, EXPERT_SHARDS, SHARDS, WITHIN_REPLICA, Layout
from megahp.parallel.mesh import Mesh
from megahp.scaling.parameterization import Role

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

FLATTENED = {"_".join(axes): axes for axes in (SHARDS, EXPERT_SHARDS)}  # DeviceMesh's name of axes flattened into one


@dataclass(frozen=True)
class Row:
    """What a parameter is, beside its name and global shape."""

    role: Role
    tp_dim: int | None = None  # the dimension split over tp; None = every tp rank holds all of it
    experts: bool = False  # one matrix for each expert along dimension 0, which is split over ep
    # Axes, besides the data-parallel ones, that its gradient is summed over. A norm's per-example gradients are summed
    # over them before they are squared: an example's tokens, or the uses of the weight, are spread over their ranks.
    sum_over: tuple[str, ...] = ()
    start: float | None = None  # constant initial value; None = drawn at random
    tied: bool = False  # the last pipeline stage has a copy too, whose gradient is summed with the first's
    # rows of each of several matrices that are interleaved, group by group, along dimension 0 (Megatron's qkv)
    fused: tuple[int, ...] = ()
    density: float = 1.0  # share of the entries that are not masked (0)
    trained: bool = True  # False: constant, without a gradient
    ends_branch: bool = False  # the last matrix of a residual branch

    @property
    def split(self) -> dict[str, int | None]:
        """Return the mesh axes of the weight's DTensor -> the dimension that each splits, None for copies."""
        return {"ep": 0, "tp": self.tp_dim} if self.experts else {"tp": self.tp_dim}

    def matrices(self, whole: Tensor) -> list[Tensor]:
        """Split a whole weight into the matrices it is made of, each [rows, columns]."""
        if self.experts:
            return list(whole)
        if not self.fused:
            return [whole]
        return [part.flatten(0, 1) for part in whole.unflatten(0, (-1, sum(self.fused))).split(self.fused, 1)]

    def fuse(self, matrices: Sequence[Tensor]) -> Tensor:
        """Join matrices into one weight, the opposite of `matrices`."""
        if self.experts:
            return torch.stack(tuple(matrices))
        if not self.fused:
            return matrices[0]
        groups = [part.unflatten(0, (-1, size)) for part, size in zip(matrices, self.fused, strict=True)]
        return torch.cat(groups, 1).flatten(0, 1)


class Module(nn.Module):
    """Describe each of its own parameters by a Row, rows[name].

    Parameters are created in their global shape; a model is built on `meta`, then `distribute` and `initialise` make it
    real, so that no rank ever holds more than its part.
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
    """Return fully qualified name -> row of every parameter but the probes. A tied weight is listed once."""
    table = {}
    for prefix, module in model.named_modules():
        if isinstance(module, Module):
            table.update({f"{prefix}.{name}" if prefix else name: row for name, row in module.rows.items()})
    named = dict(parameters(model))
    assert table.keys() == named.keys(), table.keys() ^ named.keys()
    return {name: table[name] for name in named}


def parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Return the weights by name: all parameters but the probes."""
    return ((name, p) for name, p in model.named_parameters() if name.rpartition(".")[2] != "probe")


def probes(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the probes by module name: every router's, and every norm's if the noise scale is measured. A probe's
    gradient is the measurement."""
    found = ((name, getattr(module, "probe", None)) for name, module in model.named_modules())
    return {name: probe for name, probe in found if probe is not None}


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint holds of a model whose parameters are its master weights."""
    return saved_state(dict(parameters(model)), [model])


def saved_state(weights: Mapping[str, Tensor], stages: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Return what a checkpoint holds of a model: weights, sharded, and buffers, which are equal on all ranks."""
    tensors = (*weights.items(), *(buffer for stage in stages for buffer in stage.named_buffers()))
    return {f"model.{name}": tensor.detach() for name, tensor in tensors}


def distribute(model: nn.Module, mesh: Mesh, dtype: torch.dtype) -> None:
    """Convert each global `meta` parameter to `dtype`, that of the master weights and the probes; where tp or ep has
    several ranks, replace it by a `meta` DTensor whose local part is split as its row says."""
    for module in model.modules():
        for name, row in getattr(module, "rows", {}).items():
            weight = getattr(module, name)
            if all(getattr(mesh.layout, axis) == 1 for axis in row.split):
                # plain: torch's DTensor, and torch._dynamo with it, take a second to import that a rank alone saves
                setattr(module, name, nn.Parameter(weight.detach().to(dtype), requires_grad=row.trained))
                continue
            from torch.distributed.tensor import DTensor, Replicate, Shard

            part = list(weight.shape)
            for axis, dim in row.split.items():
                if dim is not None:
                    part[dim] //= getattr(mesh.layout, axis)
            shard = DTensor.from_local(
                torch.empty(part, dtype=dtype, device="meta"),
                mesh.devices[tuple(row.split)],
                [Replicate() if dim is None else Shard(dim) for dim in row.split.values()],
                run_check=False,
                shape=weight.shape,
                stride=weight.stride(),
            )
            setattr(module, name, nn.Parameter(shard, requires_grad=row.trained))
    for probe in probes(model).values():
        probe.data = probe.data.to(dtype)


class FlatPart(Tensor):
    """This rank's part of a weight that is cut without regard to its dimensions, as DeepSpeed's ZeRO cuts it: entries
    `begin` to `begin + len(part)` of the flattened weight, none where `part` is empty.

    Like a DTensor it has the weight's shape and stores a part. It only says what is where: `storage` reads it.
    """

    begin: int
    part: Tensor  # [entries]

    @staticmethod
    def __new__(cls, shape: Sequence[int], begin: int, part: Tensor) -> FlatPart:
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=part.dtype, device=part.device)
        self.begin, self.part = begin, part
        return self

    def detach(self) -> FlatPart:
        return self

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"{function} of a FlatPart; compute on storage(part)")


def is_dtensor(weight: Tensor) -> TypeGuard[DTensor]:
    if "torch.distributed.tensor" not in sys.modules:  # then there is none
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(weight, DTensor)


def local(weight: Tensor) -> Tensor:
    """Return this rank's part of a weight, inside autograd. A plain tensor is its own part."""
    if isinstance(weight, FlatPart):
        return weight.part
    return weight.to_local() if is_dtensor(weight) else weight


def storage(weight: Tensor) -> Tensor:
    """Return the plain tensor that stores this rank's part of a weight, outside autograd."""
    return local(weight.detach())


def extent(weight: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return offsets and sizes, in the global weight, of the part this rank stores."""
    if not is_dtensor(weight):
        return (0,) * weight.dim(), tuple(weight.shape)
    (chunk,) = weight.__create_chunk_list__()
    return tuple(chunk.offsets), tuple(chunk.sizes)


def extents(weight: Tensor, layout: Layout) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return what `extent` returns on every rank of one replica, in the order of WITHIN_REPLICA's group."""
    sizes = dict(zip(AXES, layout.shape, strict=True))
    places = itertools.product(*(range(sizes[axis]) for axis in WITHIN_REPLICA))
    if not is_dtensor(weight):
        return [extent(weight) for _ in places]
    mesh, found = weight.device_mesh, []
    cuts = [
        (FLATTENED.get(name, (name,)), ranks, placement.dim)  # type: ignore[attr-defined]
        for name, ranks, placement in zip(mesh.mesh_dim_names or (), mesh.shape, weight.placements, strict=True)
        if not placement.is_replicate()
    ]
    for place in places:
        at = dict(zip(WITHIN_REPLICA, place, strict=True))
        offsets, shape = [0] * weight.dim(), list(weight.shape)
        for axes, ranks, dim in reversed(cuts):  # FSDP2, whose axes come first, cuts what tp and ep have left
            index = 0
            for axis in axes:
                index = index * sizes[axis] + at[axis]
            size = -(-shape[dim] // ranks)  # as torch.chunk: the last parts are smaller, or empty
            begin = min(index * size, shape[dim])
            offsets[dim] += begin
            shape[dim] = min(size, shape[dim] - begin)
        found.append((tuple(offsets), tuple(shape)))
    return found


def boxes(weight: Tensor, part: Tensor) -> list[tuple[tuple[int, ...], Tensor]]:
    """Return this rank's part of a tensor laid out like the weight as boxes: offsets in the global tensor, and views of
    the part. One box, unless the weight is a FlatPart: then whole rows, and pieces of rows before and after them."""
    if isinstance(weight, FlatPart):
        return list(_boxes(tuple(weight.shape), weight.begin, part))
    return [(extent(weight)[0], part)]


def _boxes(shape: tuple[int, ...], begin: int, values: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Cut a range of the entries of a flattened tensor into boxes."""
    if not len(values):
        return
    if len(shape) <= 1:
        yield ((begin,), values) if shape else ((), values[0])
        return
    row = math.prod(shape[1:])
    end = begin + len(values)
    first, last = -(-begin // row), end // row  # the whole rows
    if first > last:  # all inside one row
        yield from (((last, *offsets), box[None]) for offsets, box in _boxes(shape[1:], begin - last * row, values))
        return
    head, body, tail = values.split([first * row - begin, (last - first) * row, end - last * row])
    yield from (((first - 1, *at), box[None]) for at, box in _boxes(shape[1:], begin - (first - 1) * row, head))
    if len(body):
        yield (first, *[0] * (len(shape) - 1)), body.view(-1, *shape[1:])
    yield from (((last, *at), box[None]) for at, box in _boxes(shape[1:], 0, tail))


def indices(weight: Tensor) -> Tensor:
    """Return the flat index in the global weight of each entry of this rank's part: int64, of the part's shape."""
    index = torch.zeros((), dtype=torch.int64, device=weight.device)
    for start, size, whole in zip(*extent(weight), weight.shape, strict=True):
        index = index[..., None] * whole + torch.arange(start, start + size, device=weight.device)
    return index


def like(weight: Tensor, part: Tensor) -> Tensor:
    """Return a tensor sharded like the weight, from this rank's part of it."""
    if isinstance(weight, FlatPart):
        return FlatPart(weight.shape, weight.begin, part)
    if not is_dtensor(weight):
        return part
    return type(weight).from_local(
        part, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )


def whole(weight: Tensor, part: Tensor) -> Tensor:
    """Gather the global tensor, on every rank, from the ranks' parts, sharded like the weight. A collective."""
    if isinstance(weight, FlatPart):  # of all ranks: nothing but data parallelism cuts a weight so
        flat = part.new_zeros(weight.numel())
        flat[weight.begin : weight.begin + len(part)] = part
        dist.all_reduce(flat)
        return flat.view(weight.shape)
    if not is_dtensor(weight):
        return part
    from torch.distributed.tensor import DTensor, Replicate

    mesh, shape, stride = weight.device_mesh, weight.shape, weight.stride()
    left = [Replicate() if mesh.size(axis) == 1 else placed for axis, placed in enumerate(weight.placements)]
    gathered = DTensor.from_local(part, mesh, left, run_check=False, shape=shape, stride=stride)
    for axis in range(mesh.ndim):  # data-parallel axes first: they split what tensor parallelism had left
        left[axis] = Replicate()
        gathered = gathered.redistribute(placements=left)
    return gathered.to_local()


def replicated_axes(weight: Tensor, row: Row) -> set[str]:
    """Return the axes along which ranks hold equal copies of their part of this weight."""
    axes = {axis for axis in AXES if axis != "pp" or row.tied}
    if isinstance(weight, FlatPart):
        return axes - {"dp_replicate"}
    if is_dtensor(weight):
        for name, placement in zip(weight.device_mesh.mesh_dim_names or (), weight.placements, strict=True):
            if not placement.is_replicate():  # not is_shard(), which FSDP2's own kind of shard denies
                axes -= set(FLATTENED.get(name, (name,)))
    return axes


def is_first_replica(weight: Tensor, row: Row, mesh: Mesh) -> bool:
    """Return whether this rank's part of the weight enters sums over all ranks: of equal copies only the first does."""
    return mesh.is_rank0(tuple(replicated_axes(weight, row)))


@torch.no_grad()
def sum_gradients(weights: Mapping[str, Tensor], table: Mapping[str, Row], mesh: Mesh) -> None:
    """Complete the gradients in place: sum each over its row's axes, over the replicas unless FSDP2 has done so, and a
    tied weight's over its two copies.

    To be called after FSDP2's reduction, before which `grad` is not there. One collective an axis, of all its gradients
    in one flat tensor: there are many small ones, norms above all.
    """
    sums = [(mesh.group(axis), [name for name in weights if axis in table[name].sum_over]) for axis in AXES]
    if not mesh.layout.is_sharded:
        sums.append((mesh.group("dp_replicate"), list(weights)))
    if mesh.embedding_group:
        sums.append((mesh.embedding_group, [name for name in weights if table[name].tied]))
    for group, names in sums:
        parts = [local(grad) for name in names if (grad := weights[name].grad) is not None]
        if group.size() > 1 and parts:
            flat = torch.cat([part.reshape(-1) for part in parts])
            dist.all_reduce(flat, group=group)
            totals = flat.split([part.numel() for part in parts])
            torch._foreach_copy_(parts, [total.view_as(part) for total, part in zip(totals, parts, strict=True)])
