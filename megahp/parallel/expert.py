"""Expert parallelism: tokens travel to the ranks that hold their experts, and what these make of them travels back.

No token is dropped, whatever the load, and every sum is in an order of its own, so results are the same at each run.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from megahp.parallel.collectives import all_to_all, exchange
from megahp.parallel.mesh import Axis

Experts = Callable[[Tensor, list[int]], Tensor]


def apply_experts(experts: Experts, x: Tensor, chosen: Tensor, load: Tensor, axis: Axis) -> Tensor:
    """What each token's experts make of it.

    Args:
        experts: of rows [m, width], in the order of this rank's experts, and how many rows each one has (which may be
            none), makes [m, width].
        x: tokens [n, width] of any floating dtype.
        chosen: [n, k], int64: numbers of each token's experts, of all there are.
        load: [experts], int64: how often each is in `chosen`.
        axis: the ranks the experts are dealt to in equal runs.

    Returns:
        [n, k, width].
    """
    order = chosen.flatten().argsort(stable=True)
    rows = _rearrange(x, order, copies=chosen.shape[1])
    out = _elsewhere(experts, rows, load, axis) if axis.size > 1 else experts(rows, load.tolist())
    return _rearrange(out, _inverse(order)).unflatten(0, chosen.shape)


def _elsewhere(experts: Experts, rows: Tensor, load: Tensor, axis: Axis) -> Tensor:
    """The same of rows sorted by expert, each computed on the rank that holds it."""
    sent = load.unflatten(0, (axis.size, -1))  # by rank, by its experts
    received = all_to_all(sent, [1] * axis.size, [1] * axis.size, axis.group)  # from each rank, for this one's experts
    by_rank, from_rank = torch.stack((sent, received)).tolist()  # one wait for the device, before anything is queued
    there, here = [sum(counts) for counts in by_rank], [sum(counts) for counts in from_rank]
    arrived = exchange(rows, there, here, axis.group)  # from one rank after the other, each sorted by expert
    numbers = torch.arange(received.shape[1], device=rows.device).repeat(axis.size)
    order = numbers.repeat_interleave(received.flatten(), output_size=sum(here)).argsort(stable=True)
    out = experts(_rearrange(arrived, order), [sum(counts) for counts in zip(*from_rank, strict=True)])
    return exchange(_rearrange(out, _inverse(order)), here, there, axis.group)


class _Rearrange(Function):
    """x[order // copies]. An index's own gradient would add up a row's copies in any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.copies = copies
        return x[order // copies]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grads[0][_inverse(order)].unflatten(0, (-1, ctx.copies)).sum(1), None, None


def _rearrange(x: Tensor, order: Tensor, copies: int = 1) -> Tensor:
    """Rows of x [n, width], of which there are first made so many copies each, in this order [n copies]."""
    return _Rearrange.apply(x, order, copies)


def _inverse(order: Tensor) -> Tensor:
    """The order that undoes this one."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
