"""Unembedding and cross-entropy in one, a slice of the vocabulary at a time: large logits are never all held."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megahp.ops.compiler import uncompiled
from megahp.parallel.collectives import all_reduce
from megahp.parallel.logits import KEPT, rows_at_once
from megahp.parallel.mesh import Axis


@dataclass(frozen=True)
class Teachers:
    """The predictions of other models for the same tokens, the mean of their probabilities: what each one's unembedding
    multiplies, and that.

    weight: their share in the targets' distribution, above 0 and at most 1; the targets themselves have the rest.
    vocabulary: the rows, of all ranks, that the probabilities are over, the first. Of each teacher: x, [..., its
    width], as the student's; this rank's rows, [rows / tp, its width]; softcap.
    """

    weight: float
    vocabulary: int
    x: Sequence[Tensor]
    rows: Sequence[Tensor]
    softcaps: Sequence[float]


@uncompiled  # compiled, forward's and backward's logits would be merged, and all of them kept
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    axis: Axis,
    softcap: float = 0.0,
    vocabulary: int | None = None,
    levels: Sequence[int] = (),
    teachers: Teachers | None = None,
) -> Tensor:
    """Return per-token losses in nats, log sum exp(x W^T) - (x W^T)[target], holding at most KEPT bytes of x W^T.

    With teachers it is the cross-entropy with soft targets: (x W^T)[target] becomes its mean over the ids by
    (1 - weight) one-hot(target) + weight p, p being the mean of the teachers' probabilities (distillation: Hinton et
    al., arXiv 1503.02531, at a temperature of 1). The gradient is that of weight KL(p || student) and (1 - weight)
    times the plain loss; the value is larger, by weight times the entropy of p.

    Args:
        x: [..., width], whole on every tp rank (from `enter`, whose adjoint sums the ranks' gradients); fp64, fp32,
            bf16 or fp16.
        weight: [rows / tp, width], this rank's rows, of any floating dtype; multiplied in x's.
        targets: [...], int64 in 0 .. vocabulary, which is not checked.
        axis: the ranks that the vocabulary is split over.
        softcap: of the logits, see `cap`; 0 = none.
        vocabulary: the rows, of all ranks, that the sum is over, the first; the others pad the matrix, and have no
            gradient. None = all.
        levels: the sum is over the target's level alone, see `level_of`; empty = over all ids.
        teachers: with as many rows, and the same levels; they get no gradient.

    Returns:
        Losses [...], and so all sums, in fp32; in fp64 for fp64 x. Can be differentiated once.
    """
    flat, first = targets.flatten(), axis.rank * len(weight)
    own = len(weight) if vocabulary is None else min(vocabulary - first, len(weight))
    ends = level_of(flat, levels) - first if levels else None
    soft = _SoftTargets(teachers, axis, ends) if teachers else None
    losses = _LinearCrossEntropy.apply(x.flatten(0, -2), weight, flat, axis, softcap, own, ends, soft)
    return losses.view_as(targets).clone()  # FSDP2 hooks on to a module's output, which must not be a view


def cap(logits: Tensor, softcap: float) -> Tensor:
    """Return softcap tanh(logits / softcap). (Gemma 2, arXiv 2408.00118, section 2)"""
    return softcap * torch.tanh(logits / softcap)


def level_of(targets: Tensor, levels: Sequence[int]) -> Tensor:
    """Return the first id of each target's level, and the one after its last (int64 [..., 2]). levels: how many of the
    first ids each has; an id beyond them all is a level of its own, so that its loss is 0."""
    first, after, begin = targets, targets + 1, 0
    for size in levels:
        inside = (targets >= begin) & (targets < begin + size)
        first, after = first.masked_fill(inside, begin), after.masked_fill(inside, begin + size)
        begin += size
    return torch.stack((first, after), -1)


def outside(logits: Tensor, ends: Tensor, start: int = 0) -> Tensor:
    """Return which of logits [..., ids], of ids from `start` on, are outside `level_of` the targets, bool."""
    ids = torch.arange(start, start + logits.shape[-1], device=logits.device)
    return (ids < ends[..., :1]) | (ids >= ends[..., 1:])


class _LinearCrossEntropy(Function):
    """x [n, width], weight [rows / tp, width], targets [n] -> losses [n]. own: this rank's rows that the sum is over, 0
    or less where it holds none. ends: [n, 2] or None, the rows of each target's level, counted as this rank's.

    Forward keeps each token's largest logit and sum of exponentials, rescaled as larger ones come (Milakov and
    Gimelshein, arXiv 1805.02867), and up to KEPT bytes of logits. More of them backward computes again, to the same
    bits, as Cut Cross-Entropy does (arXiv 2411.09009): four matrix products for the plain path's three. To compute
    gradients in forward, as Liger does (arXiv 2410.10989), would save the fourth, but the weight's gradient sums over
    tokens, and the losses' gradients, which may differ by token, are not known before backward.

    Slices are of the vocabulary, not of the tokens: a row of the weight's gradient is then one product over all tokens,
    as in the plain path, and needs no [vocabulary, width] accumulator in fp32. Only x's gradient is a sum over slices,
    in fp32. Ranks communicate twice in forward and not at all in backward, however many slices there are.

    Rows that pad are multiplied too, since products of sizes that are multiples of 128 are the fast ones, and masked
    where the logits are made: the last columns of the last slice.

    soft: teachers' probabilities, computed a slice at a time in forward, and again in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        axis: Axis,
        softcap: float,
        own: int,
        ends: Tensor | None,
        soft: "_SoftTargets | None",
    ) -> Tensor:
        targets = targets - axis.rank * len(weight)
        keeps = len(x) * len(weight) * x.element_size() <= KEPT
        kept = []
        dtype = torch.promote_types(x.dtype, torch.float32)
        # not -inf, which a slice or rank that holds none of a target's ids would subtract from itself
        largest = x.new_full(targets.shape, torch.finfo(dtype).min, dtype=dtype)
        total, target_logit = torch.zeros_like(largest), torch.zeros_like(largest)
        soft_logit = torch.zeros_like(largest) if soft else largest
        for start, rows, index, is_target in _slices(x, weight, targets):
            products = F.linear(x, rows)
            kept += [products] if keeps else []
            logits = products.to(total.dtype, copy=keeps)  # what is kept must not be changed below
            logits = cap(logits, softcap) if softcap else logits
            if soft:  # before the mask: 0 times -inf would be NaN
                soft_logit += (soft.chances(start, len(rows)) * logits).sum(1)
            _mask(logits, start, own, ends)
            target_logit = logits.gather(1, index).squeeze(1).where(is_target, target_logit)
            before, largest = largest, largest.maximum(logits.amax(1))
            total = total * (before - largest).exp() + logits.sub_(largest[:, None]).exp_().sum(1)
        if soft:
            target_logit = torch.lerp(target_logit, soft_logit, soft.weight)
        if axis.size > 1:  # the maximum must be known to all before the sums, which are relative to it, can be added
            before, largest = largest, all_reduce(largest, axis.group, dist.ReduceOp.MAX)
            total, target_logit = all_reduce(torch.stack((total * (before - largest).exp(), target_logit)), axis.group)
        ctx.softcap, ctx.own, ctx.ends, ctx.soft = softcap, own, ends, soft
        ctx.save_for_backward(x, weight, targets, largest, total, *kept)
        return total.log() - (target_logit - largest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None, None, None]:
        x, weight, targets, largest, total, *kept = ctx.saved_tensors
        scale = (grads[0] / total)[:, None]
        hard = grads[0] * (1 - ctx.soft.weight) if ctx.soft else grads[0]
        grad_x, grad_weight = torch.zeros_like(x, dtype=total.dtype), torch.empty_like(weight)
        for number, (start, rows, index, is_target) in enumerate(_slices(x, weight, targets)):
            # d loss / d logits = softmax - one-hot(target), or - the soft targets' distribution
            products = kept[number] if kept else F.linear(x, rows)
            logits = products.to(total.dtype, copy=bool(kept))
            if ctx.softcap:
                logits = cap(logits, ctx.softcap)
                slope = 1 - (logits / ctx.softcap).square()
            _mask(logits, start, ctx.own, ctx.ends)
            grad = logits.sub_(largest[:, None]).exp_().mul_(scale)
            grad = grad.scatter_add_(1, index, -hard.where(is_target, 0)[:, None])
            if ctx.soft:
                grad -= ctx.soft.chances(start, len(rows)) * (ctx.soft.weight * grads[0])[:, None]
            grad = (grad * slope if ctx.softcap else grad).to(x.dtype)
            grad_x += grad @ rows
            grad_weight[start : start + len(rows)] = grad.T @ x
        return grad_x.to(x.dtype), grad_weight, None, None, None, None, None, None


class _SoftTargets:
    """The mean of the teachers' probabilities, a slice of this rank's rows at a time. What each one's exponentials are
    divided by, their sum over the vocabulary, is found first, in slices too."""

    def __init__(self, teachers: Teachers, axis: Axis, ends: Tensor | None) -> None:
        self.weight, self.ends = teachers.weight, ends
        self.own = min(teachers.vocabulary - axis.rank * len(teachers.rows[0]), len(teachers.rows[0]))
        self.softcaps, self.rows, self.x = teachers.softcaps, teachers.rows, [x.flatten(0, -2) for x in teachers.x]
        # the loss of a target that is no id, whose logit counts as 0, is the logarithm of the sum
        none = [torch.full((len(x),), -1, device=x.device) for x in self.x]
        self.log_sums = [
            _LinearCrossEntropy.apply(x, rows, targets, axis, softcap, self.own, ends, None)
            for x, rows, softcap, targets in zip(self.x, self.rows, self.softcaps, none, strict=True)
        ]

    def chances(self, start: int, count: int) -> Tensor:
        """Return the probabilities of the rows from `start` on, [n, count], 0 for those that are masked."""
        total = torch.zeros((), device=self.x[0].device)
        for x, rows, softcap, log_sum in zip(self.x, self.rows, self.softcaps, self.log_sums, strict=True):
            logits = F.linear(x, rows[start : start + count].to(x.dtype)).to(log_sum.dtype)
            logits = cap(logits, softcap) if softcap else logits
            _mask(logits, start, self.own, self.ends)
            total = total + logits.sub_(log_sum[:, None]).exp_()
        return total / len(self.x)


def _mask(logits: Tensor, start: int, own: int, ends: Tensor | None) -> None:
    """Take the rows that pad the vocabulary, from `own` on, and those outside a target's level out of the softmax, in
    place. logits: [n, ids], of rows from `start` on."""
    if own < start + logits.shape[1]:
        logits[:, max(own - start, 0) :] = -torch.inf
    if ends is not None:
        logits.masked_fill_(outside(logits, ends, start), -torch.inf)


def _slices(x: Tensor, weight: Tensor, targets: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Yield slices of the weight: its first row's index; the rows in x's dtype; the position of each target in them,
    [n, 1], 0 where it is in another slice; and whether it is in this one, [n]."""
    size = rows_at_once(*x.shape)
    for start in range(0, len(weight), size):
        rows, index = weight[start : start + size].to(x.dtype), targets - start
        is_target = (index >= 0) & (index < len(rows))
        yield start, rows, index.where(is_target, 0)[:, None], is_target
