"""The MLP of a block."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megahp.config import ModelConfig
from megahp.parallel.mesh import TensorAxis
from megahp.parallel.parameters import Module, Row, local
from megahp.parallel.tensor import ColumnParallelLinear, RowParallelLinear, enter
from megahp.scaling.parameterization import Role

XIELU_BETA = 0.5  # the slope at 0


class MLP(Module):
    """down(act(up x)), or down(act(gate x) * up x) with a gate. [b, s, width] -> [b, s, width].

    xIELU (arXiv 2411.13010) learns the curvatures on both sides of 0, `alpha_p` and `alpha_n`, before a softplus.
    """

    def __init__(self, model: ModelConfig, hidden: int, axis: TensorAxis) -> None:
        super().__init__()
        self.activation, self.gated, self.axis = model.activation, model.gated, axis
        self.up = ColumnParallelLinear(model.width, hidden, model.bias)
        if model.gated:
            self.gate = ColumnParallelLinear(model.width, hidden, model.bias)
        self.down = RowParallelLinear(hidden, model.width, model.bias, axis)
        if model.activation == "xielu":
            for name, start in (("alpha_p", 0.8), ("alpha_n", 0.8 - XIELU_BETA)):
                # every tp rank applies it to its own hidden units
                row = Row(Role.BIAS, sum_over=("tp",), start=math.log(math.expm1(start)))
                self.parameter(name, (1,), row)

    def forward(self, x: Tensor) -> Tensor:
        x = enter(x, self.axis)  # [b, s, width] on every tp rank
        alphas = [local(getattr(self, name)) for name in self.rows]
        hidden = activate(self.activation, self.up(x), self.gate(x) if self.gated else None, alphas)
        return self.down(hidden)  # [b, s, hidden / tp] -> [b, s (/ tp), width]


def activate(kind: str, up: Tensor, gate: Tensor | None = None, alphas: Sequence[Tensor] = ()) -> Tensor:
    """Return the hidden layer of an MLP from its products; SwiGLU and GeGLU have a gate, xIELU two alphas."""
    if gate is not None:
        return up * (F.silu(gate) if kind == "swiglu" else F.gelu(gate, approximate="tanh"))
    if kind == "relu2":
        return F.relu(up).square()
    if kind == "xielu":
        return xielu(up, *alphas)
    return F.gelu(up, approximate="tanh" if kind == "gelu" else "none")


def xielu(x: Tensor, alpha_p: Tensor, alpha_n: Tensor) -> Tensor:
    """Return p x^2 + x / 2 where x > 0, else n (exp(x) - 1 - x) + x / 2; p and n from alpha_p and alpha_n, [1]."""
    p, n = F.softplus(alpha_p).to(x.dtype), (XIELU_BETA + F.softplus(alpha_n)).to(x.dtype)
    # exp of a large x, whose branch is not taken, would be infinite, and its gradient NaN
    return torch.where(x > 0, p * x * x, n * (torch.expm1(x.clamp(max=0)) - x)) + XIELU_BETA * x
