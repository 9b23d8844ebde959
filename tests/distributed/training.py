"""A few steps of training on any layout, from made-up samples, and everything that must not depend on the layout."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from megahp import resolve
from megahp.config import Config
from megahp.data.loader import Batch
from megahp.model.build import build_model, table_of
from megahp.parallel.layout import Layout, fit
from megahp.parallel.mesh import Mesh, make_mesh
from megahp.parallel.parameters import saved
from megahp.scaling.batch_size import BatchPlan, Plan, Progress
from megahp.train.loop import validate
from megahp.train.optimizer import make_optimizer
from megahp.train.step import Engine, clip

BASE: dict[str, Any] = {
    "model": {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 48, "vocab_size": 128},
    "parameterization": {"base_width": 16, "base_layers": 1, "init_std": 0.1},
    "data": {"train": ["none"], "sequence_length": 16},
    "batch": {"global_batch": 8, "micro_batch": 2, "policy": "table", "table": ["128:16", "640:24", "1792:32"]},
    "optimizer": {"lr": 0.01, "clip": 0.5},
    "train": {"tokens": 16 * 8 * 40},
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model": {"qk_norm": True}},
    "muon": {"optimizer": {"name": "muon"}},
    "gpt2": {
        "model": {
            "kv_heads": 4,
            "activation": "gelu",
            "norm": "layernorm",
            "positions": "learned",
            "bias": True,
            "tied_embeddings": True,
        }
    },
    "alibi": {
        "model": {"activation": "relu2", "norm": "layernorm", "bias": True, "positions": "alibi"},
        "data": {"mask_documents": True},
        "parameterization": {"embedding_multiplier": 2.0},
    },
    "moe": {
        "model": {
            "experts": 8,
            "expert_width": 16,
            "shared_experts": 1,
            "dense_layers": 1,
            "router_scale": 1.5,
            "balance_rate": 0.05,
        }
    },
    "moe-loss": {
        "model": {"experts": 6, "router_score": "softmax", "router_normalize": False, "balance_loss": 0.1},
        "optimizer": {"name": "muon"},
    },
}


def settings_of(model: str, *overrides: str) -> Config:
    """A tiny run of one of MODELS, with command-line overrides."""
    return resolve.resolve(
        [("base", BASE), ("model", MODELS[model]), ("test", resolve.parse_overrides(overrides))]
    ).config


def made_up(ids: np.ndarray, settings: Config) -> Batch:
    """Samples that are a function of their ids, in two documents each."""
    length = settings.data.sequence_length
    tokens = np.stack([np.random.RandomState(i).randint(0, settings.model.vocab_size, length + 1) for i in ids])
    documents = (np.arange(length) >= (ids[:, None] * 7 % length)).astype(np.int32)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(documents) if settings.data.mask_documents else None, ids)


@functools.cache
def mesh_of(layout: Layout) -> Mesh:
    """One mesh a layout: making its process groups costs more than training on it does."""
    return make_mesh(layout, torch.device("cpu"))


class Training:
    """A model, its optimizer and its progress on the layout of the settings."""

    def __init__(self, settings: Config) -> None:
        layout = fit(settings.parallel, torch.distributed.get_world_size())
        self.settings, self.mesh = settings, mesh_of(layout)
        self.engine = Engine(build_model(settings, self.mesh), self.mesh)
        self.optimizer = make_optimizer(settings.optimizer, self.engine.weights, self.engine.rows, table_of(settings))
        self.progress = Progress()
        self.batch_plan = BatchPlan(settings, layout.dp)

    def step(self) -> dict[str, Any]:
        """One optimizer step; its loss, norms and (before clipping) whole gradients."""
        plan = self.batch_plan.step(self.progress)
        assert plan is not None
        loss = self.engine.forward_backward(self._batches(plan), plan.microbatches(self.mesh.layout.dp), plan.tokens)
        grads = self.engine.gradients()
        measured = self.engine.measure(loss, grads, plan.global_batch)
        whole_grads = {name: whole(weight.grad) for name, weight in self.engine.weights.items()}
        clip(grads, measured.grad_norm, self.settings.optimizer.clip)
        self.optimizer.step(grads, plan)
        self.engine.rebalance(measured.load)
        self.engine.zero()
        self.progress = self.progress.after(plan)
        self.batch_plan.look(self.progress, None)
        return {"measured": vars(measured), "grads": whole_grads}

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights, and the routers' biases."""
        return {name.removeprefix("model."): whole(tensor) for name, tensor in saved(self.engine.model).items()}

    def _batches(self, plan: Plan) -> Iterator[Batch]:
        for ids in plan.samples(self.mesh.data_rank, self.mesh.layout.dp):
            yield made_up(ids, self.settings)


class MadeUpData:
    """Validation samples, as many as no layout divides evenly."""

    def __init__(self, settings: Config) -> None:
        self.settings = settings

    def validation(self, count: int) -> Batch:
        return made_up(np.arange(1000, 1005), self.settings)


def train(settings: Config, steps: int) -> dict[str, Any]:
    """So many steps: what each measured, the first step's gradients, the weights at the end."""
    training = Training(settings)
    outcomes = [training.step() for _ in range(steps)]
    return {
        "validation": validate(training, MadeUpData(settings)),
        "measured": [outcome["measured"] for outcome in outcomes],
        "grads": outcomes[0]["grads"],
        "weights": training.weights(),
    }


def whole(tensor: torch.Tensor | None) -> torch.Tensor:
    """The global tensor, on every rank."""
    assert tensor is not None
    tensor = tensor.detach()
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor.clone()


def train_cases(cases: Mapping[str, tuple[Config, int]]) -> dict[str, dict[str, Any]]:
    """Every case (settings, steps) in turn, on the ranks there are."""
    return {name: train(settings, steps) for name, (settings, steps) in cases.items()}


def differences(
    got: Mapping[str, Any], wanted: Mapping[str, Any], rtol: float, weights_rtol: float | None
) -> list[str]:
    """What of two outcomes of `train` differs by more than rtol, by name; weights only if a tolerance is given."""
    found = ["validation loss"] * (not close(got["validation"], wanted["validation"], rtol))
    for number, (a, b) in enumerate(zip(got["measured"], wanted["measured"], strict=True), 1):
        for key in ("loss", "grad_norm"):
            found += [f"step {number} {key}"] * (not close(a[key], b[key], rtol))
        for key in ("grad_sq_example", "grad_sq_batch", "balance_loss"):
            found += [f"step {number} {key} {name}" for name in b[key] if not close(a[key][name], b[key][name], rtol)]
        found += [
            f"step {number} load {name}" for name in b["load"] if not torch.equal(a["load"][name], b["load"][name])
        ]
    for name in wanted["grads"]:
        found += [f"gradient {name}"] * (not close(got["grads"][name], wanted["grads"][name], rtol))
    for name in wanted["weights"] if weights_rtol else ():
        found += [f"weight {name}"] * (not close(got["weights"][name], wanted["weights"][name], weights_rtol))
    return found


def close(a: Any, b: Any, rtol: float) -> bool:
    """Equal to rtol of the largest magnitude."""
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    return a.shape == b.shape and bool((a - b).abs().max() <= rtol * b.abs().max())
