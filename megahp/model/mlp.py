"""The MLP of a block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megahp import config
from megahp.parallel.mesh import TensorAxis
from megahp.parallel.tensor import ColumnParallelLinear, RowParallelLinear, enter


class MLP(nn.Module):
    """down(act(up x)), or down(silu(gate x) * up x) for SwiGLU. [b, s, width] -> [b, s, width]."""

    def __init__(self, model: config.Model, axis: TensorAxis) -> None:
        super().__init__()
        self.activation, self.axis = model.activation, axis
        self.up = ColumnParallelLinear(model.width, model.mlp_width, model.bias)
        if model.activation == "swiglu":
            self.gate = ColumnParallelLinear(model.width, model.mlp_width, model.bias)
        self.down = RowParallelLinear(model.mlp_width, model.width, model.bias, axis)

    def forward(self, x: Tensor) -> Tensor:
        x = enter(x, self.axis)
        up = self.up(x)
        if self.activation == "swiglu":
            return self.down(F.silu(self.gate(x)) * up)
        if self.activation == "relu2":
            return self.down(F.relu(up).square())
        return self.down(F.gelu(up, approximate="tanh" if self.activation == "gelu" else "none"))
