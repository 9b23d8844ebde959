"""RMSNorm and LayerNorm that measure, in their backward pass, the squared norms of per-example gradients."""

import torch
from torch import Tensor, nn

from megahp import ops
from megahp.ops.engines import Norm
from megahp.parallel.collectives import Group, copy_to, sum_from
from megahp.parallel.mesh import TensorAxis
from megahp.parallel.parameters import Module, Row, local
from megahp.scaling.parameterization import Role


class _Norm(Module):
    """Normalize the last dimension of x [batch, ..., size].

    `probe.grad` accumulates sum_b ||dL/d(weight, bias)_b||^2 over the examples b of every backward pass. `group` holds
    the ranks that an example's tokens, or the uses of the weight, are spread over: per-example gradients are summed
    over it before they are squared. None: the norm is a plain module of one process.
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
        # by name, which a torch op can take as an argument and a compiled graph can hold
        self.group = group.group_name if group and group.size() > 1 else ""
        self.parameter("weight", (size,), Row(role, sum_over=sum_over, start=1.0))
        if bias:
            self.parameter("bias", (size,), Row(role, sum_over=sum_over, start=0.0))
        # a parameter, not a plain leaf, which would lose its gradient under zero-bubble schedules
        self.register_parameter("probe", nn.Parameter(torch.zeros(())) if probe else None)
        self.engine: Norm | None = None  # computes in place of our op, and measures nothing

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = local(self.weight), local(self.bias) if "bias" in self.rows else None
        if self.engine:
            return self.engine(x, weight, bias, self.eps)
        return ops.normalize(x, weight, bias, self.probe, centered=self.centered, eps=self.eps, group=self.group)

    def add(self, x: Tensor, branch: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        """Return x + alpha branch, and its norm, in one pass over memory."""
        if self.engine:
            stream = torch.add(x, branch, alpha=alpha)
            return stream, self(stream)
        weight, bias = local(self.weight), local(self.bias) if "bias" in self.rows else None
        return ops.add_and_normalize(
            x, branch, alpha, weight, bias, self.probe, centered=self.centered, eps=self.eps, group=self.group
        )


class RMSNorm(_Norm):
    """x / rms(x) * weight over the last dimension of x [batch, ..., size]."""

    centered = False


class LayerNorm(_Norm):
    """(x - mean) / std * weight + bias over the last dimension of x [batch, ..., size]."""

    centered = True


class HeadsNorm(Module):
    """x / rms(x) * weight over all heads together, which tp splits; x [b, s, heads of this rank, size]. (OLMo 2, arXiv
    2501.00656) It measures nothing.

    With fewer heads than tp ranks several ranks hold copies of one.
    """

    def __init__(self, heads: int, size: int, eps: float, axis: TensorAxis) -> None:
        super().__init__()
        self.heads, self.eps, self.axis = heads, eps, axis
        # whole on every rank, which uses its own heads' part: so its gradient is summed over tp, always
        self.parameter("weight", (heads * size,), Row(Role.NORM, sum_over=("tp",), start=1.0))

    def forward(self, x: Tensor) -> Tensor:
        count, copies = x.shape[2], max(1, self.axis.size // self.heads)
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = sum_from(precise.square().sum((2, 3), keepdim=True), self.axis.group) / copies
        # each rank's result depends on the sum: its gradient is summed too
        mean = copy_to(squares, self.axis.group) / (self.heads * x.shape[3])
        first = self.axis.rank // copies * count
        weight = local(self.weight).view(self.heads, -1)[first : first + count]
        return ((precise * (mean + self.eps).rsqrt()) * weight).to(x.dtype)
