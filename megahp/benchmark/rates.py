"""Measure what a plan wants to know of a device: products by dtype, memory, and how fast kernels are launched."""

import time
from collections.abc import Callable
from typing import Any

import torch

from megahp.benchmark.machine import synchronize

SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices
COPIED = {"cpu": 2**26, "cuda": 2**30}  # bytes, far more than caches hold
DTYPES = ("float32", "float16", "bfloat16")
LAUNCHES, REPEATS = 200, 5  # of which the best counts


def device_rates(device: torch.device, side: int | None = None) -> dict[str, Any]:
    """Return FLOP/s of square products by dtype, bytes a second of a copy (read and written), seconds of a launch.

    The matrices are random: a GPU multiplies constant ones faster, since it then draws less power.
    """
    side, small = side or SIDE[device.type], torch.zeros(1, device=device)
    products = {}
    for name in DTYPES:
        matrix = torch.randn(side, side, device=device).to(getattr(torch, name))
        products[name] = 2 * side**3 / best(lambda matrix=matrix: matrix @ matrix, device)  # type: ignore[misc]
    source = torch.zeros(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() / best(lambda: target.copy_(source), device)
    launch = best(lambda: [small.add_(1) for _ in range(LAUNCHES)], device) / LAUNCHES
    cuda = device.type == "cuda"
    units = torch.cuda.get_device_properties(device).multi_processor_count if cuda else torch.get_num_threads()
    return {"products": products, "memory": copied, "launch": launch, "units": units}


def best(work: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of the fastest of REPEATS calls, after one that does not count."""
    seconds = []
    for _ in range(REPEATS + 1):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])
