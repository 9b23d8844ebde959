"""Positions: rotary embeddings, ALiBi, and which keys a query attends to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megahp.config import ModelConfig


def rotary(positions: Tensor, model: ModelConfig, windowed: bool = False) -> tuple[Tensor, Tensor]:
    """Return cos and sin of positions [n] x frequencies, each [n, size / 2], fp32, size the rotated dimensions of a
    head. (RoFormer, arXiv 2104.09864, eq. 15)

    fp32, since in bf16 the angles of late positions would be off by whole turns. windowed: of the blocks with a window.
    """
    size, own_theta = int(model.head_size * model.rope_fraction), windowed and model.window_rope_theta > 0
    theta = model.window_rope_theta if own_theta else model.rope_theta
    frequencies = theta ** (-torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size)
    magnitude = 1.0
    if model.rope_scaling != "none" and not own_theta:
        frequencies, magnitude = _stretch(frequencies, model, size), model.rope_magnitude or 1.0
    angles = torch.outer(positions.float(), frequencies)
    return angles.cos() * magnitude, angles.sin() * magnitude


def _stretch(frequencies: Tensor, model: ModelConfig, size: int) -> Tensor:
    """Return the frequencies [size / 2] for sequences `rope_factor` times as long as the original ones.

    Between those that turn rope_slow and rope_fast times in the original length a share `kept` goes from 0 to 1:
    linearly in the turns for llama3 (its authors' code), in the dimension's index for yarn (arXiv 2309.00071, 3.2).
    """
    if model.rope_scaling == "linear":  # arXiv 2306.15595
        return frequencies / model.rope_factor
    slow, fast, length = model.rope_slow, model.rope_fast, model.rope_original_length
    if model.rope_scaling == "llama3":
        turns = length * frequencies / (2 * math.pi)
        kept = (turns - slow) / (fast - slow)
    else:

        def index(turns: float) -> float:
            """Return the index of the frequency that turns this often."""
            return size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(model.rope_theta))

        first, last = max(math.floor(index(fast)), 0), min(math.ceil(index(slow)), size - 1)
        order = torch.arange(size // 2, device=frequencies.device, dtype=torch.float32)
        kept = 1 - (order - first) / max(last - first, 0.001)
    kept = kept.clamp(0, 1)
    return frequencies * kept + frequencies / model.rope_factor * (1 - kept)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + size/2) of the first `size` dimensions of x [batch, length, heads, head_size], as
    Hugging Face and Megatron do; cos, sin: [length, size / 2]."""
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)  # [length, 1, size / 2], alike for all heads
    half = cos.shape[-1]
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)


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


@dataclass(frozen=True)
class Tile:
    """A part of a rank's attention: consecutive queries and all the keys that any of them attends to.

    bias: added to the logits, [queries, keys] or [batch or 1, heads or 1, queries, keys], -inf where a query does not
    attend; None = causal, the first query at the first key, or one query, at the last key.
    """

    queries: slice  # of the rank's own tokens
    keys: slice  # of whole sequences
    bias: Tensor | None


def tiles(
    spans: Sequence[slice],
    slopes: Tensor | None,
    documents: Tensor | None,
    dtype: torch.dtype,
    window: int,
    device: torch.device | None,
    queries_at_once: int,
) -> tuple[Tile, ...]:
    """Split the attention of a rank, which holds these spans of every sequence, into tiles.

    slopes [heads] penalise distance; documents int [batch, length], ascending in each row, forbid attending across a
    boundary; `window` tokens, itself included, are as far back as a token attends (0 = all).

    queries_at_once: the queries of a tile, whose keys begin where its first query's window does and, on a CPU, its
    document; 0 = one tile a span, of all keys up to its end, for torch's fused kernels.
    """
    found, done = [], 0
    for span in spans:
        size = queries_at_once or span.stop - span.start
        for start in range(span.start, span.stop, size):
            queries, first = slice(start, min(start + size, span.stop)), 0
            if queries_at_once and window:
                first = max(0, start + 1 - window)
            if queries_at_once and documents is not None and documents.device.type == "cpu":  # a GPU would have to wait
                same = documents == documents[:, start, None]
                first = max(first, int(same.int().argmax(1).min()))
            keys = slice(first, queries.stop)
            bias = _bias(queries, keys, slopes, documents, dtype, window, device, fused=not queries_at_once)
            found.append(Tile(slice(done, done + queries.stop - start), keys, bias))
            done += queries.stop - start
    return tuple(found)


def _bias(
    queries: slice,
    keys: slice,
    slopes: Tensor | None,
    documents: Tensor | None,
    dtype: torch.dtype,
    window: int,
    device: torch.device | None,
    fused: bool,
) -> Tensor | None:
    """Return a tile's bias. fused: causality alone is None or torch's marker for a mask aligned to the last key, both
    of which flash kernels serve."""
    windowed = 0 < window < keys.stop - keys.start
    if fused and slopes is None and documents is None and not windowed:
        if not queries.start or queries.stop - queries.start == 1:
            return None
        from torch.nn.attention.bias import causal_lower_right  # here: it imports torch._dynamo, for half a second

        return causal_lower_right(queries.stop - queries.start, keys.stop)
    position = torch.arange(keys.stop, device=device)
    distance = position[queries, None] - position[keys]
    allowed = distance >= 0
    if windowed:
        allowed = allowed & (distance < window)
    if documents is not None:
        allowed = allowed & (documents[:, None, queries, None] == documents[:, None, None, keys])
    bias = torch.zeros((), device=device) if slopes is None else -slopes[None, :, None, None] * distance
    return torch.where(allowed, bias, -math.inf).to(dtype)
