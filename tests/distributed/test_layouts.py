"""Every layout trains the same model: loss, every gradient, norms, per-example norms and weights against one rank."""

from __future__ import annotations

from typing import Any

import pytest

from distributed import world
from distributed.training import MODELS, differences, settings_of, train_cases

LAYOUTS = {
    2: {
        "tp2": ("parallel.tp=2",),
        "tp2 sp": ("parallel.tp=2", "parallel.sequence_parallel=true"),
        "shard2": (),
        "replicate2": ("parallel.dp_replicate=2",),
    },
    4: {
        "tp2 shard2": ("parallel.tp=2",),
        "tp2 sp shard2": ("parallel.tp=2", "parallel.sequence_parallel=true"),
        "tp2 sp replicate2": ("parallel.tp=2", "parallel.sequence_parallel=true", "parallel.dp_replicate=2"),
        "replicate2 shard2": ("parallel.dp_replicate=2",),
    },
}
CELLS = [(layout, model) for layouts in LAYOUTS.values() for layout in layouts for model in MODELS]
DTYPES = {"float32": (1e-5, None), "float64": (1e-10, 1e-10)}  # tolerance of measures, of weights


def steps_of(model: str, dtype: str) -> int:
    return 10 if (model, dtype) == ("llama", "float32") else 3


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    found = {}
    for ranks, layouts in {1: {"one": ()}, **LAYOUTS}.items():
        cases = {
            f"{layout}/{model}/{dtype}": (settings_of(model, f"train.dtype={dtype}", *words), steps_of(model, dtype))
            for layout, words in layouts.items()
            for model in MODELS
            for dtype in DTYPES
        }
        found |= world.run(ranks, train_cases, cases)[-1]
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("layout", "model"), CELLS)
def test_layout_equals_one_rank(outcomes: dict[str, Any], layout: str, model: str, dtype: str) -> None:
    rtol, weights_rtol = DTYPES[dtype]
    got, wanted = outcomes[f"{layout}/{model}/{dtype}"], outcomes[f"one/{model}/{dtype}"]
    assert differences(got, wanted, rtol, weights_rtol) == []
