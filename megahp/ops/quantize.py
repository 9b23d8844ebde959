"""Weights as they would be in few bits, for training that takes their rounding into account."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megahp.ops.engines import Linear

BITS = {"int8": 8, "int4": 4}


def quantized(weight: Tensor, bits: int, group: int) -> Tensor:
    """Return a weight rounded to `bits`, in groups of consecutive inputs that share a scale; its gradient is the
    weight's, as if nothing had been rounded (Bengio et al., arXiv 1308.3432).

    weight: [outputs, inputs], inputs a multiple of the group, of any floating dtype; computed in fp32 at least. Values
    are whole multiples from -8 to 7, or -128 to 127, of the group's scale, the smallest that holds its largest weight.
    0 stays 0. This is torchao's symmetric mapping without clipping error, with which `torchao.quantization.quantize_`
    makes the same weights of the master's (tests/ops/test_quantize.py). Its plain symmetric mapping puts a group's
    largest weight halfway between two values, where the last bit decides, which is another one on every layout.
    """
    precise = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).unflatten(-1, (-1, group))
    largest = 2 ** (bits - 1)
    low, high = precise.aminmax(dim=-1, keepdim=True)
    scale = torch.maximum(-low / largest, high / (largest - 1)).clamp(min=torch.finfo(precise.dtype).tiny)
    rounded = (precise / scale).round().clamp(-largest, largest - 1) * scale
    # what is added is exactly 0
    return rounded.flatten(-2).to(weight.dtype) + (weight - weight.detach())


def quantized_linear(bits: int, group: int) -> Linear:
    """Return a linear layer that multiplies by quantized weights."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, quantized(weight, bits, group), bias)

    return linear
