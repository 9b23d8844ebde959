"""A few steps of training on any layout, from made-up samples, and everything that must not depend on the layout."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megahp import checkpoint, launch
from megahp.config import Config, resolve
from megahp.data.loader import ValidationSamples
from megahp.diagnose import verify
from megahp.diagnose.verify import Trial, gather_stages, synthetic_batch
from megahp.evaluate.sample import single_rank_model
from megahp.parallel import parameters
from megahp.parallel.device import claim_device
from megahp.parallel.layout import Layout, fit
from megahp.parallel.mesh import Mesh, make_mesh
from megahp.train.run import state_of_weights
from megahp.train.validation import validate

BASE: dict[str, Any] = {
    "model": {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 48, "vocab_size": 128},
    "parameterization": {"base_width": 16, "base_layers": 1, "init_std": 0.1},
    "data": {"train": ["none"], "sequence_length": 16},
    "batch": {"global_batch": 8, "micro_batch": 2, "policy": "table", "table": ["128:16", "384:24", "768:32"]},
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
            "vocab_size": 90,  # of 128 rows: of two tp ranks the second pads, of four the last has padding alone
        }
    },
    "alibi": {
        "model": {"activation": "relu2", "norm": "layernorm", "bias": True, "positions": "alibi"},
        "data": {"mask_documents": True},
        "parameterization": {"embedding_multiplier": 2.0},
    },
    "gemma": {
        "model": {
            **{"kv_heads": 1, "activation": "geglu", "norm_placement": "both", "tied_embeddings": True},
            **{"window": 6, "full_attention_every": 2, "window_rope_theta": 100.0, "rope_scaling": "linear"},
            **{"rope_factor": 2.0, "attention_softcap": 1.0, "logits_softcap": 2.0, "qkv_bias": True},
            "vocab_size": 60,
        },
        "data": {"mask_documents": True},
        "parameterization": {"embedding_multiplier": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 2.0},
    },
    "olmo": {
        "model": {
            **{
                "activation": "xielu",
                "norm_placement": "post",
                "qk_norm": True,
                "qk_norm_whole": True,
                "window": 5,
                "no_rope_every": 2,
            },
            **{"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_length": 64, "rope_theta": 100.0},
            **{"rope_slow": 1.0, "rope_fast": 4.0},
        }
    },
    "neox": {
        "model": {
            **{"norm": "layernorm", "activation": "gelu", "bias": True, "parallel_residual": True},
            **{"rope_fraction": 0.5, "rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_length": 16},
            **{"rope_slow": 0.5, "rope_fast": 2.0},
        }
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


def write_model(folder: Path, model: str, *overrides: str) -> str:
    """A run directory whose checkpoint holds a model as it is drawn, its matrices larger so that it is sure of more.
    Returns the checkpoint. To be called on a rank."""
    config = settings_of(model, *overrides)
    drawn = parameters.model_state(single_rank_model(config))
    weights = [(name, parameters.storage(weight) * (3 if weight.dim() > 1 else 1)) for name, weight in drawn.items()]
    path = checkpoint.path(folder / "checkpoints", 1)
    checkpoint.write(path, weights, state_of_weights(config), 10**9)
    return str(path)


@functools.cache
def mesh_of(layout: Layout, device: torch.device = torch.device("cpu")) -> Mesh:  # noqa: B008 - it never changes
    """One mesh a layout: making its process groups costs more than training on it does."""
    return make_mesh(layout, device)


class Training(Trial):
    """A trial on the layout of the settings."""

    def __init__(self, config: Config) -> None:
        layout = fit(config.parallel, torch.distributed.get_world_size())
        super().__init__(config, mesh_of(layout, claim_device(config, launch.world())))


class MadeUpData:
    """Validation samples, as many as no layout divides evenly."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def validation(self, count: int) -> ValidationSamples:
        groups = {"": np.ones(5, bool), "first": np.arange(5) < 2, "third": np.arange(5) == 2}
        return ValidationSamples(synthetic_batch(np.arange(1000, 1005), self.config), groups)


def train(config: Config, steps: int) -> dict[str, Any]:
    """What the trial's `train` tells, and the validation loss after it; where not all weights are trained, those that
    it began with too."""
    training = Training(config)
    drawn = gather_stages(training.weights(), training.mesh) if config.train.weights != "all" else None
    found = verify.train(training, steps) | {"drawn": drawn}
    return found | {"validation": validate(training, MadeUpData(config))}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The global tensor, on every rank."""
    return parameters.whole(tensor, parameters.storage(tensor)).cpu().clone()


def train_cases(cases: Mapping[str, tuple[Config, int]]) -> dict[str, dict[str, Any]]:
    """Every case (settings, steps) in turn, on the ranks there are."""
    return {name: train(config, steps) for name, (config, steps) in cases.items()}


def differences(
    got: Mapping[str, Any], wanted: Mapping[str, Any], rtol: float, weights_rtol: float | None
) -> list[str]:
    """What of two outcomes of `train` differs by more than rtol, by name; weights only if a tolerance is given."""
    losses = zip(got["validation"].items(), wanted["validation"].items(), strict=True)
    validation = any(one != other or abs(a - b) > rtol * abs(b) for (one, a), (other, b) in losses)
    return ["validation loss"] * validation + verify.differences(got, wanted, rtol, weights_rtol)
