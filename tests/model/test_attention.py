"""Attention in blocks of queries, against torch's own."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megahp.model import attention
from megahp.model.attention import attend, attend_in_blocks
from megahp.model.positions import alibi_slopes, attention_bias

LENGTH, SIZE = 24, 8
DOCUMENTS = torch.tensor([[0] * 7 + [1] * 17, [0] * 20 + [1] * 4])


def inputs(dtype: torch.dtype, kv_heads: int, queries: int = LENGTH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, queries, SIZE), (2, kv_heads, LENGTH, SIZE), (2, kv_heads, LENGTH, SIZE))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def outcome(function: Any, given: list[Tensor], *arguments: Any) -> list[Tensor]:
    mixed = function(*given, *arguments)
    upstream = torch.linspace(-1, 1, mixed.numel(), dtype=torch.float64).view_as(mixed).to(mixed.dtype)
    return [mixed.detach(), *torch.autograd.grad(mixed, given, upstream)]


@pytest.mark.parametrize("at_once", [5, 24, 100])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("mask", ["causal", "later queries", "documents", "alibi", "window"])
def test_blocks_attend_as_the_whole(mask: str, kv_heads: int, at_once: int) -> None:
    whole = slice(0, LENGTH)
    bias = {
        "causal": None,
        "later queries": causal_lower_right(10, LENGTH),
        "documents": attention_bias(whole, None, DOCUMENTS, torch.float64),
        "alibi": attention_bias(whole, alibi_slopes(4), None, torch.float64),
        "window": attention_bias(whole, None, DOCUMENTS, torch.float64, 3),
    }[mask]
    given = inputs(torch.float64, kv_heads, 10 if mask == "later queries" else LENGTH)
    with mock.patch.object(attention, "QUERIES_AT_ONCE", at_once):
        found = outcome(attend_in_blocks, given, bias, 0.3)
    torch.testing.assert_close(found, outcome(attend, given, bias, 0.3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_bfloat16_is_about_as_near_as_the_fused_kernel(kv_heads: int) -> None:
    """Of the result and of each gradient, in norm: at most 2.5 times as far from float64's, on the same inputs."""
    given = inputs(torch.bfloat16, kv_heads)
    exact = outcome(attend, [x.detach().double().requires_grad_() for x in given], None, 0.3)
    fused = torch.nn.functional.scaled_dot_product_attention
    theirs = outcome(lambda q, k, v: fused(q, k, v, is_causal=True, scale=0.3, enable_gqa=kv_heads < 4), given)
    for ours, other, right in zip(outcome(attend_in_blocks, given, None, 0.3), theirs, exact, strict=True):
        error, allowed = (ours.double() - right).norm(), (other.double() - right).norm()
        assert error <= 2.5 * allowed, (error / allowed).item()
