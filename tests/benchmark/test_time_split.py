"""Test the split of a step's time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch.autograd import DeviceType

from megahp.benchmark import time_split


def event(name: str, start: float, end: float, device: DeviceType = DeviceType.CPU) -> Any:
    span = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(
        name=name, time_range=span, device_type=device, is_user_annotation=name == "waiting for data"
    )


def test_time_is_split_without_overlap() -> None:
    split = time_split
    host = [event("waiting for data", 0, 10), event("aten::copy_", 5, 8), event("aten::mm", 20, 50)]
    host += [event("aten::mul", 30, 40), event("gloo:all_reduce", 45, 60), event("MmBackward0", 50, 70)]
    results = split.split_of(split.cpu_spans(host), 100)
    assert results == pytest.approx({"data": 0.1, "compute": 0.3, "communication": 0.1, "host": 0.5})

    cuda = DeviceType.CUDA
    device = [event("gemm", 5, 30, cuda), event("ncclDevKernel_AllReduce", 20, 40, cuda)]
    device += [event("Memcpy HtoD (Pinned -> Device)", 38, 45, cuda), event("waiting for data", 0, 90, cuda)]
    results = split.split_of(split.cuda_spans([*host, *device]), 100)
    assert results == pytest.approx({"compute": 0.25, "communication": 0.1, "data": 0.1, "host": 0.55})
