"""Tensor-parallel layers: Megatron's column, row and vocabulary splits, computed on local shards.

Activations are [batch, sequence, width]. Between `enter` and `leave` a rank computes its heads or columns; outside,
every rank holds the whole residual stream, or with sequence parallelism its slice of the sequence. Each weight's Row
declares whether its gradient is partial and summed over tp: that of a split weight is complete; that of a weight
outside the products is partial where the sequence is split.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megahp.ops.engines import Linear
from megahp.parallel.collectives import copy_to, gather_from, sum_from, sum_scatter
from megahp.parallel.context import shard_sequence
from megahp.parallel.mesh import TensorAxis
from megahp.parallel.parameters import Module, Row, local
from megahp.scaling.parameterization import Role

SEQUENCE = 1  # the dimension that sequence parallelism splits


def enter(x: Tensor, axis: TensorAxis) -> Tensor:
    """Make x whole on every tp rank, the input of column-parallel layers. [b, s or s/tp, d] -> [b, s, d]."""
    return gather_from(x, SEQUENCE, axis.group) if axis.sequence_parallel else copy_to(x, axis.group)


def leave(x: Tensor, axis: TensorAxis) -> Tensor:
    """Sum the tp ranks' partial results. [b, s, d] -> [b, s or s/tp, d]."""
    return sum_scatter(x, SEQUENCE, axis.group) if axis.sequence_parallel else sum_from(x, axis.group)


class ColumnParallelLinear(Module):
    """Compute y = x W^T (+ b), the outputs split over tp. x: from `enter`. W: [outputs, inputs]."""

    def __init__(
        self, inputs: int, outputs: int, bias: bool, role: Role = Role.HIDDEN, fused: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.linear: Linear = F.linear
        self.parameter("weight", (outputs, inputs), Row(role, tp_dim=0, fused=fused))
        if bias:
            self.parameter("bias", (outputs,), Row(Role.BIAS, tp_dim=0, start=0.0))

    def forward(self, x: Tensor) -> Tensor:
        bias = local(self.bias).to(x.dtype) if "bias" in self.rows else None
        return self.linear(x, local(self.weight).to(x.dtype), bias)


class RowParallelLinear(Module):
    """Compute y = leave(x W^T) (+ b), the inputs split over tp: the end of a branch. W: [outputs, inputs]."""

    def __init__(self, inputs: int, outputs: int, bias: bool, axis: TensorAxis) -> None:
        super().__init__()
        self.axis = axis
        self.linear: Linear = F.linear
        self.parameter("weight", (outputs, inputs), Row(Role.HIDDEN, tp_dim=1, ends_branch=True))
        if bias:
            self.parameter("bias", (outputs,), Row(Role.BIAS, sum_over=axis.sum_over, start=0.0))

    def forward(self, x: Tensor) -> Tensor:
        y = leave(self.linear(x, local(self.weight).to(x.dtype), None), self.axis)
        # after the sum: before it, the bias would be added once for every tp rank
        return y + local(self.bias).to(x.dtype) if "bias" in self.rows else y


class VocabParallelEmbedding(Module):
    """Look up rows of a [vocabulary, width] matrix split over tp by vocabulary. ids [b, s] -> [b, s or s/tp, width]."""

    def __init__(self, vocabulary: int, width: int, axis: TensorAxis, tied: bool) -> None:
        super().__init__()
        self.axis = axis
        self.parameter("weight", (vocabulary, width), Row(Role.EMBEDDING, tp_dim=0, tied=tied))

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        weight = local(self.weight)
        if weight.dtype.itemsize < 4:  # the gradient adds a row's uses one by one, which half precision would swallow
            weight = weight.float()
        if self.axis.size == 1:
            return F.embedding(ids, weight).to(dtype)
        ids = ids - self.axis.rank * weight.shape[0]
        is_remote = (ids < 0) | (ids >= weight.shape[0])
        x = F.embedding(ids.masked_fill(is_remote, 0), weight).to(dtype)
        return leave(x.masked_fill(is_remote[..., None], 0), self.axis)  # each token is a row of one rank, 0 elsewhere


class PositionEmbedding(Module):
    """Return the rows of a learned [longest, width] matrix for this rank's tokens of start .. length; with sequence
    parallelism, its slice of them. [s or s/tp, width]."""

    def __init__(self, longest: int, width: int, axis: TensorAxis) -> None:
        super().__init__()
        self.axis = axis
        self.parameter("weight", (longest, width), Row(Role.EMBEDDING, sum_over=axis.sum_over))

    def forward(self, start: int, length: int, dtype: torch.dtype) -> Tensor:
        rows = shard_sequence(local(self.weight)[start:length].to(dtype), 0, self.axis.context)
        return rows.chunk(self.axis.size)[self.axis.rank] if self.axis.sequence_parallel else rows
