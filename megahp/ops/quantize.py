"""Products with weights as they would be in few bits, for training that takes their rounding into account."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from megahp.ops.engines import Linear

BITS = {"int8": 8, "int4": 4}


def quantized(weight: Tensor, bits: int, group: int) -> Tensor:
    """Return a weight rounded to `bits`, in groups of consecutive inputs that share a scale.

    weight: [outputs, inputs], inputs a multiple of the group, of any floating dtype; computed in fp32 at least. Values
    are whole multiples from -8 to 7, or -128 to 127, of the group's scale, the smallest that holds its largest weight.
    0 stays 0. This is torchao's symmetric mapping without clipping error, with which `torchao.quantization.quantize_`
    makes the same weights of the master's (tests/ops/test_quantize.py). Its plain symmetric mapping puts a group's
    largest weight halfway between two values, where the last bit decides, which is another one on every layout.
    """
    precise = weight.to(torch.promote_types(weight.dtype, torch.float32)).unflatten(-1, (-1, group))
    largest = 2 ** (bits - 1)
    low, high = precise.aminmax(dim=-1, keepdim=True)
    scale = torch.maximum(-low / largest, high / (largest - 1)).clamp(min=torch.finfo(precise.dtype).tiny)
    return ((precise / scale).round().clamp(-largest, largest - 1) * scale).flatten(-2).to(weight.dtype)


def quantized_linear(bits: int, group: int) -> Linear:
    """Return a linear layer that multiplies by quantized weights, whose gradient the weights get as if nothing had been
    rounded (Bengio et al., arXiv 1308.3432)."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = _QuantizedLinear.apply(x, weight, bits, group)
        return y if bias is None else y + bias

    return linear


class _QuantizedLinear(Function):
    """x Q(W)^T, which keeps W and rounds it again in the backward pass: FSDP2 frees a gathered W in between, and would
    not know of a rounded copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bits: int, group: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rounding = bits, group
        return F.linear(x, quantized(weight, bits, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        grad_x = grads[0] @ quantized(weight, *ctx.rounding) if ctx.needs_input_grad[0] else None
        grad_weight = grads[0].flatten(0, -2).T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None, None
