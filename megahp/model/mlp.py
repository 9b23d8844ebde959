"""The MLP of a block."""

import torch.nn.functional as F
from torch import Tensor, nn

from megahp.config import ModelConfig
from megahp.parallel.mesh import TensorAxis
from megahp.parallel.tensor import ColumnParallelLinear, RowParallelLinear, enter


class MLP(nn.Module):
    """down(act(up x)), or down(act(gate x) * up x) with a gate. [b, s, width] -> [b, s, width]."""

    def __init__(self, model: ModelConfig, hidden: int, axis: TensorAxis) -> None:
        super().__init__()
        self.activation, self.gated, self.axis = model.activation, model.gated, axis
        self.up = ColumnParallelLinear(model.width, hidden, model.bias)
        if model.gated:
            self.gate = ColumnParallelLinear(model.width, hidden, model.bias)
        self.down = RowParallelLinear(hidden, model.width, model.bias, axis)

    def forward(self, x: Tensor) -> Tensor:
        x = enter(x, self.axis)  # [b, s, width] on every tp rank
        hidden = activate(self.activation, self.up(x), self.gate(x) if self.gated else None)
        return self.down(hidden)  # [b, s, hidden / tp] -> [b, s (/ tp), width]


def activate(kind: str, up: Tensor, gate: Tensor | None = None) -> Tensor:
    """Return the hidden layer of an MLP from its products; SwiGLU and GeGLU have a gate."""
    if gate is not None:
        return up * (F.silu(gate) if kind == "swiglu" else F.gelu(gate, approximate="tanh"))
    if kind == "relu2":
        return F.relu(up).square()
    return F.gelu(up, approximate="tanh" if kind == "gelu" else "none")
