"""Expert parallelism: tokens travel to the ranks that hold their experts, and the results travel back.

No token is dropped, whatever the load, and every sum has a fixed order, so that repeated runs agree to the last bit.
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
    """Return the outputs of each token's experts, [n, k, width].

    Args:
        experts: maps rows [m, width], sorted by this rank's experts, and the number of rows of each (which may be 0) to
            [m, width].
        x: tokens [n, width] of any floating dtype.
        chosen: [n, k], int64: global indices of each token's experts.
        load: [experts], int64: how often each occurs in `chosen`.
        axis: the ranks, each of which holds experts / ranks consecutive ones.
    """
    # stable, or equal indices could come in another order on another device
    order = chosen.flatten().argsort(stable=True)
    rows = _Permute.apply(x, order, chosen.shape[1])  # [n k, width], sorted by expert
    out = experts(rows, load.tolist()) if axis.size == 1 else _exchange_and_apply(experts, rows, load, axis)
    return _Permute.apply(out, _inverse(order), 1).unflatten(0, chosen.shape)


def _exchange_and_apply(experts: Experts, rows: Tensor, load: Tensor, axis: Axis) -> Tensor:
    """Return the experts' outputs of rows sorted by expert, each computed on the rank that holds its expert."""
    sent = load.unflatten(0, (axis.size, -1))  # [rank, its expert]
    received = all_to_all(sent, [1] * axis.size, [1] * axis.size, axis.group)  # [source rank, local expert]
    # the host must know the sizes: one wait for the device, before anything is queued behind it
    sent_counts, received_counts = torch.stack((sent, received)).tolist()
    outgoing, incoming = [sum(counts) for counts in sent_counts], [sum(counts) for counts in received_counts]
    arrived = exchange(rows, outgoing, incoming, axis.group)  # by source rank, of each sorted by expert
    # the experts want all ranks' rows of one expert together; those of one rank stay in order
    local_experts = torch.arange(received.shape[1], device=rows.device).repeat(axis.size)
    order = local_experts.repeat_interleave(received.flatten(), output_size=sum(incoming)).argsort(stable=True)
    counts = [sum(counts) for counts in zip(*received_counts, strict=True)]
    out = _Permute.apply(experts(_Permute.apply(arrived, order, 1), counts), _inverse(order), 1)
    return exchange(out, incoming, outgoing, axis.group)


class _Permute(Function):
    """x[order // copies]: the rows of x [n, width], repeated `copies` times each, in this order [n copies].

    The gradient of torch's own indexing would add up the copies of a row in any order, not the same in each run.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.copies = copies
        return x[order // copies]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grads[0][_inverse(order)].unflatten(0, (-1, ctx.copies)).sum(1), None, None


def _inverse(order: Tensor) -> Tensor:
    """Return the permutation that undoes `order`."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
