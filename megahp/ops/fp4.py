"""Products of 4-bit numbers, simulated: operands are rounded to the values that a block format stores, then multiplied
as they are. It trades time for knowing what such products would do to a loss.

Elements are E2M1: 0, 1/2, 1, 3/2, 2, 3, 4, 6 and their negatives. Consecutive elements along the dimension that a
product sums over form a block and share a scale.

| format | block | scale | source |
|---|---|---|---|
| mxfp4 | 32 | E8M0, a power of two | OCP Microscaling Formats v1.0, section 6.3 |
| nvfp4 | 16 | E4M3, and one scale for the tensor | arXiv 2509.25149 |
| ue5m3 | 16 | E5M3 without a sign | arXiv 2509.17791; its bias, 15, and one code for NaN are ours |

Nothing here depends on where a tensor's parts are, so every layout rounds alike as long as blocks are whole:

- The scale of a tensor is a power of two, which leaves the digits of the blocks' scales as they are: a rank's part, a
  microbatch or the whole batch give the same values (except for blocks below 2^-13 of the largest).
- The random numbers of stochastic rounding are a hash of the block's own values, to a 16th of its scale, which sums in
  another order leave alone. They need no state, so a recomputation and a resumed run draw the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from megahp.config import ComputeConfig
from megahp.config.schema import FP4_BLOCKS
from megahp.ops.engines import Linear

LARGEST = 6.0  # E2M1
EXPONENTS = {torch.float32: (torch.int32, 0xFF << 23), torch.float64: (torch.int64, 0x7FF << 52)}  # their bits
# MurmurHash3's 32-bit finalizer (Appleby, public domain), as int32
HASH = ((16, 0x85EBCA6B - 2**32), (13, 0xC2B2AE35 - 2**32), (16, 1))


@dataclass(frozen=True)
class Scale:
    """The values that a block's scale may have: `digits` bits after the leading 1, from the least normal one on."""

    digits: int
    least: float
    most: float


SCALES = {
    "mxfp4": Scale(0, 2.0**-126, 2.0**127),  # 2^-127 is no normal number in fp32
    "nvfp4": Scale(3, 2.0**-6, 448.0),
    "ue5m3": Scale(3, 2.0**-14, 114688.0),
}


class Rounding:
    """Round a tensor [..., n] along its last dimension to a 4-bit format. n: a multiple of the format's block. Computes
    in fp32 at least; the values, with their scales, are exact in bfloat16, and returned in the tensor's dtype.

    hadamard: return the values of blocks times a Hadamard matrix with random signs, the same for all blocks, which
    spreads a large element over its block. Where both operands of a product are rotated, it is as without.

    tensor_scale: whether a scale of the whole tensor, a power of two, brings the blocks' scales into range. mxfp4's
    scales, whose range is that of fp32, need none.

    stochastic: round up or down at random, with the value as the mean. The scale is then rounded up, so that no element
    is above the largest. Otherwise elements are rounded to nearest, ties to even, and scales as the formats say: E8M0
    down from the power of two that keeps the largest element below 8, E4M3 and UE5M3 to nearest from what makes it 6.
    """

    def __init__(
        self,
        kind: str,
        hadamard: bool = False,
        tensor_scale: bool = True,
        stochastic: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.scale, self.block, self.stochastic = SCALES[kind], FP4_BLOCKS[kind], stochastic
        self.tensor_scale = tensor_scale and self.scale.digits > 0
        generator = np.random.default_rng(seed)
        signs = generator.choice((-1.0, 1.0), self.block)
        hashed = generator.integers(-(2**31), 2**31, (2, self.block), dtype=np.int32)
        self.rotation = torch.from_numpy(signs[:, None] * _hadamard(self.block)).to(device) if hadamard else None
        self.factors, self.places = torch.from_numpy(hashed).to(device)
        self.factors |= 1

    def __call__(self, x: Tensor) -> Tensor:
        blocks = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, self.block))
        if self.rotation is not None:
            blocks = blocks @ self.rotation.to(blocks.dtype)
        scale = self._scales(blocks.abs().amax(-1, keepdim=True))
        scaled = blocks * scale.reciprocal()
        step = _power(scaled.abs()).clamp(1, 4) / 2  # between E2M1's values
        steps = scaled / step
        steps = (steps + self._uniform(scaled)).floor() if self.stochastic else steps.round()
        return ((steps * step).clamp(-LARGEST, LARGEST) * scale).flatten(-2).to(x.dtype)

    def _scales(self, largest: Tensor) -> Tensor:
        """Return the scales of blocks of these largest magnitudes."""
        form = self.scale
        of_tensor: Tensor | float = 1.0
        if self.tensor_scale:  # a tensor of zeros has one too
            of_tensor = _power(2 * (largest.amax() / (LARGEST * form.most)).clamp(min=2.0**-100))
        down = form.digits == 0 and not self.stochastic
        wanted = (largest / ((4.0 if down else LARGEST) * of_tensor)).clamp(form.least, form.most)
        unit = _power(wanted) / 2**form.digits
        rounded = torch.floor if down else torch.ceil if self.stochastic else torch.round
        return rounded(wanted / unit) * unit * of_tensor

    def _uniform(self, scaled: Tensor) -> Tensor:
        """Return a number from [0, 1) for each element of blocks [..., block]: of the block's values and its place."""
        coarse = (scaled * 16).round().to(torch.int32)
        hashed = (coarse * self.factors).sum(-1, keepdim=True, dtype=torch.int32) + self.places
        for shift, factor in HASH:
            hashed = (hashed ^ (hashed >> shift)) * factor
        return (hashed & 0xFFFFFF).to(scaled.dtype) * 2.0**-24


def _power(x: Tensor) -> Tensor:
    """Return the largest power of two that is at most x, of at least 0; 0 of what is no normal number."""
    kind, exponent = EXPONENTS[x.dtype]
    return (x.view(kind) & exponent).view(x.dtype)


def _hadamard(size: int) -> np.ndarray:
    """Return Sylvester's orthogonal matrix of 1 and -1, over the root of its size, a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / size**0.5


def fp4_linear(compute: ComputeConfig, seed: int, device: torch.device) -> Linear:
    """Return a linear layer of x [b, s, inputs] whose products are those of `compute.fp4_...`: of x and W, with blocks
    along inputs; of the output's gradient and W, along outputs; of the gradient and x, along a sequence's tokens."""

    def rounding(direction: str, stochastic: bool = False) -> Callable[[Tensor], Tensor]:
        if direction not in compute.fp4:
            return lambda x: x
        rotated, scaled = (each in (direction, "both") for each in (compute.fp4_hadamard, compute.fp4_tensor_scale))
        return Rounding(compute.fp4[direction], rotated, scaled, stochastic, seed, device)

    forward, backward = rounding("forward"), rounding("backward")
    gradient = rounding("backward", compute.fp4_stochastic)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = _FP4Linear.apply(x, weight, forward, backward, gradient)
        return y if bias is None else y + bias

    return linear


class _FP4Linear(Function):
    """x W^T, which keeps its operands as they are: each product rounds them along another dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, forward: Any, backward: Any, gradient: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.roundings = backward, gradient
        return F.linear(forward(x), forward(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (backward, gradient), grad = ctx.saved_tensors, ctx.roundings, grads[0]
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = F.linear(gradient(grad), backward(weight.mT))
        if ctx.needs_input_grad[1]:
            by_tokens = (gradient(grad.mT).mT, backward(x.mT).mT)  # blocks do not cross sequences
            grads_of_tokens, tokens = (part.flatten(0, -2) for part in by_tokens)
            grad_weight = grads_of_tokens.T @ tokens
        return grad_x, grad_weight, None, None, None
