"""What other engines compute for those who have them: norms, without the noise scale, float8 products, AdamW.
Thin adapters; those of apex and Transformer Engine are tested by contract alone, neither has been run with megahp."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from megahp.errors import UserError

# x [..., D], weight [D], bias [D] or None, eps -> the norm of x, like x
Norm = Callable[[Tensor, Tensor, Tensor | None, float], Tensor]
# x [..., K], weight [N, K], bias [N] or None -> x W^T (+ b) [..., N], all of one dtype
Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Context = Callable[[], AbstractContextManager[Any]]  # in which a layer is to be called

APEX = ("apex", "build it from github.com/NVIDIA/apex")
TRANSFORMER_ENGINE = ("transformer-engine", "pip install transformer-engine[pytorch]")


def norm_of(engine: str, kind: str) -> Norm:
    """The rmsnorm or layernorm of apex or transformer-engine. Raises UserError when the engine is not installed."""
    return _apex(kind) if engine == "apex" else _transformer_engine(kind)


def _apex(kind: str) -> Norm:
    """NVIDIA's apex; the package of that name on PyPI is another project, and has no such module."""
    module = _installed("compute.norms", *APEX, "apex.normalization.fused_layer_norm")
    if kind == "rmsnorm":
        return lambda x, weight, _, eps: module.fused_rms_norm_affine(x, weight.to(x.dtype), weight.shape, eps)
    return lambda x, weight, bias, eps: module.fused_layer_norm_affine(
        x, weight.to(x.dtype), _or_zeros(bias, weight).to(x.dtype), weight.shape, eps
    )


def _transformer_engine(kind: str) -> Norm:
    """Its modules, called with our weights in the place of their own."""
    module = _installed("compute.norms", *TRANSFORMER_ENGINE, "transformer_engine.pytorch")
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


def fused_adam() -> Any:
    """apex's FusedAdam, the class. Raises UserError when apex, or its CUDA part, is not installed."""
    _installed("optimizer.engine", *APEX, "amp_C")
    return _installed("optimizer.engine", *APEX, "apex.optimizers").FusedAdam


def linear_of(engine: str, device: torch.device, outputs: int, inputs: int) -> Linear:
    """A linear layer whose three products multiply float8: x and W in E4M3, the output's gradient in E5M2, summed in
    fp32 and given back in x's type (Micikevicius et al., arXiv 2209.05433). Raises UserError when torchao or
    transformer-engine is not installed.

    A tensor is scaled by what brings its largest magnitude of the moment into range, rounded down to a power of two.
    Such a scale leaves an element's digits as they are, so that they are rounded alike under any scale (but for those
    2^-14 of the largest and smaller; gradients, 2^-29), and the same on every layout and in every microbatch: a tp
    rank's part of x, W or dy is scaled by its own largest magnitude without asking the others'.
    """
    build = _float8_of_torchao if engine == "torchao" else _float8_of_transformer_engine
    layer, context = build(device, outputs, inputs)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with context():
            y = functional_call(layer, {"weight": weight}, (x,))
        return y if bias is None else y + bias

    return linear


def _float8_of_torchao(device: torch.device, outputs: int, inputs: int) -> tuple[nn.Module, Context]:
    """Emulated on GPUs that cannot multiply float8; on CPUs torch does that itself."""
    float8 = _installed("compute.fp8", "torchao", "pip install torchao", "torchao.float8")
    emulate = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9)
    config = float8.Float8LinearConfig(emulate=emulate, round_scales_to_power_of_2=True)
    layer = nn.Linear(inputs, outputs, bias=False, device="meta")
    return float8.convert_to_float8_training(layer, config=config), nullcontext


def _float8_of_transformer_engine(_: torch.device, outputs: int, inputs: int) -> tuple[nn.Module, Context]:
    engine = _installed("compute.fp8", *TRANSFORMER_ENGINE, "transformer_engine.pytorch")
    recipes = _installed("compute.fp8", *TRANSFORMER_ENGINE, "transformer_engine.common.recipe")
    recipe = recipes.Float8CurrentScaling()
    for tensor in ("fwd_inp", "fwd_weight", "bwd_grad"):
        setattr(recipe, f"fp8_quant_{tensor}", recipes.QParams(power_2_scale=True))
    layer = engine.Linear(inputs, outputs, bias=False, device="meta")
    return layer, partial(engine.autocast, enabled=True, recipe=recipe)


def _installed(setting: str, engine: str, remedy: str, module: str) -> Any:
    try:
        return import_module(module)
    except (ImportError, RuntimeError, OSError) as error:  # or only half of it is, or its libraries are not
        raise UserError(f"{setting} = {engine!r} is not installed ({error}); {remedy}, or leave it out") from None
