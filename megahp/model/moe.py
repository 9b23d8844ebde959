"""Mixture of experts: a router sends each token to a few of a block's MLPs.

Routing is by token and drops none, and the balance loss is each sequence's own, so an example's gradient depends on no
other example of its batch; the selection bias, moved by the load of earlier batches, is a constant within a step. Norms
see all tokens of all examples, as in a dense model. So a norm's per-example gradients, and the noise scale, mean what
they mean there: gradients of the example's loss, its balance loss included, with the routing that it had.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from megahp.config import ModelConfig
from megahp.model.mlp import MLP, activate
from megahp.ops.compiler import uncompiled
from megahp.parallel.collectives import all_reduce
from megahp.parallel.expert import apply_experts
from megahp.parallel.mesh import TensorAxis
from megahp.parallel.parameters import Module, Row, local
from megahp.parallel.tensor import enter, leave
from megahp.scaling.parameterization import Role


class MoE(nn.Module):
    """Add up a token's experts' outputs by their weights, and the shared experts'. [b, s, width] -> [b, s, width].

    Every tp rank routes all tokens alike and computes its part of every expert that its ep rank holds.
    """

    def __init__(self, model: ModelConfig, axis: TensorAxis) -> None:
        super().__init__()
        self.axis = axis
        self.router = Router(model, axis)
        self.experts = Experts(model)
        self.shared = MLP(model, model.shared_experts * model.expert_width, axis) if model.shared_experts else None

    def forward(self, x: Tensor, loss_weight: Tensor) -> Tensor:
        y = leave(self._routed(enter(x, self.axis), loss_weight), self.axis)
        return y + self.shared(x) if self.shared else y

    @uncompiled  # the number of rows of an expert is data: the host must read it before the products
    def _routed(self, x: Tensor, loss_weight: Tensor) -> Tensor:
        weights, chosen, load = self.router(x, loss_weight)  # [b, s, k], [b, s, k], [experts]
        out = apply_experts(self.experts, x.flatten(0, 1), chosen.flatten(0, 1), load, self.axis.experts)
        return (out * weights.flatten(0, 1)[..., None].to(x.dtype)).sum(1).view_as(x)  # out: [b s, k, width]


class Router(Module):
    """Choose each token's experts: x [b, s, width], whole on every tp rank -> their weights [b, s, k], in fp32 (fp64
    for fp64 x), their indices [b, s, k], and how often each expert was chosen, [experts].

    `bias` is added to the scores where experts are chosen, and nowhere else; `rebalance` moves it after a step.
    (Auxiliary-loss-free balancing, arXiv 2408.15664)

    The balance loss of a sequence is sum_i f_i P_i, f_i the expert's share of the sequence's choices over its fair
    share, without gradient, P_i its mean share of the tokens' scores: 1 where balanced. (DeepSeek-V3, arXiv 2412.19437,
    eq. 17 to 20) It counts as if `coefficient` times it were added to the loss of each of the sequence's tokens.
    loss_weight: the gradient of one token's loss, fp64 on the CPU; 0 = no balance loss.

    `probe.grad` accumulates, in backward passes, how often each expert was chosen and, last, this rank's part of the
    sum of the sequences' balance losses. So recomputed forward passes, and those of validation, are not counted.
    """

    probe: nn.Parameter

    def __init__(self, model: ModelConfig, axis: TensorAxis) -> None:
        super().__init__()
        self.axis, self.experts_per_token = axis, model.experts_per_token
        self.score, self.normalize, self.scale = model.router_score, model.router_normalize, model.router_scale
        self.rate, self.coefficient = model.balance_rate, model.balance_loss
        # every tp rank multiplies the scores by its part of the experts' outputs: its gradient is a part of a sum too
        self.parameter("weight", (model.experts, model.width), Row(Role.ROUTER, sum_over=("tp",)))
        self.probe = nn.Parameter(torch.zeros(model.experts + 1))
        self.register_buffer("bias", torch.zeros(model.experts))

    def forward(self, x: Tensor, loss_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        precise = torch.promote_types(x.dtype, torch.float32)
        # the weight rounded to x's dtype first, as FSDP2 gathers it: or one rank would differ from several
        logits = F.linear(x.to(precise), local(self.weight).to(x.dtype).to(precise))
        scores = logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()  # [b, s, experts]
        chosen = (scores.detach() + self.bias).topk(self.experts_per_token).indices
        weights = scores.gather(-1, chosen)
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # all sigmoids may have underflown
        counts = torch.zeros_like(scores[:, 0], dtype=torch.int64)  # [b, experts]
        counts.scatter_add_(1, chosen.flatten(1), torch.ones_like(chosen.flatten(1)))
        side = self._side_loss(scores, counts, loss_weight)
        return _AddLoss.apply(weights * self.scale, side), chosen, counts.sum(0)

    def _side_loss(self, scores: Tensor, counts: Tensor, loss_weight: Tensor) -> Tensor:
        """Return a scalar whose gradients are the balance loss's and what `probe` accumulates.

        scores: [b, s, experts]; counts: [b, experts], int64, how often each was chosen.
        """
        length = scores.shape[1] * self.axis.context.size
        # a sequence's choices are those of all its tokens, which cp spreads over ranks; P_i is linear in the tokens, so
        # each rank adds its part of the loss
        choices = all_reduce(counts, self.axis.context.group) if self.axis.context.size > 1 else counts
        over_fair = choices.to(scores.dtype) * (counts.shape[1] / (self.experts_per_token * length))
        shares = scores / scores.sum(-1, keepdim=True)
        loss = (over_fair * shares.sum(1)).sum() / length
        measured = torch.cat((counts.sum(0), loss.detach()[None]))
        # times the length, since it is added to the loss of every token; divided by the tp ranks, since each of them
        # computes all of this and their gradients are summed
        factor = self.coefficient * loss_weight.item() * length / self.axis.size
        return (self.probe * measured).sum() + factor * loss

    @torch.no_grad()
    def rebalance(self, load: Tensor) -> None:
        """Favour experts chosen less often than the mean. load [experts]: how often the global batch chose each. An
        untrained router stays as it is."""
        if self.rows["weight"].trained:
            self.bias.add_(self.rate * (load.mean() - load).sign())


def routers(model: nn.Module) -> dict[str, Router]:
    """Return the routers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Router)}


class Experts(Module):
    """Apply this rank's experts, whose matrices are stacked: rows x [n, width] sorted by expert, and the number of rows
    of each -> [n, width], under tp a partial sum.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.activation = model.activation
        count, width, hidden = model.experts, model.width, model.expert_width
        self.parameter("down", (count, width, hidden), Row(Role.HIDDEN, tp_dim=2, experts=True, ends_branch=True))
        for name in ("up", "gate") if model.gated else ("up",):
            self.parameter(name, (count, hidden, width), Row(Role.HIDDEN, tp_dim=1, experts=True))

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        matrices = {name: local(getattr(self, name)).to(x.dtype) for name in self.rows}
        ends = torch.tensor(counts, device=x.device).cumsum(0, dtype=torch.int32)  # one copy for all products
        up = grouped_linear(x, matrices["up"], counts, ends)
        gate = grouped_linear(x, matrices["gate"], counts, ends) if "gate" in matrices else None
        return grouped_linear(activate(self.activation, up, gate), matrices["down"], counts, ends)


def grouped_linear(x: Tensor, matrices: Tensor, counts: list[int], ends: Tensor) -> Tensor:
    """Return x_i W_i^T for consecutive parts x_i of the rows of x [n, in], `counts` rows each, and W_i of matrices
    [experts, out, in]: [n, out]. In one product where torch has one, else one after the other. ends: int32, on x's
    device: the sums of counts up to each.
    """
    if has_grouped_product(x, matrices):
        return F.grouped_mm(x, matrices.mT, offs=ends)
    return torch.cat([F.linear(rows, matrix) for rows, matrix in zip(x.split(counts), matrices.unbind(), strict=True)])


def has_grouped_product(x: Tensor, matrices: Tensor) -> bool:
    """Return whether torch multiplies these in one product: bf16, rows of whole 16 bytes, and no GPU before compute
    capability 8.0, as `F.grouped_mm` documents."""
    if x.dtype != torch.bfloat16 or any(size % 8 for size in matrices.shape[1:]):
        return False
    return not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 0)


class _AddLoss(Function):
    """Return x; in the backward pass, give the scalar `loss` the gradient 1, as if it were added to the total loss.

    So a loss from inside a block needs no path out of it, through compiled blocks and pipeline stages.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0].new_ones(())
