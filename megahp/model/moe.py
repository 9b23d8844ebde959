"""Mixture of experts: a router sends each token to a few of a block's MLPs.

Routing is by token and drops none, and the balance loss is each sequence's own, so an example's gradient depends on no
other example of its batch; what the load of earlier batches did to the selection is a constant within a step. Norms see
all tokens of all examples, as in a dense model. So a norm's per-example gradients, and the noise scale, are what they
are there: gradients of the example's loss, its balance loss included, with the routing that it had.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from megahp.config import ModelConfig
from megahp.model.mlp import MLP, activate
from megahp.parallel.collectives import all_reduce
from megahp.parallel.expert import apply_experts
from megahp.parallel.mesh import TensorAxis
from megahp.parallel.parameters import Module, Row, local
from megahp.parallel.tensor import enter, leave
from megahp.scaling.parameterization import Role


class MoE(nn.Module):
    """The sum of a token's experts' outputs by their weights, and of the shared experts'. [b, s, width] -> the same.

    Every tp rank routes all tokens alike and computes its part of every expert that its ep rank holds.
    """

    def __init__(self, model: ModelConfig, axis: TensorAxis) -> None:
        super().__init__()
        self.axis = axis
        self.router = Router(model, axis)
        self.experts = Experts(model)
        self.shared = MLP(model, model.shared_experts * model.expert_width, axis) if model.shared_experts else None

    def forward(self, x: Tensor) -> Tensor:
        y = leave(self._routed(enter(x, self.axis)), self.axis)
        return y + self.shared(x) if self.shared else y

    @torch.compiler.disable  # how many rows an expert has is known on the host alone
    def _routed(self, x: Tensor) -> Tensor:
        weights, chosen, load = self.router(x)
        out = apply_experts(self.experts, x.flatten(0, 1), chosen.flatten(0, 1), load, self.axis.experts)
        return (out * weights.flatten(0, 1)[..., None].to(x.dtype)).sum(1).view_as(x)


class Router(Module):
    """Chooses each token's experts: x [b, s, width], whole on every tp rank -> their weights [b, s, k], in fp32 (fp64
    for fp64 x), their numbers [b, s, k], and how often each one was chosen, [experts].

    `bias` is added to the scores where experts are chosen, and nowhere else; `rebalance` moves it after a step.
    (Auxiliary-loss-free balancing, arXiv 2408.15664.)

    The balance loss of a sequence is sum_i f_i P_i, f_i the expert's part of the sequence's choices over its fair part,
    without gradient, P_i its mean part of the tokens' scores: 1 where balanced. (DeepSeek-V3, arXiv 2412.19437, eq. 17
    to 20.) It counts as if `coefficient` times it were added to the loss of each of the sequence's tokens; `unit`, the
    gradient of one token's loss, is what an engine makes of that and sets before a backward pass.

    `probe.grad` holds, added up over backward passes, how often each expert was chosen and, last, this rank's part of
    the sum of the sequences' balance losses; so what is computed again, or without gradients, counts for nothing.
    """

    probe: nn.Parameter

    def __init__(self, model: ModelConfig, axis: TensorAxis) -> None:
        super().__init__()
        self.axis, self.experts_per_token = axis, model.experts_per_token
        self.score, self.normalize, self.scale = model.router_score, model.router_normalize, model.router_scale
        self.rate, self.coefficient, self.unit = model.balance_rate, model.balance_loss, 0.0
        # the weights meet a tp rank's part of what experts put out, so their gradient is a part of a sum too
        self.parameter("weight", (model.experts, model.width), Row(Role.ROUTER, sum_over=("tp",)))
        self.probe = nn.Parameter(torch.zeros(model.experts + 1))
        self.register_buffer("bias", torch.zeros(model.experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        precise = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(precise), local(self.weight).to(x.dtype).to(precise))
        scores = logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()
        chosen = (scores.detach() + self.bias).topk(self.experts_per_token).indices
        weights = scores.gather(-1, chosen)
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # sigmoids may all have underflown
        counts = torch.zeros_like(scores[:, 0], dtype=torch.int64)  # [b, experts]
        counts.scatter_add_(1, chosen.flatten(1), torch.ones_like(chosen.flatten(1)))
        return _Beside.apply(weights * self.scale, self._beside(scores, counts)), chosen, counts.sum(0)

    @torch.no_grad()
    def rebalance(self, load: Tensor) -> None:
        """Favour experts that got less than the mean; load [experts]: how often each was chosen in the global batch. A
        router that is not trained stays as it is."""
        if self.rows["weight"].trained:
            self.bias.add_(self.rate * (load.mean() - load).sign())

    def _beside(self, scores: Tensor, counts: Tensor) -> Tensor:
        """A scalar whose gradients are those of the balance loss, and what `probe` is to hold."""
        length = scores.shape[1] * self.axis.context.size
        choices = all_reduce(counts, self.axis.context.group) if self.axis.context.size > 1 else counts
        over_fair = choices.to(scores.dtype) * (counts.shape[1] / (self.experts_per_token * length))
        parts = scores / scores.sum(-1, keepdim=True)
        loss = (over_fair * parts.sum(1)).sum() / length
        counted = torch.cat((counts.sum(0), loss.detach()[None]))
        # every tp rank does this, and their gradients are summed
        return (self.probe * counted).sum() + self.coefficient * self.unit * length / self.axis.size * loss


def routers(model: nn.Module) -> dict[str, Router]:
    """The routers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Router)}


class Experts(Module):
    """The MLPs of this rank's experts, their matrices as one: of rows x [n, width] in the experts' order, and how many
    each has, makes [n, width], under tp a part of a sum.

    One after the other: torch's grouped products are neither for fp64 nor for every width.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.activation = model.activation
        count, width, hidden = model.experts, model.width, model.expert_width
        self.parameter("down", (count, width, hidden), Row(Role.HIDDEN, tp_dim=2, experts=True))
        for name in ("up", "gate") if model.activation == "swiglu" else ("up",):
            self.parameter(name, (count, hidden, width), Row(Role.HIDDEN, tp_dim=1, experts=True))

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        matrices = (local(getattr(self, name)).to(x.dtype).unbind() for name in self.rows)
        return torch.cat([self._mlp(*each) for each in zip(x.split(counts), *matrices, strict=True)])

    def _mlp(self, x: Tensor, down: Tensor, *into: Tensor) -> Tensor:
        return F.linear(activate(self.activation, *(F.linear(x, matrix) for matrix in into)), down)


class _Beside(Function):
    """x; but `side`, a scalar, gets the gradient 1 in the backward pass, as if added to what is differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, side: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0].new_ones(())
