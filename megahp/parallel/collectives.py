"""Collectives with their adjoints: each pair stands together, named by what it does to an activation.

Every function is the identity on a group of one. Sums are sums: nothing here averages.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

Group = dist.ProcessGroup
# torch 2.13 gave these two new names, and warns at each use of the old
gather_into = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter_into = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def all_reduce(x: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """A new tensor: x reduced over the group. Not differentiable."""
    y = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(y, op, group)
    return y


def all_gather(x: Tensor, dim: int, group: Group) -> Tensor:
    """The ranks' x, concatenated along dim. Not differentiable."""
    x = x.movedim(dim, 0).contiguous()
    y = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    gather_into(y, x, group)
    return y.movedim(0, dim)


def reduce_scatter(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's slice along dim of x summed over the group. Not differentiable."""
    x = x.movedim(dim, 0).contiguous()
    y = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    reduce_scatter_into(y, x, group=group)
    return y.movedim(0, dim)


def all_to_all(x: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Tensor:
    """So many rows of x, from its first on, sent to each rank, for so many received from each. Not differentiable."""
    y = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(y, x.contiguous(), received, sent, group)
    return y


class _Copy(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0], ctx.group), None


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return all_gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter(grads[0], ctx.dim, ctx.group), None, None


class _SumScatter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return reduce_scatter(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(grads[0], ctx.dim, ctx.group), None, None


class _Exchange(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return all_to_all(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return all_to_all(grads[0], ctx.received, ctx.sent, ctx.group), None, None, None


def copy_to(x: Tensor, group: Group) -> Tensor:
    """Identity; the gradient is summed over the group, whose ranks each use x for a part of the work."""
    return x if group.size() == 1 else _Copy.apply(x, group)


def sum_from(x: Tensor, group: Group) -> Tensor:
    """Sum of the ranks' parts; the gradient goes to every part unchanged."""
    return x if group.size() == 1 else _Sum.apply(x, group)


def gather_from(x: Tensor, dim: int, group: Group) -> Tensor:
    """The ranks' slices put together along dim; the gradient is summed and sliced again."""
    return x if group.size() == 1 else _Gather.apply(x, dim, group)


def sum_scatter(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's slice along dim of the sum of the parts; the gradient is put together again."""
    return x if group.size() == 1 else _SumScatter.apply(x, dim, group)


def exchange(x: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Tensor:
    """`all_to_all`; the rows' gradients go back to where they came from."""
    return x if group.size() == 1 else _Exchange.apply(x, sent, received, group)
