"""Muon: against a loop in numpy, against torch's own, and flat in width."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from distributed import world
from distributed.training import Training, settings_of

from megahp.train.optimizer import orthogonal

SETTINGS = ("train.dtype=float64", "optimizer.clip=0", "optimizer.momentum=0.9", "optimizer.muon_lr=0.03")


def train_three_steps() -> dict[str, Any]:
    training = Training(settings_of("muon", *SETTINGS))
    before, grads, plans = training.weights(), [], []
    for _ in range(3):
        plans.append(training.batch_scheduler.step(training.progress))
        grads.append(training.step()["grads"])
    return {"before": before, "grads": grads, "plans": plans, "after": training.weights()}


def train_experts() -> dict[str, Any]:
    """One step of a model with six experts a layer."""
    training = Training(settings_of("moe-loss", *SETTINGS))
    plan, before = training.batch_scheduler.step(training.progress), training.weights()
    return {"plan": plan, "before": before, "grads": training.step()["grads"], "after": training.weights()}


def both() -> tuple[dict[str, Any], dict[str, Any]]:
    return train_three_steps(), train_experts()


@pytest.fixture(scope="module")
def outcomes() -> tuple[dict[str, Any], dict[str, Any]]:
    return world.run(1, both)[0]


@pytest.fixture(scope="module")
def trained(outcomes: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    return outcomes[0]


def newton_schulz(matrix: np.ndarray) -> np.ndarray:
    """The quintic on the singular values, by their decomposition."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    s = s / np.sqrt((s**2).sum())
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ np.diag(s) @ v


def heads_of(name: str) -> list[list[int]]:
    """The rows of each matrix in a weight: 4 query heads of 8 rows and 2 key/value heads, by group."""
    if not name.endswith("qkv.weight"):
        return [list(range(10_000))]
    query, key, value = [], [], []
    for group in range(2):
        first = group * 32
        query += range(first, first + 16)
        key += range(first + 16, first + 24)
        value += range(first + 24, first + 32)
    return [query, key, value]


@pytest.mark.parametrize(
    "name", ["attention.qkv.weight", "attention.out.weight", "mlp.up.weight", "mlp.gate.weight", "mlp.down.weight"]
)
def test_hidden_matrices_take_muons_steps(trained: dict[str, Any], name: str) -> None:
    """m <- 0.9 m + 0.1 g; W <- W - rate sqrt(out / in) NS(0.1 g + 0.9 m), decayed by AdamW's lr x weight decay."""
    name = f"blocks.1.{name}"
    weight, momentum = trained["before"][name].numpy().copy(), 0.0
    for plan, grads in zip(trained["plans"], trained["grads"], strict=True):
        grad = grads[name].numpy()
        momentum = 0.9 * momentum + 0.1 * grad
        nesterov = 0.1 * grad + 0.9 * momentum
        weight *= 1 - plan.lr * plan.weight_decay  # m_L = 2 at alpha 1; m_N = 2 cancels
        for rows in heads_of(name):
            rows = [row for row in rows if row < len(weight)]
            step = newton_schulz(nesterov[rows]) * np.sqrt(len(rows) / weight.shape[1])
            weight[rows] -= 0.03 * plan.lr / 0.01 * step
    np.testing.assert_allclose(trained["after"][name].numpy(), weight, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["up", "gate", "down"])
def test_each_expert_takes_a_step_of_its_own(outcomes: tuple[dict[str, Any], dict[str, Any]], name: str) -> None:
    step, name = outcomes[1], f"blocks.1.mlp.experts.{name}"
    plan = step["plan"]
    moved = step["after"][name] - step["before"][name] * (1 - plan.lr * plan.weight_decay)
    assert len(moved) == 6
    for grad, change in zip(step["grads"][name].numpy(), moved.numpy(), strict=True):
        direction = newton_schulz(grad) * np.sqrt(grad.shape[0] / grad.shape[1])
        np.testing.assert_allclose(change, -0.03 * plan.lr / 0.01 * direction, rtol=1e-8, atol=1e-12)


def test_everything_else_takes_adamws(trained: dict[str, Any]) -> None:
    for name, eps in (("embedding.weight", 1e-8), ("blocks.0.mlp_norm.weight", 1e-8 / 4)):
        weight = torch.nn.Parameter(trained["before"][name].clone())
        adamw = torch.optim.AdamW([weight], betas=(0.9, 0.95), eps=eps)
        for plan, grads in zip(trained["plans"], trained["grads"], strict=True):
            decay = plan.weight_decay if name.startswith("embedding") else 0.0
            adamw.param_groups[0].update(lr=plan.lr, weight_decay=decay)
            weight.grad = grads[name]
            adamw.step()
        torch.testing.assert_close(trained["after"][name], weight.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (64, 64)])
def test_orthogonal_is_torchs_own_to_its_bf16(shape: tuple[int, int]) -> None:
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = grad
    torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.95).step()
    wanted = -weight.detach() / max(1, shape[0] / shape[1]) ** 0.5
    assert (orthogonal(grad) - wanted).norm() < 0.02 * wanted.norm()


def test_orthogonal_of_an_ill_conditioned_matrix() -> None:
    u, _, v = np.linalg.svd(np.random.RandomState(0).randn(40, 60), full_matrices=False)
    matrix = torch.from_numpy(u @ np.diag(np.logspace(0, -2, 40)) @ v)
    singular = torch.linalg.svdvals(orthogonal(matrix))
    assert singular.min() > 0.6 and singular.max() < 1.25
    assert torch.equal(orthogonal(torch.zeros(3, 5)), torch.zeros(3, 5))


@pytest.mark.parametrize("scale", [1e-37, 1e-25, 1e25])
def test_orthogonal_does_not_depend_on_the_size_of_the_matrix(scale: float) -> None:
    matrix = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(orthogonal(matrix * scale), orthogonal(matrix), rtol=1e-4, atol=1e-5)


def test_its_rate_follows_schedule_and_batch_rule(trained: dict[str, Any]) -> None:
    """The plans of the test above do differ, so that it can tell."""
    rates = [plan.lr for plan in trained["plans"]]
    assert len(set(rates)) == 3 and trained["plans"][-1].weight_decay > trained["plans"][0].weight_decay
