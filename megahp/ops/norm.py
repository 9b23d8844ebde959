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


def rms_norm(x: Tensor, weight: Tensor, probe: Tensor | None = None, eps: float = 1e-6, group: str = "") -> Tensor:
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


def add_rms_norm(
    x: Tensor,
    branch: Tensor,
    alpha: float,
    weight: Tensor,
    probe: Tensor | None = None,
    eps: float = 1e-6,
    group: str = "",
) -> tuple[Tensor, Tensor]:
    """The residual stream x + alpha branch and its :func:`rms_norm`, in one pass over memory.

    Args:
        x: [B, ..., D], the residual stream so far.
        branch: what is added to it, of the shape and dtype of x.
        alpha: the branch's multiplier.
        weight, probe, eps, group: those of the norm.

    Returns:
        The new stream, rounded to the dtype of x, and the norm of what was rounded; both like x.

    Raises:
        RuntimeError: as :func:`rms_norm`, and where the branch is not like x.
    """
    return torch.ops.megahp.add_rms_norm(x, branch, alpha, weight, probe, eps, group)[:2]


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    alpha: float,
    weight: Tensor,
    bias: Tensor | None = None,
    probe: Tensor | None = None,
    eps: float = 1e-5,
    group: str = "",
) -> tuple[Tensor, Tensor]:
    """The residual stream x + alpha branch and its :func:`layer_norm`; otherwise as :func:`add_rms_norm`."""
    return torch.ops.megahp.add_layer_norm(x, branch, alpha, weight, bias, probe, eps, group)[:2]


# The ops in plain PyTorch. `probe` and `group` are the backward's business.


def rms_norm_reference(
    x: Tensor, weight: Tensor, probe: Tensor | None, eps: float, group: str
) -> tuple[Tensor, Tensor]:
    """y like x, and rstd [B, ...] in the accumulation dtype."""
    _check_input(x, weight)
    rows = _widened(x)
    rstd = _inverse_root(rows.square().mean(-1) + eps)
    return (rows * rstd.unsqueeze(-1) * _widened(weight)).to(x.dtype), rstd


def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, probe: Tensor | None, eps: float, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """y like x, mean and rstd [B, ...] in the accumulation dtype."""
    _check_input(x, weight)
    rows = _widened(x)
    mean = rows.mean(-1)
    centered = rows - mean.unsqueeze(-1)
    rstd = _inverse_root(centered.square().mean(-1) + eps)
    y = centered * rstd.unsqueeze(-1) * _widened(weight)
    if bias is not None:
        _check_input(x, bias)
        y = y + _widened(bias)
    return y.to(x.dtype), mean, rstd


def add_rms_norm_reference(
    x: Tensor, branch: Tensor, alpha: float, weight: Tensor, probe: Tensor | None, eps: float, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """x + alpha branch, like x; and what rms_norm makes of it."""
    _check_like(branch, x, "branch")
    stream = torch.add(x.contiguous(), branch.contiguous(), alpha=alpha)
    return stream, *rms_norm_reference(stream, weight, probe, eps, group)


def add_layer_norm_reference(
    x: Tensor,
    branch: Tensor,
    alpha: float,
    weight: Tensor,
    bias: Tensor | None,
    probe: Tensor | None,
    eps: float,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x + alpha branch, like x; and what layer_norm makes of it."""
    _check_like(branch, x, "branch")
    stream = torch.add(x.contiguous(), branch.contiguous(), alpha=alpha)
    return stream, *layer_norm_reference(stream, weight, bias, probe, eps, group)


def rms_norm_backward_reference(
    dy: Tensor, dstream: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, by_example: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x, the weight's gradient, and the sum over examples of its squared norm, a scalar.

    With n = x rstd and g = dy weight: dx = (g - n mean(g n)) rstd + dstream, dweight_b = sum over b's rows of dy n.
    `by_example` leaves the sum over examples to the caller, who must sum over other ranks before squaring: dweight is
    then [B, D], not [D], and the scalar 0. Both are of the accumulation dtype.
    """
    _check_backward(dy, dstream, x, weight, rstd)
    scale = rstd.unsqueeze(-1)
    normal = _widened(x) * scale
    gradient = _widened(dy)
    g = gradient * _widened(weight)
    dx = (g - normal * (g * normal).mean(-1, keepdim=True)) * scale
    dweight, squares = _sum_examples(_sum_by_example(gradient * normal), by_example)
    return _plus(dx, dstream).to(x.dtype), dweight, squares


def layer_norm_backward_reference(
    dy: Tensor,
    dstream: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    by_example: bool,
    bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As rms_norm_backward, with the bias's gradient after the weight's; without a bias it is empty, [0].

    With n = (x - mean) rstd and g = dy weight: dx = (g - mean(g) - n mean(g n)) rstd + dstream; over b's rows,
    dweight_b = sum of dy n and dbias_b = sum of dy. The scalar counts both.
    """
    _check_backward(dy, dstream, x, weight, rstd)
    _check_statistic(mean, x)
    scale = rstd.unsqueeze(-1)
    normal = (_widened(x) - mean.unsqueeze(-1)) * scale
    gradient = _widened(dy)
    g = gradient * _widened(weight)
    dx = (g - g.mean(-1, keepdim=True) - normal * (g * normal).mean(-1, keepdim=True)) * scale
    dx = _plus(dx, dstream).to(x.dtype)
    dweight, squares = _sum_examples(_sum_by_example(gradient * normal), by_example)
    if not bias:
        return dx, dweight, dweight.new_empty(0), squares
    dbias, bias_squares = _sum_examples(_sum_by_example(gradient), by_example)
    return dx, dweight, dbias, squares + bias_squares


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _widened(x: Tensor) -> Tensor:
    return x.contiguous().to(_accumulation_dtype(x))


def _inverse_root(mean_square: Tensor) -> Tensor:
    return mean_square.rsqrt()


def _plus(dx: Tensor, dstream: Tensor | None) -> Tensor:
    return dx if dstream is None else dx + dstream


def _examples(x: Tensor) -> int:
    return x.shape[0] if x.dim() > 1 else 1


def _sum_by_example(terms: Tensor) -> Tensor:
    """[B, ..., D] to [B, D]."""
    return terms.reshape(_examples(terms), math.prod(terms.shape[1:-1]), terms.shape[-1]).sum(1)


def _sum_examples(gradients: Tensor, by_example: bool) -> tuple[Tensor, Tensor]:
    """[B, D] to [D] and the sum of squares of what was summed; or, by example, as it is and 0."""
    if by_example:
        return gradients, gradients.new_zeros(())
    return gradients.sum(0), gradients.square().sum()


def _check_input(x: Tensor, weight: Tensor) -> None:
    torch._check(x.is_floating_point(), lambda: f"norm: x must be floating point, not {x.dtype}")
    torch._check(x.dim() >= 1 and x.shape[-1] >= 1, lambda: "norm: x must be [..., D] with D >= 1")
    torch._check(
        weight.dim() == 1 and weight.shape[0] == x.shape[-1],
        lambda: f"norm: weight and bias must be [D] with D = {x.shape[-1]}, the last dimension of x",
    )


def _check_like(other: Tensor, x: Tensor, name: str) -> None:
    torch._check(other.shape == x.shape, lambda: f"norm: {name} and x must have the same shape")
    torch._check(other.dtype == x.dtype, lambda: f"norm: {name} and x must have the same dtype")


def _check_statistic(statistic: Tensor, x: Tensor) -> None:
    torch._check(
        statistic.shape == x.shape[:-1] and statistic.dtype == _accumulation_dtype(x),
        lambda: "norm backward: mean and rstd must be those the forward returned for x",
    )


def _check_backward(dy: Tensor, dstream: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor) -> None:
    _check_input(x, weight)
    _check_like(dy, x, "dy")
    if dstream is not None:
        _check_like(dstream, x, "dstream")
    _check_statistic(rstd, x)


# What the compiler needs to know: shapes and dtypes.


def _rms_norm_fake(x: Tensor, weight: Tensor, probe: Tensor | None, eps: float, group: str) -> tuple[Tensor, Tensor]:
    _check_input(x, weight)
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=_accumulation_dtype(x))


def _layer_norm_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, probe: Tensor | None, eps: float, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    y, rstd = _rms_norm_fake(x, weight, probe, eps, group)
    return y, torch.empty_like(rstd), rstd


def _add_rms_norm_fake(x: Tensor, branch: Tensor, alpha: float, *norm: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check_like(branch, x, "branch")
    return x.new_empty(x.shape), *_rms_norm_fake(x, *norm)


def _add_layer_norm_fake(x: Tensor, branch: Tensor, alpha: float, *norm: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_like(branch, x, "branch")
    return x.new_empty(x.shape), *_layer_norm_fake(x, *norm)


def _rms_norm_backward_fake(
    dy: Tensor, dstream: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, by_example: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check_backward(dy, dstream, x, weight, rstd)
    shape = (_examples(x), x.shape[-1]) if by_example else (x.shape[-1],)
    return x.new_empty(x.shape), rstd.new_empty(shape), rstd.new_empty(())


def _layer_norm_backward_fake(
    dy: Tensor,
    dstream: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    by_example: bool,
    bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dweight, squares = _rms_norm_backward_fake(dy, dstream, x, weight, rstd, by_example)
    return dx, dweight, dweight.new_empty(dweight.shape if bias else 0), squares


# Autograd.


def _rms_norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, probe, _, ctx.group = inputs
    _, rstd = output
    _keep(ctx, probe, x, weight, rstd)


def _rms_norm_gradients(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    needs_probe = ctx.needs_input_grad[2]
    dx, dweight, squares = _rms_norm_backward(ctx, dy, None, needs_probe)
    return dx, dweight, squares, None, None


def _add_rms_norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, ctx.alpha, weight, probe, _, ctx.group = inputs
    stream, _, rstd = output
    _keep(ctx, probe, stream, weight, rstd)


def _add_rms_norm_gradients(ctx: Any, dstream: Tensor | None, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    needs_probe = ctx.needs_input_grad[4]
    dx, dweight, squares = _rms_norm_backward(ctx, dy, dstream, needs_probe)
    return dx, _scaled(dx, ctx.alpha), None, dweight, squares, None, None


def _rms_norm_backward(
    ctx: Any, dy: Tensor | None, dstream: Tensor | None, needs_probe: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and probe."""
    if dy is None:
        return dstream, None, None
    x, weight, rstd = ctx.saved_tensors
    by_example = bool(needs_probe and ctx.group)
    dx, dweight, squares = torch.ops.megahp.rms_norm_backward(dy, dstream, x, weight, rstd, by_example)
    if by_example:
        squares = _squared_over_group([dweight], ctx.group)
        dweight = dweight.sum(0)
    return dx, dweight.to(weight.dtype), squares.to(ctx.probe_dtype) if needs_probe else None


def _layer_norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, probe, _, ctx.group = inputs
    _, mean, rstd = output
    ctx.bias_dtype = None if bias is None else bias.dtype
    _keep(ctx, probe, x, weight, mean, rstd)


def _layer_norm_gradients(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    needs_probe = ctx.needs_input_grad[3]
    dx, dweight, dbias, squares = _layer_norm_backward(ctx, dy, None, needs_probe)
    return dx, dweight, dbias, squares, None, None


def _add_layer_norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, ctx.alpha, weight, bias, probe, _, ctx.group = inputs
    stream, _, mean, rstd = output
    ctx.bias_dtype = None if bias is None else bias.dtype
    _keep(ctx, probe, stream, weight, mean, rstd)


def _add_layer_norm_gradients(
    ctx: Any, dstream: Tensor | None, dy: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    needs_probe = ctx.needs_input_grad[5]
    dx, dweight, dbias, squares = _layer_norm_backward(ctx, dy, dstream, needs_probe)
    return dx, _scaled(dx, ctx.alpha), None, dweight, dbias, squares, None, None


def _layer_norm_backward(
    ctx: Any, dy: Tensor | None, dstream: Tensor | None, needs_probe: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight, bias and probe."""
    if dy is None:
        return dstream, None, None, None
    x, weight, mean, rstd = ctx.saved_tensors
    by_example, biased = bool(needs_probe and ctx.group), ctx.bias_dtype is not None
    dx, dweight, dbias, squares = torch.ops.megahp.layer_norm_backward(
        dy, dstream, x, weight, mean, rstd, by_example, biased
    )
    if by_example:
        squares = _squared_over_group([dweight, dbias] if biased else [dweight], ctx.group)
        dweight, dbias = dweight.sum(0), dbias.sum(0)
    dbias = dbias.to(ctx.bias_dtype) if biased else None
    return dx, dweight.to(weight.dtype), dbias, squares.to(ctx.probe_dtype) if needs_probe else None


def _keep(ctx: Any, probe: Tensor | None, *saved: Tensor) -> None:
    """What every backward needs. Outputs nobody differentiates come to it as None, not as zeros to be made and read."""
    *_, rstd = saved
    ctx.mark_non_differentiable(rstd, *saved[2:-1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*saved)
    ctx.probe_dtype = None if probe is None else probe.dtype


def _scaled(gradient: Tensor | None, alpha: float) -> Tensor | None:
    return gradient if gradient is None or alpha == 1 else alpha * gradient


def _squared_over_group(gradients: list[Tensor], group: str) -> Tensor:
    """The sum of squares of per-example gradients, which lie in parts on the ranks of `group`."""
    return collectives.all_reduce(torch.stack(gradients), "sum", group).square().sum()  # type: ignore[arg-type]


def _no_second_derivative(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError("megahp's norms have no second derivative")


# Registration: the schemas, and what serves them.

_REFERENCES: dict[str, Any] = {}


@contextmanager
def references_only() -> Iterator[None]:
    """While open, the PyTorch references serve the CPU too: for tests and benchmarks beside the kernels."""
    with torch.library._scoped_library("megahp", "IMPL") as library:
        with warnings.catch_warnings():
            # Overriding the kernels is the intention.
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            for name, reference in _REFERENCES.items():
                library.impl(name, reference, "CPU")
        yield


def _register(schema: str, reference: Any, fake: Any, gradients: Any, context: Any = None) -> None:
    name, brace, rest = schema.partition("(")
    _REFERENCES[name] = reference
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
    "layer_norm(Tensor x, Tensor weight, Tensor? bias, Tensor? probe, float eps, str group)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    layer_norm_reference,
    _layer_norm_fake,
    _layer_norm_gradients,
    _layer_norm_context,
)
_register(
    "add_rms_norm(Tensor x, Tensor branch, float alpha, Tensor weight, Tensor? probe, float eps, str group)"
    " -> (Tensor stream, Tensor y, Tensor rstd)",
    add_rms_norm_reference,
    _add_rms_norm_fake,
    _add_rms_norm_gradients,
    _add_rms_norm_context,
)
_register(
    "add_layer_norm(Tensor x, Tensor branch, float alpha, Tensor weight, Tensor? bias, Tensor? probe, float eps,"
    " str group) -> (Tensor stream, Tensor y, Tensor mean, Tensor rstd)",
    add_layer_norm_reference,
    _add_layer_norm_fake,
    _add_layer_norm_gradients,
    _add_layer_norm_context,
)
_register(
    "rms_norm_backward(Tensor dy, Tensor? dstream, Tensor x, Tensor weight, Tensor rstd, bool by_example)"
    " -> (Tensor dx, Tensor dweight, Tensor squares)",
    rms_norm_backward_reference,
    _rms_norm_backward_fake,
    _no_second_derivative,
)
_register(
    "layer_norm_backward(Tensor dy, Tensor? dstream, Tensor x, Tensor weight, Tensor mean, Tensor rstd,"
    " bool by_example, bool bias) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor squares)",
    layer_norm_backward_reference,
    _layer_norm_backward_fake,
    _no_second_derivative,
)
_extension.load_all()
