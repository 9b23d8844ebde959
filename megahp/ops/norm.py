"""RMSNorm and LayerNorm whose backward also measures the per-example gradient norm.

For an input [B, ..., D], whose first dimension counts examples, the backward of a norm has the weight's gradient for
every example, [B, D], before it sums them. The sum of their squares is returned as the gradient of an extra zero scalar
input, the ``probe``:

    probe.grad += sum_b ||dL/dweight_b||^2 + sum_b ||dL/dbias_b||^2

So autograd accumulates them over microbatches, recomputation and pipeline schedules, without hooks or global state.
(Gray et al., "Normalization Layer Per-Example Gradients are Sufficient to Predict Gradient Noise Scale in
Transformers", arXiv 2411.00999)

The functions ending in ``_reference`` are the ops in plain PyTorch, for every device; the kernels of ``csrc/``, where
built, replace them on theirs.
"""

import math
from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor

from megahp.ops import _extension


def normalize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    probe: Tensor | None = None,
    *,
    centered: bool,
    eps: float,
    group: str = "",
) -> Tensor:
    """Return the LayerNorm of x, or the RMSNorm if not centered, over the last dimension.

        centered: y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias     (Ba et al., arXiv 1607.06450)
        else:     y = x / sqrt(mean(x^2) + eps) * weight     (Zhang and Sennrich, arXiv 1910.07467)

    Args:
        x: [B, ..., D], of B examples; float32, float64, bfloat16 or float16.
        weight: [D], of any floating dtype.
        bias: like the weight, or None; an RMSNorm has none.
        probe: a zero scalar whose gradient becomes sum_b ||dL/dweight_b||^2 + sum_b ||dL/dbias_b||^2; None to measure
            nothing.
        centered: whether the mean is subtracted.
        eps: added to the mean square.
        group: name of the process group over which the rows of each example are split, as under sequence parallelism;
            "" for none. For the probe, the per-example gradients are summed over it before they are squared; the
            gradients of weight and bias remain the sums over this rank's rows.

    Returns:
        y, of the shape and dtype of x. Statistics and sums are float32, float64 for float64 x.

    Raises:
        RuntimeError: x is not of a floating dtype or has an empty last dimension, the weight or bias is not [D], or
            there is a bias but x is not centered; and on a second differentiation, which is not supported.
    """
    return torch.ops.megahp.norm(x, None, 1.0, weight, bias, probe, centered, eps, group)[1]


def add_and_normalize(
    x: Tensor,
    branch: Tensor,
    alpha: float,
    weight: Tensor,
    bias: Tensor | None = None,
    probe: Tensor | None = None,
    *,
    centered: bool,
    eps: float,
    group: str = "",
) -> tuple[Tensor, Tensor]:
    """Return the residual stream x + alpha branch, and its norm as by :func:`normalize`, in one pass over memory.

    Args:
        x: [B, ..., D], the residual stream so far.
        branch: added to it; of the shape and dtype of x.
        alpha: the branch's multiplier.
        weight, bias, probe, centered, eps, group: those of :func:`normalize`.

    Returns:
        The new stream, rounded to the dtype of x, and the norm of the rounded stream; both like x.

    Raises:
        RuntimeError: as :func:`normalize`, and where the branch is not like x.
    """
    return torch.ops.megahp.norm(x, branch, alpha, weight, bias, probe, centered, eps, group)[:2]


# The ops in plain PyTorch. `probe` and `group` matter to the backward alone.


def norm_reference(
    x: Tensor,
    branch: Tensor | None,
    alpha: float,
    weight: Tensor,
    bias: Tensor | None,
    probe: Tensor | None,
    centered: bool,
    eps: float,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the stream x + alpha branch, like x; y, like x; and the statistics in the accumulation dtype: mean and
    rstd [2, B, ...] if centered, else rstd [1, B, ...].

    Without a branch the stream, which would be x, is empty, [0]: an op may not return its input.
    """
    _check_forward(x, branch, weight, bias, centered)
    stream = x.new_empty(0) if branch is None else torch.add(x.contiguous(), branch.contiguous(), alpha=alpha)
    rows = _widened(x if branch is None else stream)
    statistics = []
    if centered:
        mean = rows.mean(-1)
        rows = rows - mean.unsqueeze(-1)
        statistics.append(mean)
    rstd = _inverse_root(rows.square().mean(-1) + eps)
    y = rows * rstd.unsqueeze(-1) * _widened(weight)
    if bias is not None:
        y = y + _widened(bias)
    return stream, y.to(x.dtype), torch.stack([*statistics, rstd])


def norm_backward_reference(
    dy: Tensor,
    dstream: Tensor | None,
    x: Tensor,
    weight: Tensor,
    statistics: Tensor,
    centered: bool,
    by_example: bool,
    bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx like x, the gradients of weight and bias (without one empty, [0]), and the sum over examples of their
    squared norms, a scalar; the last three in the accumulation dtype.

    x is what was normalized: the stream, where a branch was added. With n = (x - mean) rstd and g = dy weight:
    dx = (g - mean(g) - n mean(g n)) rstd + dstream, where an RMSNorm has neither mean nor mean(g); over b's rows,
    dweight_b = sum of dy n and dbias_b = sum of dy. `by_example` leaves the sum over examples to the caller, who must
    sum over other ranks before squaring: dweight and dbias are then [B, D], not [D], and the scalar 0.
    """
    _check_backward(dy, dstream, x, weight, statistics, centered, bias)
    rows, gradient = _widened(x), _widened(dy)
    if centered:
        rows = rows - statistics[0].unsqueeze(-1)
    rstd = statistics[-1].unsqueeze(-1)
    normal = rows * rstd
    g = gradient * _widened(weight)
    deviation = g - g.mean(-1, keepdim=True) if centered else g
    dx = (deviation - normal * (g * normal).mean(-1, keepdim=True)) * rstd
    if dstream is not None:
        dx = dx + dstream
    dweight, squares = _sum_examples(_sum_by_example(gradient * normal), by_example)
    dbias = dweight.new_empty(0)
    if bias:
        dbias, bias_squares = _sum_examples(_sum_by_example(gradient), by_example)
        squares = squares + bias_squares
    return dx.to(x.dtype), dweight, dbias, squares


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _widened(x: Tensor) -> Tensor:
    return x.contiguous().to(_accumulation_dtype(x))


def _examples(x: Tensor) -> int:
    return x.shape[0] if x.dim() > 1 else 1


def _inverse_root(mean_square: Tensor) -> Tensor:
    return mean_square.rsqrt()


def _sum_by_example(terms: Tensor) -> Tensor:
    """Sum over the rows of each example: [B, ..., D] -> [B, D]."""
    return terms.reshape(_examples(terms), math.prod(terms.shape[1:-1]), terms.shape[-1]).sum(1)


def _sum_examples(gradients: Tensor, by_example: bool) -> tuple[Tensor, Tensor]:
    """Return the sum over examples, [B, D] -> [D], and the sum of their squares; by example, the input and 0."""
    if by_example:
        return gradients, gradients.new_zeros(())
    return gradients.sum(0), gradients.square().sum()


def _check_forward(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, centered: bool) -> None:
    torch._check(x.is_floating_point(), lambda: f"norm: x must be floating point, not {x.dtype}")
    torch._check(x.dim() >= 1 and x.shape[-1] >= 1, lambda: "norm: x must be [..., D] with D >= 1")
    torch._check(
        all(vector is None or vector.shape == x.shape[-1:] for vector in (weight, bias)),
        lambda: f"norm: weight and bias must be [D] with D = {x.shape[-1]}, the last dimension of x",
    )
    torch._check(centered or bias is None, lambda: "norm: a norm that is not centered has no bias")
    _check_like(x, branch=branch)


def _check_backward(
    dy: Tensor, dstream: Tensor | None, x: Tensor, weight: Tensor, statistics: Tensor, centered: bool, bias: bool
) -> None:
    _check_forward(x, None, weight, weight if bias else None, centered)
    _check_like(x, dy=dy, dstream=dstream)
    torch._check(
        statistics.shape == (1 + centered, *x.shape[:-1]) and statistics.dtype == _accumulation_dtype(x),
        lambda: "norm backward: the statistics must be those the forward returned for x",
    )


def _check_like(x: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is not None:
            torch._check(other.shape == x.shape, lambda name=name: f"norm: {name} and x must have the same shape")
            torch._check(other.dtype == x.dtype, lambda name=name: f"norm: {name} and x must have the same dtype")


# Shapes and dtypes of the results, for the compiler.


def _norm_fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, branch, _, weight, bias, _, centered, _, _ = inputs
    _check_forward(x, branch, weight, bias, centered)
    stream = x.new_empty(0 if branch is None else x.shape)
    return stream, x.new_empty(x.shape), x.new_empty((1 + centered, *x.shape[:-1]), dtype=_accumulation_dtype(x))


def _norm_backward_fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dy, dstream, x, weight, statistics, centered, by_example, bias = inputs
    _check_backward(dy, dstream, x, weight, statistics, centered, bias)
    shape = (_examples(x), x.shape[-1]) if by_example else (x.shape[-1],)
    dweight, dbias = statistics.new_empty(shape), statistics.new_empty(shape if bias else 0)
    return x.new_empty(x.shape), dweight, dbias, statistics.new_empty(())


class _Differentiable(torch.autograd.Function):
    """Give the forward op its gradients.

    torch.library.register_autograd would take time by the square of the number of arguments, here nine (torch 2.13:
    fill_defaults asks the schema for all of them once for each).
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        x, branch, ctx.alpha, weight, bias, probe, ctx.centered, _, ctx.group = inputs
        stream, y, statistics = _below_autograd(*inputs)
        ctx.mark_non_differentiable(statistics, *([stream] if branch is None else []))
        # gradients of outputs that nothing uses come to the backward as None, not as zeros to be made and read
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if branch is None else stream, weight, statistics)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.probe_dtype = None if probe is None else probe.dtype
        return stream, y, statistics

    @staticmethod
    def backward(ctx: Any, dstream: Tensor | None, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        _, needs_branch, _, _, _, needs_probe, _, _, _ = ctx.needs_input_grad
        dx, dweight, dbias, dprobe = dstream, None, None, None
        if dy is not None:
            x, weight, statistics = ctx.saved_tensors
            by_example, has_bias = bool(needs_probe and ctx.group), ctx.bias_dtype is not None
            dx, dweight, dbias, squares = torch.ops.megahp.norm_backward(
                dy, dstream, x, weight, statistics, ctx.centered, by_example, has_bias
            )
            if by_example:  # each rank of the group has a part of every example: sum first, then square
                parts = torch.stack([dweight, dbias] if has_bias else [dweight])
                squares = collectives.all_reduce(parts, "sum", ctx.group).square().sum()
                dweight, dbias = dweight.sum(0), dbias.sum(0)
            dweight, dbias = dweight.to(weight.dtype), dbias.to(ctx.bias_dtype) if has_bias else None
            dprobe = squares.to(ctx.probe_dtype) if needs_probe else None
        dbranch = dx if needs_branch else None
        if dbranch is not None and ctx.alpha != 1:
            dbranch = ctx.alpha * dbranch
        return dx, dbranch, None, dweight, dbias, dprobe, None, None, None


def _norm_autograd(*inputs: Any) -> tuple[Tensor, ...]:
    return _Differentiable.apply(*inputs) if torch.is_grad_enabled() else _below_autograd(*inputs)


def _below_autograd(*inputs: Any) -> tuple[Tensor, ...]:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.megahp.norm(*inputs)


def _no_second_derivative(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError("megahp's norms have no second derivative")


# Registration: the schemas and their implementations.


def _register(schema: str, reference: Any, fake: Any) -> None:
    name, brace, rest = schema.partition("(")
    torch.library.define(f"megahp::{name}", brace + rest, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"megahp::{name}", "default", reference)
    torch.library.register_fake(f"megahp::{name}", fake)


_register(
    "norm(Tensor x, Tensor? branch, float alpha, Tensor weight, Tensor? bias, Tensor? probe, bool centered, float eps,"
    " str group) -> (Tensor stream, Tensor y, Tensor statistics)",
    norm_reference,
    _norm_fake,
)
_register(
    "norm_backward(Tensor dy, Tensor? dstream, Tensor x, Tensor weight, Tensor statistics, bool centered,"
    " bool by_example, bool bias) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor squares)",
    norm_backward_reference,
    _norm_backward_fake,
)
torch.library.impl("megahp::norm", "Autograd", _norm_autograd)
torch.library.register_autograd("megahp::norm_backward", _no_second_derivative)
_extension.load("_cpu")
if torch.version.cuda is not None:  # CUDA's kernels load only under a CUDA build, GPU or not
    _extension.load("_cuda")
