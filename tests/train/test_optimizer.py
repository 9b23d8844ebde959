"""AdamW: torch's own update bit for bit, each role with its multipliers, on any layout of the state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from distributed.training import settings_of
from torch import Tensor

from megahp.model.build import table_of
from megahp.parallel.parameters import Row
from megahp.scaling.batch_size import BatchPlan, Plan, Progress
from megahp.scaling.parameterization import Role
from megahp.train.optimizer import AdamW

SETTINGS = settings_of("llama")
TABLE = table_of(SETTINGS)
ROWS = {
    "embedding": Row(Role.EMBEDDING),
    "first": Row(Role.HIDDEN),
    "norm": Row(Role.NORM),
    "second": Row(Role.HIDDEN),
    "empty": Row(Role.HIDDEN),
}
SHAPES = {"embedding": (7, 4), "first": (4, 9), "norm": (4,), "second": (4, 4), "empty": (0, 4)}


def drawn(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def plans() -> Iterator[Plan]:
    """Some steps of a warm-up, in which every hyperparameter changes."""
    plan = BatchPlan(SETTINGS, 1).step(Progress())
    assert plan
    for step in range(4):
        yield replace(plan, lr=0.01 * (step + 1), weight_decay=0.1 + 0.01 * step, beta2=0.95 + 0.01 * step)


def trained_by_torch() -> dict[str, Tensor]:
    weights = {name: torch.nn.Parameter(weight) for name, weight in drawn(0).items()}
    adamw = torch.optim.AdamW([{"params": [weight], "name": name} for name, weight in weights.items()], fused=True)
    for seed, plan in enumerate(plans(), 1):
        for group in adamw.param_groups:
            rule = TABLE.rules[ROWS[group["name"]].role]
            group.update(lr=plan.lr * rule.lr, betas=(plan.beta1, plan.beta2))
            group.update(weight_decay=plan.weight_decay * rule.weight_decay, eps=plan.eps * rule.eps)
        for name, grad in drawn(seed).items():
            weights[name].grad = grad
        adamw.step()
    state = {
        f"{m}.{name}": adamw.state[weight][m] for name, weight in weights.items() for m in ("exp_avg", "exp_avg_sq")
    }
    return {name: weight.detach() for name, weight in weights.items()} | state


def test_it_is_torchs_own_also_after_a_restart() -> None:
    weights = drawn(0)
    optimizer = AdamW(weights, ROWS, TABLE)
    for seed, plan in enumerate(plans(), 1):
        if seed == 3:
            saved = {name: tensor.clone() for name, tensor in optimizer.state().items()}
            optimizer, updates = AdamW(weights, ROWS, TABLE), optimizer.updates
            for name, tensor in optimizer.state().items():
                tensor.copy_(saved[name])
            optimizer.updates = updates
        optimizer.step(list(drawn(seed).values()), plan)
    got, wanted = weights | optimizer.state(), trained_by_torch()
    assert got.keys() == wanted.keys() and optimizer.updates == 4
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
