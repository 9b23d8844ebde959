"""Context parallelism's attention on a CUDA device: flash kernels serve every span of a rank's tokens."""

from __future__ import annotations

import pytest
import torch
from parallel.test_context import HEADS, LENGTH, attended, places, plain_attention, tiles_of, together
from torch.profiler import ProfilerActivity, profile

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_flash_kernels_attend_as_one(kv_heads: int, device: str = "cuda") -> None:
    random = torch.Generator().manual_seed(kv_heads)
    given = [
        torch.randn(2, heads, LENGTH, 64, generator=random).div(2).bfloat16().to(device).requires_grad_()
        for heads in (HEADS, kv_heads, kv_heads)
    ]
    exact = [x.detach().double().cpu().requires_grad_() for x in given]
    wanted = plain_attention(*exact, None, None)
    towards = torch.randn(wanted.shape, generator=random).bfloat16()
    wanted_grads = torch.autograd.grad(wanted, exact, towards.double())
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        parts = {place: tiles_of(place, None, None, torch.bfloat16) for place in places(2)}
        mixed = together([attended(place, given, parts[place]) for place in parts], 2)
    assert not any("math" in event.key for event in profiled.key_averages())
    grads = torch.autograd.grad(mixed, given, towards.to(device))
    for got, true in zip((mixed, *grads), (wanted, *wanted_grads), strict=True):
        assert (got.double().cpu() - true).norm() < 0.01 * true.norm()
