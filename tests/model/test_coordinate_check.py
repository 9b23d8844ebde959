"""Activations neither grow nor vanish with width or depth where the parameterization says so, and do where it does not.

Slopes of log mean |activation| against log size, over seeds. Checks 9, 10, 12, 13.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from distributed import world
from distributed.training import Training, made_up

from megahp import resolve
from megahp.config import Config
from megahp.model import build

SEEDS = (1, 2, 3)
DEPTHS = (2, 4, 8, 16, 32, 64)
WIDTHS = (64, 128, 256, 512)
SHAPE: dict[str, Any] = {
    "model": {
        "layers": 2,
        "width": 64,
        "heads": 1,
        "vocab_size": 128,
        "activation": "gelu",
        "norm": "layernorm",
        "positions": "none",
        "mlp_width": 256,
    },
    "parameterization": {"base_width": 64, "base_layers": 2},
    "data": {"train": ["none"], "sequence_length": 32},
    "batch": {"global_batch": 4, "micro_batch": 4},
    "schedule": {"name": "constant", "warmup": 0},
    "train": {"tokens": 32 * 4 * 10, "noise_scale": False},
}
# std x sqrt(width) = 0.32 and an embedding of 0.02, as in the authors' own check at width 256
DEPTH_SCALES = {"init_std": 0.04, "embedding_multiplier": 0.5}


def settings(
    name: str,
    seed: int,
    lr: float,
    alpha: float = 1.0,
    scales: Mapping[str, float] | None = None,
    optimizer: str = "adamw",
    **model: Any,
) -> Config:
    rules: dict[str, Any] = {"name": name, **(scales or {})}
    rules |= {"depth_alpha": alpha} if name == "completep" else {}
    rules |= {"base_width": 64} if name != "sp" else {}
    rules |= {"base_layers": 2} if name == "completep" else {}
    base = {**SHAPE, "parameterization": {}}
    update = {"name": optimizer, "lr": lr, "clip": 0.0}
    tested = {"model": model, "parameterization": rules, "train": {"seed": seed}, "optimizer": update}
    return resolve.resolve([("base", base), ("test", tested)]).config


def activations(chosen: Config, steps: int) -> dict[str, float]:
    """mean |activation| of the residual stream, the first MLP's pre-activations and the logits, after so many steps."""
    training = Training(chosen)
    for _ in range(steps):
        training.step()
    seen: dict[str, float] = {}
    model = training.engine.stages[0]
    for name, module in (
        ("stream", model.blocks[str(len(model.blocks) - 1)]),
        ("mlp", model.blocks["0"].mlp.up),
        ("logits", model.unembedding),
    ):
        module.register_forward_hook(
            lambda _m, _i, out, name=name: seen.update({name: out.detach().abs().mean().item()})
        )
    batch = made_up(np.arange(4), chosen)
    with torch.no_grad():
        model(batch.tokens[:, :-1])
    return seen


def slopes(cases: Mapping[int, list[Config]], steps: int) -> dict[str, float]:
    """Log-log slope of each activation, averaged over seeds, against the size that names the cases."""
    means = {size: [activations(chosen, steps) for chosen in seeds] for size, seeds in cases.items()}
    names = next(iter(means.values()))[0]
    sizes = np.log([float(size) for size in means])
    return {
        name: float(
            np.polyfit(sizes, [np.log(np.mean([seen[name] for seen in seeds])) for seeds in means.values()], 1)[0]
        )
        for name in names
    }


def all_slopes() -> dict[tuple[str, str, int], dict[str, float]]:
    found = {}
    for label, name, alpha in (("none", "sp", 1.0), ("half", "completep", 0.5), ("one", "completep", 1.0)):
        for steps in (0, 10):
            depths = [depth for depth in DEPTHS if steps == 0 or depth <= 16]
            cases = {
                depth: [settings(name, seed, 3e-3, alpha, DEPTH_SCALES, layers=depth) for seed in SEEDS]
                for depth in depths
            }
            found["depth", label, steps] = slopes(cases, steps)
    for label, name, optimizer in (("sp", "sp", "adamw"), ("mup", "mup", "adamw"), ("muon", "mup", "muon")):
        for steps in (0, 10) if optimizer == "adamw" else (10,):
            cases = {
                width: [
                    settings(name, seed, 1e-3, optimizer=optimizer, width=width, mlp_width=4 * width, heads=width // 64)
                    for seed in SEEDS[:2]
                ]
                for width in WIDTHS
            }
            found["width", label, steps] = slopes(cases, steps)
    return found


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str, int], dict[str, float]]:
    return world.run(1, all_slopes)[0]


@pytest.mark.parametrize(("alpha", "low", "high"), [("none", 0.4, 0.6), ("half", -0.1, 0.1), ("one", -0.6, -0.3)])
def test_depth_at_init(found: Any, alpha: str, low: float, high: float) -> None:
    """Check 9: +1/2 without a multiplier, 0 at alpha 1/2, -1/2 toward the embedding's floor at alpha 1."""
    assert low < found["depth", alpha, 0]["stream"] < high


@pytest.mark.parametrize(("alpha", "low", "high"), [("none", 0.8, 1.6), ("half", -0.2, 0.2), ("one", -0.2, 0.2)])
def test_depth_after_ten_steps(found: Any, alpha: str, low: float, high: float) -> None:
    """Check 10: flat at both alphas, growing without a multiplier."""
    assert low < found["depth", alpha, 10]["stream"] < high


def test_width_at_init(found: Any) -> None:
    """Check 13: hidden pre-activations are flat in width under muP, and grow as its root with an unscaled init."""
    assert abs(found["width", "mup", 0]["mlp"]) < 0.1
    assert found["width", "sp", 0]["mlp"] == pytest.approx(0.5, abs=0.1)


def test_width_after_ten_steps(found: Any) -> None:
    """Check 13: still flat under muP; with an unscaled learning rate everything grows."""
    assert abs(found["width", "mup", 10]["stream"]) < 0.1
    assert abs(found["width", "mup", 10]["mlp"]) < 0.1
    assert found["width", "sp", 10]["mlp"] - found["width", "sp", 0]["mlp"] > 0.1
    assert found["width", "sp", 10]["stream"] > 1


def test_width_after_ten_steps_of_muon(found: Any) -> None:
    """An update of spectral norm sqrt(fan_out / fan_in) moves activations as much at every width, with no 1/m_N."""
    assert abs(found["width", "muon", 10]["stream"]) < 0.1
    assert abs(found["width", "muon", 10]["mlp"]) < 0.1


def weights_after_three_steps(name: str, attention: float | None) -> dict[str, torch.Tensor]:
    fill_in = build.fill_in

    def with_attention(*arguments: Any) -> Any:
        table = fill_in(*arguments)
        return table if attention is None else type(table)(**{**vars(table), "attention": attention})

    with mock.patch.object(build, "fill_in", with_attention):
        training = Training(settings(name, 1, 1e-3, layers=2, width=64, heads=2))
        for _ in range(3):
            training.step()
        return training.weights()


def three_weights() -> list[dict[str, torch.Tensor]]:
    return [
        weights_after_three_steps("completep", None),
        weights_after_three_steps("sp", 1 / 32),
        weights_after_three_steps("sp", None),
    ]


def test_at_the_base_shape_completep_is_sp_with_mup_attention_to_the_bit() -> None:
    """Check 12."""
    ours, same, other = world.run(1, three_weights)[0]
    assert all(torch.equal(ours[name], same[name]) for name in ours)
    assert not all(torch.equal(ours[name], other[name]) for name in ours)
