"""Training embeddings alone: as a plain loop does, and as a stage between runs that train all weights. That layouts do
the same is test_layouts.py's."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus import write_corpus
from distributed import runs, world
from distributed.training import Training, settings_of
from torch import Tensor
from torch.func import functional_call

from megahp import checkpoint
from megahp.checkpoint.shards import Tensors
from megahp.errors import UserError
from megahp.parallel.parameters import storage

ALONE = ("train.weights=embeddings", "train.noise_scale=false")
MODELS = {"gpt2": ["embedding.weight"], "llama": ["embedding.weight", "unembedding.weight"]}
STEPS = 3
RUN = (
    *("parameterization.name=smupar", "parameterization.base_layers=2", "sparsity.method=static"),
    *("sparsity.density=0.5", "batch.policy=constant", "batch.table=[]", "train.validation_samples=0"),
    *('data.train=["corpus"]', "model.vocab_size=300", "data.validation_fraction=0.1", "log.tensorboard=false"),
)


def both_ways(model: str) -> dict[str, Any]:
    """Ours, and a plain loop of torch's AdamW over the embeddings, clipped by their own norm."""
    config = settings_of(model, *ALONE, "train.dtype=float64", "train.start_from=elsewhere")
    training, plain = Training(config), Training(config)
    ours = [training.step()["measured"] for _ in range(STEPS)]
    weights = {name: torch.nn.Parameter(storage(weight).clone()) for name, weight in plain.engine.weights.items()}
    chosen = [weights[name] for name in MODELS[model]]
    optimizer = torch.optim.AdamW(chosen)
    theirs = []
    for _ in range(STEPS):
        plan = plain.batch_scheduler.step(plain.progress)
        assert plan
        optimizer.zero_grad()
        total = 0.0
        for batch in plain.batches(plan):
            inputs = (batch.tokens[:, :-1], batch.tokens[:, 1:], batch.documents)
            loss = functional_call(plain.engine.stages[0], weights, inputs).sum() / plan.tokens
            loss.backward()
            total += loss.item()
        norm = torch.cat([weight.grad.flatten() for weight in chosen]).norm()  # type: ignore[union-attr]
        for weight in chosen:
            weight.grad.mul_((config.optimizer.clip / norm).clamp(max=1))  # type: ignore[union-attr]
        optimizer.param_groups[0].update(lr=plan.lr, weight_decay=plan.weight_decay, betas=(plan.beta1, plan.beta2))
        optimizer.step()
        plain.progress = plain.progress.after(plan)
        plain.batch_scheduler.update(plain.progress, None)
        theirs.append((total, norm.item()))
    return {
        "ours": [(each["loss"], each["grad_norm"]) for each in ours],
        "theirs": theirs,
        "weights": (training.weights(), {name: weight.detach() for name, weight in weights.items()}),
        "moments": sorted(training.optimizer.state()),
        "differentiated": [name for name, weight in training.engine.weights.items() if weight.requires_grad],
    }


def run(folder: Path, name: str, steps: int, *words: str, resume: bool = False) -> dict[str, Any]:
    """The state and the tensors after so many steps of `megahp train`, on one rank."""
    with contextlib.chdir(folder):
        config = runs.go(settings_of("llama", *RUN, f"log.name={name}", f"train.steps={steps}", *words), resume)
        path = checkpoint.find(config.directory)
        return {"state": checkpoint.read_state(path), "tensors": dict(Tensors(path).items())}


def stages(folder: Path) -> dict[str, Any]:
    write_corpus(folder / "corpus", 0.05)
    found = {
        "before": run(folder, "before", 2),
        "stage": run(folder, "stage", 5, *ALONE, "train.start_from=runs/before"),
        "cut": run(folder, "cut", 4, *ALONE, "train.start_from=runs/before"),
        "resumed": run(folder, "cut", 5, *ALONE, "train.start_from=runs/before", resume=True),
        "longer": run(folder, "longer", 6, *ALONE, "train.start_from=runs/stage"),
        "after": run(folder, "after", 6, "train.start_from=runs/stage"),
    }
    try:
        run(folder, "cut", 6, resume=True)
    except UserError as error:
        found["refused"] = str(error)
    return found


def everything(folder: Path) -> dict[str, Any]:
    return {model: both_ways(model) for model in MODELS} | stages(folder)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return world.run(1, everything, tmp_path_factory.mktemp("stage"))[0]


@pytest.mark.parametrize("model", MODELS)
def test_a_plain_loop_trains_the_same(found: dict[str, Any], model: str) -> None:
    """Learned positions are none of them, and the norm is theirs alone."""
    both = found[model]
    for ours, theirs in zip(both["ours"], both["theirs"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-10)
    ours, theirs = both["weights"]
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-9, atol=1e-12)
    assert both["moments"] == [f"{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in MODELS[model]]
    assert both["differentiated"] == MODELS[model]


def tensors(found: dict[str, Any], name: str, kind: str) -> dict[str, Tensor]:
    return {key: value for key, value in found[name]["tensors"].items() if key.startswith(f"{kind}.")}


def changed(found: dict[str, Any], before: str, after: str) -> list[str]:
    """Which weights and masks are others."""
    pairs = {kind: (tensors(found, before, kind), tensors(found, after, kind)) for kind in ("model", "mask")}
    assert all(one.keys() == other.keys() and one for one, other in pairs.values())
    return sorted(name for one, other in pairs.values() for name in one if not one[name].equal(other[name]))


def test_a_stage_of_embeddings_between_runs_of_all_weights(found: dict[str, Any]) -> None:
    weights = [f"model.{name}" for name in MODELS["llama"]]
    assert changed(found, "before", "stage") == weights
    assert changed(found, "stage", "after") == sorted(tensors(found, "stage", "model"))
    assert list(tensors(found, "stage", "exp_avg")) == [f"exp_avg.{name}" for name in MODELS["llama"]]


def test_it_resumes_to_the_bit(found: dict[str, Any]) -> None:
    whole, resumed = found["stage"]["tensors"], found["resumed"]["tensors"]
    assert whole.keys() == resumed.keys() and all(whole[name].equal(resumed[name]) for name in whole)
    assert "train.weights = 'all'" in found["refused"] and "set it back" in found["refused"]


def test_moments_begin_anew_where_other_weights_are_trained(found: dict[str, Any]) -> None:
    """After one step they are one gradient's, (1 - beta1) g and (1 - beta2) g^2, and corrected as such."""
    updates = {name: found[name]["state"]["updates"] for name in ("before", "stage", "longer", "after")}
    assert updates == {"before": 2, "stage": 3, "longer": 4, "after": 1}
    first, second = (tensors(found, "after", moment) for moment in ("exp_avg", "exp_avg_sq"))
    assert len(first) == len(tensors(found, "after", "model"))
    for mean, square in zip(first.values(), second.values(), strict=True):
        torch.testing.assert_close((mean / 0.1).square(), square / 0.05, rtol=1e-4, atol=1e-20)
