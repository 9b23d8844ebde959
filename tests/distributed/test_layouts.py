"""Every layout trains the same model: loss, every gradient, norms, per-example norms and weights against one rank.

That one rank takes its loss from logits, the layouts from slices of the vocabulary that do not divide it evenly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest import mock

import pytest

from distributed import world
from distributed.test_cross_entropy import plain_losses
from distributed.training import MODELS, differences, settings_of, train_cases
from megahp.config import Config
from megahp.model import transformer
from megahp.parallel import cross_entropy

SP = ("parallel.tp=2", "parallel.sequence_parallel=true")
# ranks -> layout -> settings. All run multiples of 8 sequences, from one to four microbatches of them.
LAYOUTS = {
    2: {
        "tp2": ("parallel.tp=2", "batch.micro_batch=8"),
        "tp2 sp": (*SP, "batch.micro_batch=4"),
        "shard2": ("batch.micro_batch=4",),
        "replicate2": ("parallel.dp_replicate=2", "batch.micro_batch=2"),
        "ep2": ("parallel.ep=2", "batch.micro_batch=4"),
    },
    4: {
        "tp2 shard2": ("parallel.tp=2", "batch.micro_batch=4"),
        "tp2 sp shard2": (*SP, "batch.micro_batch=4"),
        "tp2 sp replicate2": (*SP, "parallel.dp_replicate=2", "batch.micro_batch=4"),
        "replicate2 shard2": ("parallel.dp_replicate=2",),
        "ep2 shard4": ("parallel.ep=2",),
        "ep2 tp2 sp": ("parallel.ep=2", *SP, "batch.micro_batch=4"),
        "ep2 replicate2": ("parallel.ep=2", "parallel.dp_replicate=2"),
    },
}


def runs(model: str, layout: str) -> bool:
    """Models with experts run on two ranks, and on four where experts are parallel; others where they are not."""
    return layout in LAYOUTS[2] or "ep2" in layout if model.startswith("moe") else "ep2" not in layout


DTYPES = {"float32": (1e-5, None), "float64": (1e-10, 1e-10)}  # tolerance of measures, of weights
CELLS = [
    (layout, model, dtype)
    for layouts in LAYOUTS.values()
    for layout in layouts
    for model in MODELS
    for dtype in DTYPES
    if runs(model, layout)
]
BF16 = [
    ("tp2 sp shard2", "gpt2", "bfloat16"),
    ("replicate2 shard2", "gpt2", "bfloat16"),
    ("ep2 shard4", "moe", "bfloat16"),
]


def steps_of(model: str, dtype: str) -> int:
    return {("llama", "float32"): 10}.get((model, dtype), 1 if dtype == "bfloat16" else 3)


def train_plainly(cases: Mapping[str, tuple[Config, int]]) -> dict[str, dict[str, Any]]:
    with mock.patch.object(transformer, "linear_cross_entropy", plain_losses):
        return train_cases(cases)


def train_in_slices(cases: Mapping[str, tuple[Config, int]]) -> dict[str, dict[str, Any]]:
    with mock.patch.object(cross_entropy, "rows_at_once", lambda *_: 24):
        return train_cases(cases)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    found = {}
    wanted = dict.fromkeys((model, dtype) for _, model, dtype in (*CELLS, *BF16))
    for ranks, layouts in {1: {"one": ()}, **LAYOUTS}.items():
        cases = {
            f"{layout}/{model}/{dtype}": (settings_of(model, f"train.dtype={dtype}", *words), steps_of(model, dtype))
            for layout, words in layouts.items()
            for model, dtype in wanted
            if ranks == 1 or (layout, model, dtype) in (*CELLS, *BF16)
        }
        found |= world.run(ranks, train_plainly if ranks == 1 else train_in_slices, cases)[-1]
    return found


@pytest.mark.parametrize(("layout", "model", "dtype"), CELLS)
def test_layout_equals_one_rank(outcomes: dict[str, Any], layout: str, model: str, dtype: str) -> None:
    rtol, weights_rtol = DTYPES[dtype]
    got, wanted = outcomes[f"{layout}/{model}/{dtype}"], outcomes[f"one/{model}/{dtype}"]
    assert differences(got, wanted, rtol, weights_rtol) == []


@pytest.mark.parametrize(("layout", "model", "dtype"), BF16)
def test_bf16_gradients_differ_by_bf16_rounding_only(
    outcomes: dict[str, Any], layout: str, model: str, dtype: str
) -> None:
    """No layout adds up in half precision what one rank adds up in single."""
    got, wanted = outcomes[f"{layout}/{model}/{dtype}"]["grads"], outcomes[f"one/{model}/{dtype}"]["grads"]
    for name in wanted:
        error = (got[name] - wanted[name]).norm() / wanted[name].norm()
        assert error < 0.02, (name, error)
