"""AdamW in subspaces of cosines or of singular vectors: against loops in numpy, and what a rank holds of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from distributed import world
from distributed.training import Training, settings_of
from scipy.fft import dct
from train.test_muon import heads_of

from megahp.config import Config
from megahp.evaluate.sample import single_rank_model
from megahp.parallel import parameters
from megahp.parallel.parameters import storage
from megahp.scaling.memory import hidden_weights, moments_per_weight
from megahp.scaling.parameterization import Role, table_of
from megahp.train.optimizer import cosines

STEPS, REFRESH, RANK = 5, 2, 6
NAMES = ("attention.qkv.weight", "attention.out.weight", "mlp.up.weight", "mlp.gate.weight", "mlp.down.weight")
KINDS = ("dct", "galore")
RULES = [(kind, remainder) for kind in KINDS for remainder in (False, True)]


def config_of(kind: str, *words: str, model: str = "llama") -> Config:
    words = (f"optimizer.name={kind}", f"optimizer.rank={RANK}", f"optimizer.refresh={REFRESH}", *words)
    return settings_of(model, "train.dtype=float64", "optimizer.clip=0", *words)


def train_some_steps(kind: str, remainder: bool, model: str) -> dict[str, Any]:
    training = Training(config_of(kind, f"optimizer.remainder={str(remainder).lower()}", model=model))
    before, grads, plans = training.weights(), [], []
    for _ in range(STEPS):
        plans.append(training.batch_scheduler.step(training.progress))
        grads.append(training.step()["grads"])
    return {"before": before, "grads": grads, "plans": plans, "after": training.weights()}


def train_all() -> dict[Any, dict[str, Any]]:
    cases = [*((*rule, "llama") for rule in RULES), ("dct", True, "moe"), ("galore", False, "moe")]
    return {case: train_some_steps(*case) for case in cases}


@pytest.fixture(scope="module")
def trained() -> dict[Any, dict[str, Any]]:
    return world.run(1, train_all)[0]


def subspace(kind: str, grad: np.ndarray, rank: int) -> np.ndarray:
    """[smaller side, rank], of a gradient [larger side, smaller side]."""
    if kind == "galore":
        return np.linalg.svd(grad)[2][:rank].T
    lengths = (dct(grad, norm="ortho", axis=1) ** 2).sum(0)
    return dct(np.eye(grad.shape[1]), norm="ortho", axis=1)[:, np.sort(np.argsort(-lengths)[:rank])]


def moved(kind: str, remainder: bool, weight: np.ndarray, grads: list[np.ndarray], plans: list[Any]) -> np.ndarray:
    """A matrix after these steps of the rule as docs/optimizers.md has it."""
    if weight.shape[0] < weight.shape[1]:
        return moved(kind, remainder, weight.T, [grad.T for grad in grads], plans).T
    rule = table_of(config_of(kind)).rules[Role.HIDDEN]
    side = weight.shape[1]
    rank = min(RANK, side)
    basis, first, second = np.zeros((side, rank)), np.zeros((len(weight), rank)), np.zeros((len(weight), rank))
    for step, (grad, plan) in enumerate(zip(grads, plans, strict=True)):
        if step % REFRESH == 0:
            old, basis = basis, subspace(kind, grad, rank)
            turn = old.T @ basis
            first, second = first @ turn, second @ turn**2
        low = grad @ basis
        first = plan.beta1 * first + (1 - plan.beta1) * low
        second = plan.beta2 * second + (1 - plan.beta2) * low**2
        corrected = first / (1 - plan.beta1 ** (step + 1)), second / (1 - plan.beta2 ** (step + 1))
        adam = corrected[0] / (np.sqrt(corrected[1]) + plan.eps * rule.eps)
        update = adam @ basis.T
        if remainder:
            for row, outside in enumerate(grad - low @ basis.T):
                factor = np.linalg.norm(adam[row]) / (np.linalg.norm(low[row]) + plan.eps * rule.eps)
                update[row] += factor * outside
        update *= np.sqrt((adam**2).mean() / (update**2).mean())
        weight = weight * (1 - plan.lr * rule.lr * plan.weight_decay * rule.weight_decay)
        weight = weight - plan.lr * rule.lr * update
    return weight


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rule", RULES)
def test_hidden_matrices_take_the_rules_steps(trained: dict[Any, Any], rule: tuple[str, bool], name: str) -> None:
    """Query, key and value matrices each on their own."""
    found, name = trained[*rule, "llama"], f"blocks.1.{name}"
    before, after = found["before"][name].numpy(), found["after"][name].numpy()
    for rows in heads_of(name):
        rows = [row for row in rows if row < len(before)]
        wanted = moved(*rule, before[rows], [grads[name].numpy()[rows] for grads in found["grads"]], found["plans"])
        np.testing.assert_allclose(after[rows], wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("rule", [("dct", True), ("galore", False)])
def test_each_expert_has_a_subspace_of_its_own(trained: dict[Any, Any], rule: tuple[str, bool]) -> None:
    found, name = trained[*rule, "moe"], "blocks.1.mlp.experts.down"
    for expert in range(8):
        grads = [grads[name][expert].numpy() for grads in found["grads"]]
        wanted = moved(*rule, found["before"][name][expert].numpy(), grads, found["plans"])
        np.testing.assert_allclose(found["after"][name][expert].numpy(), wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_else_takes_adamws(trained: dict[Any, Any], kind: str) -> None:
    found = trained[kind, True, "llama"]
    weight = torch.nn.Parameter(found["before"]["embedding.weight"].clone())
    adamw = torch.optim.AdamW([weight], betas=(0.9, 0.95), eps=1e-8)
    for plan, grads in zip(found["plans"], found["grads"], strict=True):
        adamw.param_groups[0].update(lr=plan.lr, weight_decay=plan.weight_decay)
        weight.grad = grads["embedding.weight"]
        adamw.step()
    torch.testing.assert_close(found["after"]["embedding.weight"], weight.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [2, 7, 64, 5000])
def test_cosines_are_scipys(size: int) -> None:
    """In single precision too at a size whose angles go to 15,000 times pi."""
    columns = torch.tensor([0, size // 3, size - 1])
    wanted = np.stack([dct(row, norm="ortho") for row in np.eye(size)[:16]])[:, columns]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        found = cosines(size, columns, dtype)
        assert found.dtype == dtype and found.shape == (size, len(columns))
        np.testing.assert_allclose(found[:16], wanted, atol=tolerance / math.sqrt(size))


def held(kind: str) -> dict[str, Any]:
    training = Training(config_of(kind, "parallel.dp_replicate=2", "batch.micro_batch=4"))
    training.step()
    of_matrices = {
        name: tuple(tensor.shape) for name, tensor in training.optimizer.state().items() if name[-1] in "012"
    }
    weights = sum(weight.numel() for weight in training.optimizer.hidden.values())
    return {"shapes": of_matrices, "kept": moments_per_weight(training.config) * weights}


@pytest.mark.parametrize("kind", KINDS)
def test_moments_of_a_matrix_are_on_one_rank_alone(kind: str) -> None:
    """Also where every rank has a copy of every weight."""
    one, two = world.run(2, held, kind)
    assert not one["shapes"].keys() & two["shapes"].keys()
    moments = {name: shape for name, shape in {**one["shapes"], **two["shapes"]}.items() if "columns" not in name}
    assert moments["exp_avg.blocks.0.mlp.down.weight.0"] == (48, RANK)
    assert sum(map(math.prod, moments.values())) == pytest.approx(one["kept"])


def resume(kind: str) -> bool:
    """Whether the steps after a restart, from between two refreshes, are those of a run without it, to the bit."""
    first, second = Training(config_of(kind)), Training(config_of(kind))
    for _ in range(3):
        first.step()
    saved = first.engine.saved | first.optimizer.state()
    for name, tensor in (second.engine.saved | second.optimizer.state()).items():
        storage(tensor).copy_(storage(saved[name]))
    second.progress, second.optimizer.updates = first.progress, first.optimizer.updates
    second.batch_scheduler.load_state(first.batch_scheduler.state(), first.progress)
    for training in (first, second):
        for _ in range(3):
            training.step()
    return all(torch.equal(weight, second.weights()[name]) for name, weight in first.weights().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_takes_the_same_steps(kind: str) -> None:
    assert world.run(1, resume, kind) == [True]


def hidden_matrices(words: tuple[str, ...]) -> tuple[int, int]:
    """Weights of the hidden matrices of a model, by its rows and by the estimate."""
    config = settings_of("moe", *words)
    model = single_rank_model(config)
    weights, table = dict(parameters.parameters(model)), parameters.rows(model)
    hidden = [weight.numel() for name, weight in weights.items() if table[name].role is Role.HIDDEN]
    return sum(hidden), hidden_weights(config.model)


@pytest.mark.parametrize(
    "words", [(), ("model.layers=4", "model.dense_layers=3"), ("model.shared_experts=0",)], ids=str
)
def test_the_estimate_knows_dense_layers_and_shared_experts(words: tuple[str, ...]) -> None:
    counted, estimated = world.run(1, hidden_matrices, words)[0]
    assert counted == estimated


def test_an_expert_without_tokens_keeps_its_subspace() -> None:
    for kept in world.run(1, subspaces_after_nothing)[0]:
        assert kept


def subspaces_after_nothing() -> list[bool]:
    """Whether a refresh on gradients of 0 keeps each matrix's subspace, and the moments only decay."""
    found = []
    for kind in KINDS:
        training = Training(config_of(kind))
        optimizer: Any = training.optimizer
        training.step()
        before = {key: {name: tensor.clone() for name, tensor in of.items()} for key, of in optimizer.moments.items()}
        optimizer.updates = REFRESH  # the next one chooses anew
        plan = training.batch_scheduler.step(training.progress)
        weights = {**optimizer.adamw.weights, **optimizer.hidden}
        optimizer.step([torch.zeros_like(storage(weights[name])) for name in optimizer.names], plan)
        name = "columns" if kind == "dct" else "basis"
        for key, of in optimizer.moments.items():
            found.append(torch.equal(of[name], before[key][name]))
            found.append(torch.allclose(of["exp_avg"], plan.beta1 * before[key]["exp_avg"]))
    return found
