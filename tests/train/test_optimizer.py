"""AdamW: torch's own update bit for bit, each role with its multipliers; apex's, by its contract, the same."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from distributed.training import settings_of
from torch import Tensor
from torch.optim.adamw import adamw

from megahp.errors import UserError
from megahp.parallel.parameters import Row
from megahp.scaling.batch import BatchScheduler, Progress, StepPlan
from megahp.scaling.parameterization import Role, table_of
from megahp.train.optimizer import ADAMW, ApexAdamW, Muon, make_optimizer

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


def plans() -> Iterator[StepPlan]:
    """Some steps of a warm-up, in which every hyperparameter changes."""
    plan = BatchScheduler(SETTINGS, 1).step(Progress())
    assert plan
    for step in range(4):
        yield replace(plan, lr=0.01 * (step + 1), weight_decay=0.1 + 0.01 * step, beta2=0.95 + 0.01 * step)


def trained_by_torch() -> dict[str, Tensor]:
    weights = {name: torch.nn.Parameter(weight) for name, weight in drawn(0).items()}
    theirs = torch.optim.AdamW([{"params": [weight], "name": name} for name, weight in weights.items()], fused=True)
    for seed, plan in enumerate(plans(), 1):
        for group in theirs.param_groups:
            rule = TABLE.rules[ROWS[group["name"]].role]
            group.update(lr=plan.lr * rule.lr, betas=(plan.beta1, plan.beta2))
            group.update(weight_decay=plan.weight_decay * rule.weight_decay, eps=plan.eps * rule.eps)
        for name, grad in drawn(seed).items():
            weights[name].grad = grad
        theirs.step()
    state = {
        f"{m}.{name}": theirs.state[weight][m] for name, weight in weights.items() for m in ("exp_avg", "exp_avg_sq")
    }
    return {name: weight.detach() for name, weight in weights.items()} | state


class FusedAdam(torch.optim.Optimizer):
    """Stands in for apex's: its signature, what it keeps and where, and what of a group it reads."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ) -> None:
        assert bias_correction and adam_w_mode and set_grad_none and not (amsgrad or capturable or master_weights)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            parts = [part for part in group["params"] if part.grad is not None]
            assert all(part.dtype == torch.float32 for part in parts)
            for part in parts:
                if not self.state[part]:
                    self.state[part] = {"exp_avg": torch.zeros_like(part), "exp_avg_sq": torch.zeros_like(part)}
            adamw(
                parts,
                [part.grad for part in parts],
                [self.state[part]["exp_avg"] for part in parts],
                [self.state[part]["exp_avg_sq"] for part in parts],
                [],
                [torch.tensor(float(group["step"]) - 1) for _ in parts],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("apex", "apex.optimizers", "amp_C"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["apex.optimizers"], "FusedAdam", FusedAdam, raising=False)


@pytest.mark.usefixtures("apex")
@pytest.mark.parametrize("engine", ADAMW)
def test_it_is_torchs_own_also_after_a_restart(engine: str) -> None:
    weights = drawn(0)
    optimizer = ADAMW[engine](weights, ROWS, TABLE)
    for seed, plan in enumerate(plans(), 1):
        if seed == 3:
            saved = {name: tensor.clone() for name, tensor in optimizer.state().items()}
            optimizer, updates = ADAMW[engine](weights, ROWS, TABLE), optimizer.updates
            for name, tensor in optimizer.state().items():
                tensor.copy_(saved[name])
            optimizer.updates = updates
        optimizer.step(list(drawn(seed).values()), plan)
    got, wanted = weights | optimizer.state(), trained_by_torch()
    assert got.keys() == wanted.keys() and optimizer.updates == 4
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.usefixtures("apex")
def test_apex_keeps_no_gradients_and_serves_muon() -> None:
    config = settings_of("muon", "optimizer.engine=apex").optimizer
    muon = make_optimizer(config, drawn(0), ROWS, TABLE, None)  # type: ignore[arg-type]
    assert isinstance(muon, Muon) and isinstance(muon.adamw, ApexAdamW)
    muon.adamw.step([drawn(1)[name] for name in muon.adamw.weights], next(plans()))
    assert all(part.grad is None for group in muon.adamw.fused.param_groups for part in group["params"])


@pytest.mark.parametrize("engine", ADAMW)
@pytest.mark.usefixtures("apex")
def test_a_stage_without_trained_weights_makes_empty_updates(engine: str) -> None:
    optimizer = ADAMW[engine]({}, {}, TABLE)
    optimizer.step([], next(plans()))
    assert optimizer.updates == 1 and optimizer.state() == {}


def test_a_half_installed_apex_is_a_users_mistake(apex: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "amp_C", None)
    with pytest.raises(UserError, match="optimizer.engine = 'apex' is not installed"):
        ADAMW["apex"](drawn(0), ROWS, TABLE)
