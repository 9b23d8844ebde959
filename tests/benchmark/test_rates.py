"""The rates of this machine's CPU, in orders of magnitude."""

from __future__ import annotations

import pytest
import torch

from megahp.benchmark import rates
from megahp.benchmark.rates import best, device_rates


def test_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rates.SIDE, "cpu", 128)
    monkeypatch.setitem(rates.COPIED, "cpu", 2**22)
    found = device_rates(torch.device("cpu"))
    assert all(1e6 < found["products"][dtype] < 1e14 for dtype in rates.DTYPES)
    assert 1e7 < found["memory"] < 1e13 and 1e-8 < found["launch"] < 1e-2


def test_the_first_call_does_not_count() -> None:
    calls: list[int] = []
    assert best(lambda: calls.append(0), torch.device("cpu")) < 1 and len(calls) == rates.REPEATS + 1
