"""Positions: rotary embeddings, ALiBi, and the mask that keeps documents apart."""

import math

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right


def rotary(positions: Tensor, size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin of positions [n] x frequencies, each [n, size / 2], fp32. (RoFormer, arXiv 2104.09864, eq. 15)

    fp32, since in bf16 the angles of late positions would be off by whole turns.
    """
    frequencies = theta ** (-torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size)
    angles = torch.outer(positions.float(), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + size/2) of x [batch, length, heads, size], as Hugging Face and Megatron do."""
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)  # [length, 1, size / 2], alike for all heads
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def alibi_slopes(heads: int, stretch: float = 1.0) -> Tensor:
    """Return slopes [heads], fp32: r, r^2, ... with r = 2^(-8/heads). Counts that are no power of two interleave the
    slopes of twice the next lower power. (ALiBi, arXiv 2108.12409, and its authors' code)

    stretch: the present length over the longest trained on; above 1 the slopes are divided by it, so that distances
    stay in the range trained on. (Position interpolation, arXiv 2310.13017)
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    between = [2 ** (-8 * (h + 0.5) / power) for h in range(heads - power)]
    return torch.tensor(slopes + between) / max(1.0, stretch)


def attention_bias(span: slice, slopes: Tensor | None, documents: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return what is added to the logits of a span's queries over all keys up to its end, [batch or 1, heads or 1,
    queries, keys].

    With causality alone: None for a span from the beginning, else torch's marker for the mask aligned to the last key,
    both of which flash kernels serve. slopes [heads] penalise distance; documents int [batch, length] forbid attending
    across a boundary.
    """
    if slopes is None and documents is None:
        return causal_lower_right(span.stop - span.start, span.stop) if span.start else None
    device = documents.device if slopes is None else slopes.device  # type: ignore[union-attr]
    position = torch.arange(span.stop, device=device)
    distance = position[span, None] - position
    allowed = (distance >= 0)[None, None]
    if documents is not None:
        allowed = allowed & (documents[:, None, span, None] == documents[:, None, None, : span.stop])
    bias = torch.zeros((), device=device) if slopes is None else -slopes[:, None, None] * distance
    return torch.where(allowed, bias, -math.inf).to(dtype)
