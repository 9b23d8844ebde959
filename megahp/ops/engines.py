"""Norms of other engines, for those who have them and do not measure the noise scale. Thin adapters, tested by contract
alone: neither apex nor Transformer Engine has been run with megahp."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor
from torch.func import functional_call

from megahp.errors import UserError

# x [..., D], weight [D], bias [D] or None, eps -> the norm of x, like x
Norm = Callable[[Tensor, Tensor, Tensor | None, float], Tensor]


def norm_of(engine: str, kind: str) -> Norm:
    """The rmsnorm or layernorm of apex or transformer-engine. Raises UserError when the engine is not installed."""
    return _apex(kind) if engine == "apex" else _transformer_engine(kind)


def _apex(kind: str) -> Norm:
    """NVIDIA's apex; the package of that name on PyPI is another project, and has no such module."""
    module = _installed("apex", "apex.normalization.fused_layer_norm", "build it from github.com/NVIDIA/apex")
    if kind == "rmsnorm":
        return lambda x, weight, _, eps: module.fused_rms_norm_affine(x, weight.to(x.dtype), weight.shape, eps)
    return lambda x, weight, bias, eps: module.fused_layer_norm_affine(
        x, weight.to(x.dtype), _or_zeros(bias, weight).to(x.dtype), weight.shape, eps
    )


def _transformer_engine(kind: str) -> Norm:
    """Its modules, called with our weights in the place of their own."""
    module = _installed("transformer-engine", "transformer_engine.pytorch", "pip install transformer-engine[pytorch]")
    made: dict[Any, Any] = {}

    def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        key = (weight.shape[0], eps)
        if key not in made:
            made[key] = (module.RMSNorm if kind == "rmsnorm" else module.LayerNorm)(*key, device="meta")
        weights = {"weight": weight.to(x.dtype)}
        if kind == "layernorm":
            weights["bias"] = _or_zeros(bias, weight).to(x.dtype)
        return functional_call(made[key], weights, (x,))

    return norm


def _or_zeros(bias: Tensor | None, weight: Tensor) -> Tensor:
    return weight.new_zeros(weight.shape) if bias is None else bias


def _installed(engine: str, module: str, remedy: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(f"compute.norms = {engine!r} is not installed ({error}); {remedy}, or leave it out") from None
