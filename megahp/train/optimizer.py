"""AdamW on this rank's parts of the weights, with each role's multipliers from the parameterization table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from megahp.parallel.parameters import Row, like, storage
from megahp.scaling.batch_size import Plan
from megahp.scaling.parameterization import Role, Rule, Table

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW:
    """torch's AdamW over plain local tensors that share storage with the weights.

    The update is elementwise, so a part of a weight is updated as the whole would be, on any layout.
    """

    def __init__(self, weights: Mapping[str, Tensor], rows: Mapping[str, Row], table: Table) -> None:
        self.weights = weights
        self.parts = {name: nn.Parameter(storage(weight)) for name, weight in weights.items()}
        groups: dict[Role, list[nn.Parameter]] = {}
        for name, part in self.parts.items():
            groups.setdefault(rows[name].role, []).append(part)
        self.adamw = torch.optim.AdamW([{"params": parts, "role": role} for role, parts in groups.items()], fused=True)
        self.rules: dict[Role, Rule] = dict(table.rules)
        for part in self.parts.values():
            self.adamw.state[part] = {"step": torch.zeros((), device=part.device)} | {
                moment: torch.zeros_like(part) for moment in MOMENTS
            }

    def step(self, grads: Sequence[Tensor], plan: Plan) -> None:
        """One update from this rank's gradients, in the order of the weights."""
        for group in self.adamw.param_groups:
            rule = self.rules[group["role"]]
            group["lr"] = plan.lr * rule.lr
            group["weight_decay"] = plan.weight_decay * rule.weight_decay
            group["betas"] = (plan.beta1, plan.beta2)
            group["eps"] = plan.eps * rule.eps
        for part, grad in zip(self.parts.values(), grads, strict=True):
            part.grad = grad
        self.adamw.step()

    def state(self) -> dict[str, Tensor]:
        """The moments, laid out as their weights, under flat names: moment.weight."""
        return {
            f"{moment}.{name}": like(self.weights[name], self.adamw.state[part][moment])
            for name, part in self.parts.items()
            for moment in MOMENTS
        }

    @property
    def updates(self) -> int:
        """Updates made so far, which bias correction depends on."""
        return int(next(iter(self.adamw.state.values()))["step"].item())

    @updates.setter
    def updates(self, count: int) -> None:
        for state in self.adamw.state.values():
            state["step"].fill_(count)
