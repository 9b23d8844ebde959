"""Collectives and their adjoints, in pairs, named after what the forward pass does to an activation.

| forward | adjoint |
|---|---|
| `copy_to`: identity | all-reduce |
| `sum_from`: all-reduce | identity |
| `gather_from`: all-gather | reduce-scatter |
| `sum_scatter`: reduce-scatter | all-gather |
| `exchange`: all-to-all | all-to-all the other way |

Each is the identity on a group of one rank. All sum and none averages: losses are divided by the tokens of the whole
global batch before the backward pass, so a sum over ranks is the gradient already.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

Group = dist.ProcessGroup
# torch 2.13 renamed these two and warns at each use of the old names
gather_into = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter_into = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def all_reduce(x: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Return x reduced over the group, in a new tensor. Not differentiable."""
    y = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(y, op, group)
    return y


def all_gather(x: Tensor, dim: int, group: Group) -> Tensor:
    """Return the ranks' x concatenated along dim. Not differentiable."""
    # the collective concatenates along dimension 0 alone, and wants contiguous memory
    x = x.movedim(dim, 0).contiguous()
    y = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    gather_into(y, x, group)
    return y.movedim(0, dim)


def reduce_scatter(x: Tensor, dim: int, group: Group) -> Tensor:
    """Return this rank's slice along dim of the sum of x over the group. Not differentiable."""
    x = x.movedim(dim, 0).contiguous()
    y = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    reduce_scatter_into(y, x, group=group)
    return y.movedim(0, dim)


def all_to_all(x: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Tensor:
    """Send sent[r] consecutive rows of x to each rank r and return the received[r] rows of each. Not differentiable."""
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
    """Return x, of which each rank computes a part of the result; the gradient is summed over the group."""
    return x if group.size() == 1 else _Copy.apply(x, group)


def sum_from(x: Tensor, group: Group) -> Tensor:
    """Return the sum of the ranks' partial results; each gets the gradient unchanged."""
    return x if group.size() == 1 else _Sum.apply(x, group)


def gather_from(x: Tensor, dim: int, group: Group) -> Tensor:
    """Return the ranks' slices concatenated along dim; the gradient is summed and sliced again."""
    return x if group.size() == 1 else _Gather.apply(x, dim, group)


def sum_scatter(x: Tensor, dim: int, group: Group) -> Tensor:
    """Return this rank's slice along dim of the sum of the partial results; the gradient is gathered."""
    return x if group.size() == 1 else _SumScatter.apply(x, dim, group)


def exchange(x: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Tensor:
    """Exchange rows as `all_to_all` does; their gradients return to the ranks that sent them."""
    return x if group.size() == 1 else _Exchange.apply(x, sent, received, group)
