"""Thin adapters to optional engines: norms (which then do not measure the noise scale), float8 products, AdamW,
DeepSpeed.

Those of apex and Transformer Engine are tested against the signatures of their sources; neither has been run with
megahp on a GPU (docs/engines.md).
"""

import logging
import os
import warnings
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

APEX = ("apex", "build it from github.com/NVIDIA/apex")  # the package of that name on PyPI is another project
TRANSFORMER_ENGINE = ("transformer-engine", "pip install transformer-engine[pytorch]")


def norm_of(engine: str, kind: str) -> Norm:
    """Return the rmsnorm or layernorm of apex or transformer-engine. Raises UserError when it is not installed."""
    if engine == "apex":
        _import("compute.norms", *APEX, "fused_layer_norm_cuda")  # which apex looks for at the first call only
        apex = _import("compute.norms", *APEX, "apex.normalization.fused_layer_norm")
        if kind == "rmsnorm":
            return lambda x, weight, _, eps: apex.fused_rms_norm_affine(x, weight.to(x.dtype), weight.shape, eps)
        return lambda x, weight, bias, eps: apex.fused_layer_norm_affine(
            x, weight.to(x.dtype), _or_zeros(bias, weight).to(x.dtype), weight.shape, eps
        )
    te = _import("compute.norms", *TRANSFORMER_ENGINE, "transformer_engine.pytorch")
    make = te.RMSNorm if kind == "rmsnorm" else te.LayerNorm

    def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        # a module for each call, which keeps our weights: its backward pass reads them from the module
        layer = make(weight.shape[0], eps, device="meta")
        layer._parameters["weight"] = weight.to(x.dtype)
        if kind == "layernorm":
            layer._parameters["bias"] = _or_zeros(bias, weight).to(x.dtype)
        return layer(x)

    return norm


def _or_zeros(bias: Tensor | None, weight: Tensor) -> Tensor:
    """Return the bias; both engines' LayerNorms need one."""
    return weight.new_zeros(weight.shape) if bias is None else bias


def fused_adam() -> Any:
    """Return apex's class FusedAdam. Raises UserError when apex, or its CUDA part, is not installed."""
    _import("optimizer.engine", *APEX, "amp_C")
    return _import("optimizer.engine", *APEX, "apex.optimizers").FusedAdam


def deepspeed_on(device: torch.device) -> Any:
    """Return the package deepspeed, made to compute on this device. Raises UserError when it is not installed.

    Of the environment only LOCAL_RANK changes, which DeepSpeed takes for the device's index, and reads in mid-run too.
    """
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    before = dict(os.environ)
    os.environ["DS_ACCELERATOR"] = device.type  # or it would guess, and say so
    try:
        package = _import("parallel.engine", "deepspeed", "pip install 'megahp[deepspeed]'", "deepspeed")
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # or it would write about its settings among our own lines
    # what it calls at every step, and torch 2.13 has under new names
    deprecated = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", deprecated, FutureWarning)
    # It would compile this C++ when a run starts on CPUs: an all-reduce in shared memory. gloo serves.
    package.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return package


def linear_of(engine: str, device: torch.device, outputs: int, inputs: int) -> Linear:
    """Return a linear layer whose three products multiply float8: x and W in E4M3, the output's gradient in E5M2,
    summed in fp32 and returned in x's dtype (Micikevicius et al., arXiv 2209.05433).

    A tensor is scaled by what brings its present largest magnitude into range, rounded down to a power of two. Such a
    scale leaves an element's digits as they are, so that they are rounded alike under any scale (except those below
    2^-14 of the largest; for gradients, 2^-29), and the same on every layout and in every microbatch: a tp rank's part
    of x, W or dy is scaled by its own largest magnitude, without a collective.

    Raises UserError when torchao or transformer-engine is not installed.
    """
    layer: nn.Module
    context: Callable[[], AbstractContextManager[Any]]
    if engine == "torchao":
        float8 = _import("compute.fp8", "torchao", "pip install torchao", "torchao.float8")
        # GPUs without float8 products emulate them; on CPUs torch itself does
        emulate = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9)
        config = float8.Float8LinearConfig(emulate=emulate, round_scales_to_power_of_2=True)
        layer = nn.Linear(inputs, outputs, bias=False, device="meta")
        layer, context = float8.convert_to_float8_training(layer, config=config), nullcontext
    else:
        te = _import("compute.fp8", *TRANSFORMER_ENGINE, "transformer_engine.pytorch")
        recipes = _import("compute.fp8", *TRANSFORMER_ENGINE, "transformer_engine.common.recipe")
        recipe = recipes.Float8CurrentScaling()
        for tensor in ("fwd_inp", "fwd_weight", "bwd_grad"):
            setattr(recipe, f"fp8_quant_{tensor}", recipes.QParams(power_2_scale=True))
        layer = te.Linear(inputs, outputs, bias=False, device="meta")
        context = partial(te.autocast, enabled=True, recipe=recipe)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with context():
            y = functional_call(layer, {"weight": weight}, (x,))
        return y if bias is None else y + bias

    return linear


def _import(setting: str, engine: str, remedy: str, module: str) -> Any:
    try:
        return import_module(module)
    except (
        ImportError,
        RuntimeError,
        OSError,
    ) as error:  # also if only a part of it, or of its libraries, is installed
        raise UserError(f"{setting} = {engine!r} is not installed ({error}); {remedy}, or leave it out") from None
