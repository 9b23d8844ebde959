"""RMSNorm and LayerNorm whose backward also measures the per-example gradient norm.

For an input [B, ..., D], whose first dimension counts examples, the backward of a norm holds the weight
gradient of every example, [B, D], before it sums them into the weight's gradient. Their squares, summed,
leave as the gradient of an extra zero scalar input, the ``probe``:

    probe.grad += sum_b ||dL/dweight_b||^2 + sum_b ||dL/dbias_b||^2

Autograd thereby accumulates them over microbatches, recomputation and pipeline schedules. (Gray et al.,
"Normalization Layer Per-Example Gradients are Sufficient to Predict Gradient Noise Scale in Transformers",
arXiv 2411.00999.)

The functions ending in ``_reference`` are the ops in plain PyTorch. They serve every device; the C++ kernels
of ``csrc/``, where built, replace them on theirs.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor

from megahp.ops import _extension


def rms_norm(
    x: Tensor,
    weight: Tensor,
    probe: Tensor | None = None,
    eps: float = 1e-6,
    group: str = "",
) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension (Zhang and Sennrich, arXiv 1910.07467).

    Args:
        x: [B, ..., D], of B examples; float32, float64, bfloat16 or float16.
        weight: [D], of any floating dtype.
        probe: a zero scalar whose gradient becomes sum_b ||dL/dweight_b||^2; None to measure nothing.
        eps: added to the mean square.
        group: name of the process group over which the rows of each example are split, as under sequence
            parallelism; "" for none. For the probe, the per-example gradients are summed over it before they
            are squared; the weight's own gradient remains the sum over this rank's rows.

    Returns:
        y, of the shape and dtype of x. Statistics and sums are float32, float64 for float64 x.

    Raises:
        RuntimeError: x is not of a floating dtype or has an empty last dimension, or the weight is not [D];
            and on a second differentiation, which there is not.
    """
    return torch.ops.megahp.rms_norm(x, weight, probe, eps, group)[0]


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    probe: Tensor | None = None,
    eps: float = 1e-5,
    group: str = "",
) -> Tensor:
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, over the last dimension.

    (Ba et al., arXiv 1607.06450.) As :func:`rms_norm`, with the bias, [D] or None, counted by the probe too.
    """
    return torch.ops.megahp.layer_norm(x, weight, bias, probe, eps, group)[0]


# The ops in plain PyTorch. `probe` and `group` are the backward's business.


def rms_norm_reference(
    x: Tensor, weight: Tensor, probe: Tensor | None, eps: float, group: str
) -> tuple[Tensor, Tensor]:
    """y like x, and rstd [B, ...] in the accumulation dtype."""
    _check_input(x, weight)
    dtype = _accumulation_dtype(x)
    centered = x.contiguous().to(dtype)
    rstd = torch.rsqrt(centered.square().mean(-1) + eps)
    return (centered * rstd.unsqueeze(-1) * weight.to(dtype)).to(x.dtype), rstd


def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, probe: Tensor | None, eps: float, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """y like x, mean and rstd [B, ...] in the accumulation dtype."""
    _check_input(x, weight)
    dtype = _accumulation_dtype(x)
    rows = x.contiguous().to(dtype)
    mean = rows.mean(-1)
    centered = rows - mean.unsqueeze(-1)
    rstd = torch.rsqrt(centered.square().mean(-1) + eps)
    y = centered * rstd.unsqueeze(-1) * weight.to(dtype)
    if bias is not None:
        _check_input(x, bias)
        y = y + bias.to(dtype)
    return y.to(x.dtype), mean, rstd


def rms_norm_backward_reference(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """dx like x, and the weight gradient [B, D] of each example in the accumulation dtype.

    With n = x rstd and g = dy weight: dx = (g - n mean(g n)) rstd, dweight_b = sum over b's rows of dy n.
    """
    _check_input(x, weight)
    _check_gradient(dy, x)
    _check_statistic(rstd, x)
    scale = rstd.unsqueeze(-1)
    normal = x.contiguous().to(rstd.dtype) * scale
    gradient = dy.contiguous().to(rstd.dtype)
    g = gradient * weight.to(rstd.dtype)
    dx = (g - normal * (g * normal).mean(-1, keepdim=True)) * scale
    return dx.to(x.dtype), _sum_by_example(gradient * normal)


def layer_norm_backward_reference(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x, and the weight and bias gradients [B, D] of each example in the accumulation dtype.

    With n = (x - mean) rstd and g = dy weight: dx = (g - mean(g) - n mean(g n)) rstd; over b's rows,
    dweight_b = sum of dy n and dbias_b = sum of dy.
    """
    _check_input(x, weight)
    _check_gradient(dy, x)
    _check_statistic(mean, x)
    _check_statistic(rstd, x)
    scale = rstd.unsqueeze(-1)
    normal = (x.contiguous().to(rstd.dtype) - mean.unsqueeze(-1)) * scale
    gradient = dy.contiguous().to(rstd.dtype)
    g = gradient * weight.to(rstd.dtype)
    dx = (g - g.mean(-1, keepdim=True) - normal * (g * normal).mean(-1, keepdim=True)) * scale
    return dx.to(x.dtype), _sum_by_example(gradient * normal), _sum_by_example(gradient)


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _examples(x: Tensor) -> int:
    return x.shape[0] if x.dim() > 1 else 1


def _sum_by_example(terms: Tensor) -> Tensor:
    """[B, ..., D] to [B, D]."""
    return terms.reshape(_examples(terms), math.prod(terms.shape[1:-1]), terms.shape[-1]).sum(1)


def _check_input(x: Tensor, weight: Tensor) -> None:
    torch._check(x.is_floating_point(), lambda: f"norm: x must be floating point, not {x.dtype}")
    torch._check(x.dim() >= 1 and x.shape[-1] >= 1, lambda: "norm: x must be [..., D] with D >= 1")
    torch._check(
        weight.dim() == 1 and weight.shape[0] == x.shape[-1],
        lambda: f"norm: weight and bias must be [D] with D = {x.shape[-1]}, the last dimension of x",
    )


def _check_gradient(dy: Tensor, x: Tensor) -> None:
    torch._check(dy.shape == x.shape, lambda: "norm backward: dy and x must have the same shape")
    torch._check(dy.dtype == x.dtype, lambda: "norm backward: dy and x must have the same dtype")


def _check_statistic(statistic: Tensor, x: Tensor) -> None:
    torch._check(
        statistic.shape == x.shape[:-1] and statistic.dtype == _accumulation_dtype(x),
        lambda: "norm backward: mean and rstd must be those the forward returned for x",
    )


# What the compiler needs to know: shapes and dtypes.


def _rms_norm_fake(x: Tensor, weight: Tensor, probe: Tensor | None, eps: float, group: str) -> tuple[Tensor, Tensor]:
    _check_input(x, weight)
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=_accumulation_dtype(x))


def _layer_norm_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, probe: Tensor | None, eps: float, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    y, rstd = _rms_norm_fake(x, weight, probe, eps, group)
    return y, torch.empty_like(rstd), rstd


def _rms_norm_backward_fake(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    _check_input(x, weight)
    _check_gradient(dy, x)
    _check_statistic(rstd, x)
    return x.new_empty(x.shape), rstd.new_empty(_examples(x), x.shape[-1])


def _layer_norm_backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight = _rms_norm_backward_fake(dy, x, weight, rstd)
    return dx, dweight, torch.empty_like(dweight)


# Autograd.


def _rms_norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, probe, _, ctx.group = inputs
    _, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(x, weight, rstd)
    ctx.probe_dtype = None if probe is None else probe.dtype


def _rms_norm_gradients(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    dx, dweight = torch.ops.megahp.rms_norm_backward(dy, x, weight, rstd)
    _, needs_weight, needs_probe, *_ = ctx.needs_input_grad
    weight_gradient = dweight.sum(0).to(weight.dtype) if needs_weight else None
    probe_gradient = _squared_norm([dweight], ctx.group).to(ctx.probe_dtype) if needs_probe else None
    return dx, weight_gradient, probe_gradient, None, None


def _layer_norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, probe, _, ctx.group = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.probe_dtype = None if probe is None else probe.dtype


def _layer_norm_gradients(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, mean, rstd = ctx.saved_tensors
    dx, dweight, dbias = torch.ops.megahp.layer_norm_backward(dy, x, weight, mean, rstd)
    _, needs_weight, needs_bias, needs_probe, *_ = ctx.needs_input_grad
    weight_gradient = dweight.sum(0).to(weight.dtype) if needs_weight else None
    bias_gradient = dbias.sum(0).to(ctx.bias_dtype) if needs_bias else None
    counted = [dweight] if ctx.bias_dtype is None else [dweight, dbias]
    probe_gradient = _squared_norm(counted, ctx.group).to(ctx.probe_dtype) if needs_probe else None
    return dx, weight_gradient, bias_gradient, probe_gradient, None, None


def _squared_norm(gradients: list[Tensor], group: str) -> Tensor:
    """The sum of squares of per-example gradients, themselves summed over the ranks of `group` first."""
    stacked = torch.stack(gradients)
    if group:
        stacked = collectives.all_reduce(stacked, "sum", group)  # type: ignore[arg-type]
    return stacked.square().sum()


def _no_second_derivative(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError("megahp's norms have no second derivative")


# Registration: the schemas, and what serves them.


@contextmanager
def references_only() -> Iterator[None]:
    """While open, the PyTorch references serve the CPU too: for tests and benchmarks beside the kernels."""
    with torch.library._scoped_library("megahp", "IMPL") as library:
        with warnings.catch_warnings():
            # Overriding the kernels is the intention.
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            library.impl("rms_norm", rms_norm_reference, "CPU")
            library.impl("rms_norm_backward", rms_norm_backward_reference, "CPU")
            library.impl("layer_norm", layer_norm_reference, "CPU")
            library.impl("layer_norm_backward", layer_norm_backward_reference, "CPU")
        yield


def _register(schema: str, reference: Any, fake: Any, gradients: Any, context: Any = None) -> None:
    name, brace, rest = schema.partition("(")
    torch.library.define(f"megahp::{name}", brace + rest, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"megahp::{name}", "default", reference)
    torch.library.register_fake(f"megahp::{name}", fake)
    torch.library.register_autograd(f"megahp::{name}", gradients, setup_context=context)


_register(
    "rms_norm(Tensor x, Tensor weight, Tensor? probe, float eps, str group) -> (Tensor y, Tensor rstd)",
    rms_norm_reference,
    _rms_norm_fake,
    _rms_norm_gradients,
    _rms_norm_context,
)
_register(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> (Tensor dx, Tensor dweight)",
    rms_norm_backward_reference,
    _rms_norm_backward_fake,
    _no_second_derivative,
)
_register(
    "layer_norm(Tensor x, Tensor weight, Tensor? bias, Tensor? probe, float eps, str group)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    layer_norm_reference,
    _layer_norm_fake,
    _layer_norm_gradients,
    _layer_norm_context,
)
_register(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    layer_norm_backward_reference,
    _layer_norm_backward_fake,
    _no_second_derivative,
)
_extension.load("_cpu")
