"""The contract of the adapters to other engines' norms, against stand-ins with the signatures the engines document."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed import world
from distributed.training import Training, settings_of
from torch import Tensor, nn

from megahp.errors import UserError
from megahp.ops.engines import norm_of


def fused_rms_norm_affine(x: Tensor, weight: Tensor, shape: Any, eps: float = 1e-6) -> Tensor:
    assert weight.dtype == x.dtype
    return F.rms_norm(x, tuple(shape), weight, eps)


def fused_layer_norm_affine(x: Tensor, weight: Tensor, bias: Tensor, shape: Any, eps: float = 1e-6) -> Tensor:
    assert weight.dtype == bias.dtype == x.dtype
    return F.layer_norm(x, tuple(shape), weight, bias, eps)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float = 1e-5, device: str = "cuda") -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.empty(size, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm(RMSNorm):
    def __init__(self, size: int, eps: float = 1e-5, device: str = "cuda") -> None:
        super().__init__(size, eps, device)
        self.bias = nn.Parameter(torch.empty(size, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def install(names: dict[str, Any]) -> None:
    for package in ("apex", "apex.normalization", "transformer_engine"):
        names[package] = ModuleType(package)
    apex = names["apex.normalization.fused_layer_norm"] = ModuleType("fused_layer_norm")
    apex.fused_rms_norm_affine, apex.fused_layer_norm_affine = fused_rms_norm_affine, fused_layer_norm_affine  # type: ignore[attr-defined]
    engine = names["transformer_engine.pytorch"] = ModuleType("pytorch")
    engine.RMSNorm, engine.LayerNorm = RMSNorm, LayerNorm  # type: ignore[attr-defined]


@pytest.mark.parametrize("engine", ["apex", "transformer-engine"])
@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_an_engine_gets_what_it_asks_for(
    monkeypatch: pytest.MonkeyPatch, engine: str, kind: str, with_bias: bool
) -> None:
    names: dict[str, Any] = {}
    install(names)
    for name, module in names.items():
        monkeypatch.setitem(sys.modules, name, module)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 8, generator=generator).bfloat16().requires_grad_()
    weight, bias = (torch.randn(8, generator=generator).requires_grad_() for _ in range(2))
    norm = norm_of(engine, kind)
    y = norm(x, weight, bias if with_bias and kind == "layernorm" else None, 1e-3)
    if kind == "rmsnorm":
        wanted = F.rms_norm(x, (8,), weight.bfloat16(), 1e-3)
    else:
        wanted = F.layer_norm(x, (8,), weight.bfloat16(), (bias if with_bias else 0 * bias).bfloat16(), 1e-3)
    assert torch.equal(y, wanted) and y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0 and x.grad is not None


def steps_with(words: tuple[str, ...]) -> list[float]:
    install(sys.modules)  # type: ignore[arg-type]
    training = Training(settings_of("gpt2", "train.noise_scale=false", "train.dtype=float64", *words))
    return [training.step()["measured"]["loss"] for _ in range(2)]


@pytest.mark.parametrize("engine", ["apex", "transformer-engine"])
def test_a_model_trains_the_same_with_another_engines_norms(engine: str) -> None:
    found = world.run(1, steps_with, (f"compute.norms={engine}",))[0]
    assert found == pytest.approx(world.run(1, steps_with, ())[0], rel=1e-12)


def test_a_missing_engine_is_a_users_mistake() -> None:
    for engine, words in (("apex", "github.com/NVIDIA/apex"), ("transformer-engine", "pip install transformer-engine")):
        with pytest.raises(UserError, match=words):
            norm_of(engine, "rmsnorm")
