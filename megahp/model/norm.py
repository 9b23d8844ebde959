"""RMSNorm and LayerNorm that measure, in their backward pass, the squared norms of per-example gradients."""

import torch
from torch import Tensor, nn

from megahp import ops
from megahp.ops.engines import Norm
from megahp.parallel.collectives import Group
from megahp.parallel.parameters import Module, Row, local
from megahp.scaling.parameterization import Role


class _Norm(Module):
    """`probe.grad` accumulates sum_b ||dL/d(weight, bias)_b||^2 over the examples b of every backward pass.

    `group` holds the ranks an example's tokens, or the uses of the weight, are spread over: there the per-example
    gradients are summed before they are squared. Without one the norm is a plain module for one process.
    """

    centered: bool

    def __init__(
        self,
        size: int,
        eps: float,
        role: Role,
        sum_over: tuple[str, ...],
        group: Group | None,
        probe: bool,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.group = group.group_name if group and group.size() > 1 else ""
        self.parameter("weight", (size,), Row(role, sum_over=sum_over, start=1.0))
        if bias:
            self.parameter("bias", (size,), Row(role, sum_over=sum_over, start=0.0))
        self.register_parameter("probe", nn.Parameter(torch.zeros(())) if probe else None)
        self.engine: Norm | None = None  # in place of ours; it measures nothing

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = local(self.weight), self._bias()
        if self.engine:
            return self.engine(x, weight, bias, self.eps)
        return ops.normalize(x, weight, bias, self.probe, centered=self.centered, eps=self.eps, group=self.group)

    def add(self, x: Tensor, branch: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        """x + alpha branch, and its norm."""
        if self.engine:
            stream = torch.add(x, branch, alpha=alpha)
            return stream, self(stream)
        weight, bias, probe = local(self.weight), self._bias(), self.probe
        return ops.add_and_normalize(
            x, branch, alpha, weight, bias, probe, centered=self.centered, eps=self.eps, group=self.group
        )

    def _bias(self) -> Tensor | None:
        return local(self.bias) if "bias" in self.rows else None


class RMSNorm(_Norm):
    """x / rms(x) * weight over the last dimension of x [batch, ..., size]."""

    centered = False


class LayerNorm(_Norm):
    """(x - mean) / std * weight + bias over the last dimension of x [batch, ..., size]."""

    centered = True
