"""AdamW, Muon and low-rank AdamW on this rank's parts of the weights, with multipliers from the parameterization
table."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megahp.config import OptimizerConfig
from megahp.ops.engines import fused_adam
from megahp.parallel.owners import Owners
from megahp.parallel.parameters import Row, like, storage
from megahp.scaling.batch import StepPlan
from megahp.scaling.parameterization import Role, Rule, Table, spectral_scale

MOMENTS = ("exp_avg", "exp_avg_sq")
# K. Jordan's quintic: as steep at 0 as singular values near 1 allow, so that small ones grow in few iterations
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Optimizer(Protocol):
    """An update rule over the weights it was made with."""

    updates: int  # made so far

    def step(self, grads: Sequence[Tensor], plan: StepPlan) -> None:
        """Make one update from this rank's parts of the gradients, in the order of the weights."""

    def state(self) -> dict[str, Tensor]:
        """Return the moments that this rank holds under flat names, moment.weight: laid out as the weight is, or, of
        matrices whose moments are whole on one rank, plain."""


def make_optimizer(
    config: OptimizerConfig, weights: Mapping[str, Tensor], rows: Mapping[str, Row], table: Table, owners: Owners
) -> Optimizer:
    """Make the configured optimizer."""
    if config.name == "muon":
        return Muon(config, weights, rows, table, owners)
    if config.name in ("dct", "galore"):
        return LowRank(config, weights, rows, table, owners)
    return ADAMW[config.engine](weights, rows, table)


class AdamW:
    """torch's fused AdamW, one call a rule, over plain local tensors that share storage with the weights.

    The update is elementwise, so a part of a weight is updated as the whole would be, on any layout.
    """

    def __init__(self, weights: Mapping[str, Tensor], rows: Mapping[str, Row], table: Table) -> None:
        self.weights, self.updates = weights, 0
        parts = [storage(weight) for weight in weights.values()]
        self.moments = [[torch.zeros_like(part) for part in parts] for _ in MOMENTS]
        self.groups = [  # of weights with the same rates: rule, indices, and their parts and moments
            (rule, indices, [[tensors[index] for index in indices] for tensors in (parts, *self.moments)])
            for rule, indices in by_rule(list(weights), rows, table).items()
        ]

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor], plan: StepPlan) -> None:
        self.updates += 1
        if not grads:  # a pipeline stage without trained weights
            return
        count = torch.full((), float(self.updates), device=grads[0].device)  # the kernel reads it on the device
        for rule, indices, (parts, exp_avg, exp_avg_sq) in self.groups:
            # torch.optim.AdamW would sort the lists by type, and keep a step count per weight, at every step
            torch._fused_adamw_(
                parts,
                [grads[index] for index in indices],
                exp_avg,
                exp_avg_sq,
                [],
                [count] * len(parts),
                **rates(rule, plan),
                beta1=plan.beta1,
                beta2=plan.beta2,
                amsgrad=False,
                maximize=False,
            )

    def state(self) -> dict[str, Tensor]:
        return {
            f"{moment}.{name}": like(weight, part)
            for moment, parts in zip(MOMENTS, self.moments, strict=True)
            for (name, weight), part in zip(self.weights.items(), parts, strict=True)
        }


class ApexAdamW(AdamW):
    """The same by apex's FusedAdam, made to use our moments and our count of updates, so that a run may change engines
    at a checkpoint."""

    def __init__(self, weights: Mapping[str, Tensor], rows: Mapping[str, Row], table: Table) -> None:
        super().__init__(weights, rows, table)
        params = [[nn.Parameter(part) for part in parts] for _, _, (parts, *_) in self.groups]
        if not params:  # a pipeline stage without trained weights: torch's optimizers, as apex's is, refuse none
            return
        self.fused = fused_adam()([{"params": parts} for parts in params], adam_w_mode=True)
        for parts, (_, _, (_, *moments)) in zip(params, self.groups, strict=True):
            for part, *part_moments in zip(parts, *moments, strict=True):
                self.fused.state[part] = dict(zip(MOMENTS, part_moments, strict=True))

    def step(self, grads: Sequence[Tensor], plan: StepPlan) -> None:
        self.updates += 1
        if not grads:
            return
        for group, (rule, indices, _) in zip(self.fused.param_groups, self.groups, strict=True):
            group.update(rates(rule, plan), betas=(plan.beta1, plan.beta2), step=self.updates - 1)  # apex adds 1
            for part, index in zip(group["params"], indices, strict=True):
                part.grad = grads[index]
        self.fused.step()
        self.fused.zero_grad()


ADAMW = {"torch": AdamW, "apex": ApexAdamW}


def by_rule(names: Sequence[str], rows: Mapping[str, Row], table: Table) -> dict[Rule, list[int]]:
    """Return the indices of the weights that have the same rates."""
    groups: dict[Rule, list[int]] = {}
    for index, name in enumerate(names):
        groups.setdefault(table.rule(rows[name].role, rows[name].density), []).append(index)
    return groups


def rates(rule: Rule, plan: StepPlan) -> dict[str, Any]:
    """Return AdamW's rates, which the table scales by role."""
    return {"lr": plan.lr * rule.lr, "weight_decay": plan.weight_decay * rule.weight_decay, "eps": plan.eps * rule.eps}


class PerMatrix:
    """An update rule of whole hidden matrices, AdamW for everything else.

    Each matrix is gathered on the one rank that owns it, which computes the update and scatters it. So every layout
    computes the same update, and a rank holds a few whole matrices at most (those of a layer's experts count as one).
    They decay as AdamW would have them decay, so tau means the same for every weight.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        weights: Mapping[str, Tensor],
        rows: Mapping[str, Row],
        table: Table,
        owners: Owners,
    ) -> None:
        self.rows, self.rule, self.owners = rows, table.rules[Role.HIDDEN], owners
        self.names = list(weights)
        hidden = [name for name in weights if rows[name].role is Role.HIDDEN]
        hidden.sort(key=lambda name: weights[name].numel(), reverse=True)  # ranks wait for the one with the largest
        self.hidden = {name: weights[name] for name in hidden}
        rest = {name: weight for name, weight in weights.items() if name not in self.hidden}
        self.adamw = ADAMW[config.engine](rest, rows, table)

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor], plan: StepPlan) -> None:
        by_name = dict(zip(self.names, grads, strict=True))
        self.adamw.step([by_name[name] for name in self.adamw.weights], plan)
        names, ranks = list(self.hidden), self.owners.size
        for start in range(0, len(names), ranks):
            self._update(names[start : start + ranks], by_name, plan)

    @property
    def updates(self) -> int:
        return self.adamw.updates

    @updates.setter
    def updates(self, count: int) -> None:
        self.adamw.updates = count

    def part(self, name: str, grad: Tensor) -> Tensor:
        """Return this rank's part of the matrices that `direction` is given."""
        return grad

    def rate(self, plan: StepPlan) -> float:
        """Return the rate at which a matrix moves against its direction."""
        return plan.lr * self.rule.lr

    def direction(self, key: str, matrix: Tensor, plan: StepPlan) -> Tensor:
        """Return a matrix's update at rate -1, on the rank it is assigned to. key: of its state."""
        raise NotImplementedError

    def _update(self, names: Sequence[str], grads: Mapping[str, Tensor], plan: StepPlan) -> None:
        """Update at most as many matrices as there are ranks, each of which owns one."""
        weights = [self.hidden[name] for name in names]
        whole = self.owners.gather(weights, [self.part(name, grads[name]) for name in names])
        if whole is not None:
            name = names[self.owners.rank]
            matrices = enumerate(self.rows[name].matrices(whole))
            whole = self.rows[name].fuse(
                [self.direction(f"{name}.{index}", matrix, plan) for index, matrix in matrices]
            )
        parts = [storage(weight) for weight in weights]
        torch._foreach_mul_(parts, 1 - plan.lr * self.rule.lr * plan.weight_decay * self.rule.weight_decay)
        torch._foreach_sub_(parts, self.owners.scatter(weights, whole), alpha=self.rate(plan))


class Muon(PerMatrix):
    """Muon (K. Jordan, 2024) for hidden matrices.

    A hidden matrix moves by -rate sqrt(fan_out / fan_in) U, U its Nesterov momentum made orthogonal: an update of that
    spectral norm is muP's own rule for any width (arXiv 2310.17813, condition 1), so no 1/m_N enters; rate is
    `ratio` times the plan's, which carries schedule and batch rule.
    """

    def __init__(self, config: OptimizerConfig, *arguments: Any) -> None:
        super().__init__(config, *arguments)
        self.ratio, self.decay = config.muon_lr / config.lr, config.momentum
        self.momentum = {name: torch.zeros_like(storage(weight)) for name, weight in self.hidden.items()}

    def state(self) -> dict[str, Tensor]:
        return self.adamw.state() | {
            f"momentum.{name}": like(weight, self.momentum[name]) for name, weight in self.hidden.items()
        }

    def part(self, name: str, grad: Tensor) -> Tensor:
        momentum = self.momentum[name].lerp_(grad, 1 - self.decay)
        return grad.lerp(momentum, self.decay)

    def rate(self, plan: StepPlan) -> float:
        return self.ratio * plan.lr * self.rule.spectral_lr

    def direction(self, key: str, matrix: Tensor, plan: StepPlan) -> Tensor:
        return spectral_scale(*matrix.shape) * orthogonal(matrix)


class LowRank(PerMatrix):
    """AdamW of hidden matrices in a subspace of their smaller side, so that moments are [larger side, rank].

    galore: the subspace of the gradient's first singular vectors (GaLore, arXiv 2403.03507), which are stored. dct:
    that of the cosines with which the gradient is most aligned (arXiv 2505.17967), whose indices are stored. Every
    `refresh` updates it is chosen anew, and the moments are turned into it.

    With `remainder` the part of the gradient outside the subspace is added, each row by the factor that Adam gave to
    the row's part inside (Fira, arXiv 2410.01897). The update is scaled so that its entries have the root mean square
    of the subspace's, which is that of AdamW's: so AdamW's rates hold at any rank and width.

    Moments are whole, on the one rank that computes the matrix's update, and on no other.
    """

    def __init__(self, config: OptimizerConfig, *arguments: Any) -> None:
        super().__init__(config, *arguments)
        self.config = config
        self.moments: dict[str, dict[str, Tensor]] = {}  # of this rank's matrices
        for name in list(self.hidden)[self.owners.rank :: self.owners.size]:
            weight = self.hidden[name]
            for index, matrix in enumerate(self.rows[name].matrices(torch.empty(weight.shape, device="meta"))):
                side, larger = sorted(matrix.shape)
                rank, part = min(config.rank, side), storage(weight)
                moments = {moment: part.new_zeros(larger, rank) for moment in MOMENTS}
                if config.name == "dct":
                    moments["columns"] = torch.zeros(rank, dtype=torch.int64, device=part.device)
                else:
                    moments["basis"] = part.new_zeros(side, rank)
                self.moments[f"{name}.{index}"] = moments

    def state(self) -> dict[str, Tensor]:
        """Return the rest's moments as AdamW does; of hidden matrices this rank's, whole, with their subspaces."""
        return self.adamw.state() | {
            f"{moment}.{key}": tensor for key, moments in self.moments.items() for moment, tensor in moments.items()
        }

    def direction(self, key: str, matrix: Tensor, plan: StepPlan) -> Tensor:
        moments, is_tall = self.moments[key], matrix.shape[0] >= matrix.shape[1]
        grad = matrix if is_tall else matrix.T  # [larger side, side]
        exp_avg, exp_avg_sq, count = moments["exp_avg"], moments["exp_avg_sq"], self.updates
        if (count - 1) % self.config.refresh == 0 and grad.any():  # an expert without tokens says nothing
            self._choose(moments, grad)
        basis = self._basis(moments, grad.shape[1])  # [side, rank]
        inside, eps = grad @ basis, plan.eps * self.rule.eps
        exp_avg.lerp_(inside, 1 - plan.beta1)
        exp_avg_sq.lerp_(inside.square(), 1 - plan.beta2)
        adam = exp_avg / (1 - plan.beta1**count) / ((exp_avg_sq / (1 - plan.beta2**count)).sqrt() + eps)
        update = adam @ basis.T
        if self.config.remainder:
            factors = adam.norm(dim=1, keepdim=True) / (inside.norm(dim=1, keepdim=True) + eps)
            update += factors * (grad - inside @ basis.T)
        size = update.norm().clamp(min=torch.finfo(update.dtype).tiny)
        update *= adam.norm() / size * math.sqrt(basis.shape[0] / basis.shape[1])
        return update if is_tall else update.T

    def _basis(self, moments: Mapping[str, Tensor], side: int) -> Tensor:
        if self.config.name == "dct":
            return cosines(side, moments["columns"], moments["exp_avg"].dtype)
        return moments["basis"]

    def _choose(self, moments: Mapping[str, Tensor], grad: Tensor) -> None:
        """Choose the subspace that holds most of the gradient, of all or of those of cosines, and turn the moments."""
        side, rank = grad.shape[1], moments["exp_avg"].shape[1]
        before = self._basis(moments, side).clone()
        if self.config.name == "dct":
            every = cosines(side, torch.arange(side, device=grad.device), grad.dtype)
            moments["columns"].copy_((grad @ every).square().sum(0).topk(rank).indices.sort().values)
        else:
            moments["basis"].copy_(torch.linalg.svd(grad, full_matrices=False).Vh[:rank].T)
        turn = before.T @ self._basis(moments, side)  # so cosines that stay keep their moments, and new ones have none
        moments["exp_avg"].copy_(moments["exp_avg"] @ turn)
        moments["exp_avg_sq"].copy_(moments["exp_avg_sq"] @ turn.square())


def cosines(size: int, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Return columns of the orthogonal matrix of the discrete cosine transform (II): [size, len(columns)].

    Entry j of column k is sqrt(2 / size) cos(pi (2 j + 1) k / (2 size)), that of column 0 sqrt(1 / size).
    """
    places = 2 * torch.arange(size, device=columns.device) + 1
    angles = torch.outer(places, columns) % (4 * size)  # less whole periods, in integers: exact at any size
    norms = (2 - (columns == 0).to(dtype)).div(size).sqrt()
    return (angles.to(dtype) * (math.pi / (2 * size))).cos() * norms


def orthogonal(matrix: Tensor) -> Tensor:
    """Return about U V^T of the matrix U S V^T, by five Newton-Schulz iterations: its singular values come to lie
    between about 0.7 and 1.2. [m, n] -> [m, n]."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix  # the smaller of the two Gram matrices
    x = x / x.abs().amax().clamp(min=torch.finfo(x.dtype).tiny)  # or the norm of a small matrix would underflow
    x = x / x.norm().clamp(min=1)  # at least 1 by the line before, unless all are 0
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x
