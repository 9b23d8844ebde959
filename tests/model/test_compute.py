"""Compiled blocks, recomputed activations and half precision train the same model, per-example norms included."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from distributed import world
from distributed.training import Training, differences, settings_of, train_cases
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from megahp.data.loader import Batch

F64 = "train.dtype=float64"
FULL, SELECTIVE, COMPILE = "compute.recompute=full", "compute.recompute=selective", "compute.compile=true"
SP = ("parallel.tp=2", "parallel.sequence_parallel=true", "batch.micro_batch=4")
CP = ("parallel.cp=2", "batch.micro_batch=8")
# ranks -> case -> settings
WAYS: dict[int, dict[str, tuple[str, ...]]] = {
    1: {
        "full": (FULL,),
        "every second block": (FULL, "compute.recompute_every=2"),
        "selective": (SELECTIVE,),
        "compiled": (COMPILE,),
        "compiled, full": (COMPILE, FULL),
        "compiled, selective": (COMPILE, SELECTIVE),
    },
    2: {
        "shard2 full": (FULL,),
        "shard2 selective": (SELECTIVE,),
        "tp2 sp full": (FULL, *SP),
        "tp2 sp selective": (SELECTIVE, *SP),
        "cp2 full": (FULL, *CP),
        "cp2 selective": (SELECTIVE, *CP),
        "cp2 compiled": (COMPILE, *CP),  # shards over its ranks, too
        "tp2 sp compiled, full": (COMPILE, FULL, *SP),
        "moe ep2 full": (FULL, "parallel.ep=2"),
        "moe ep2 selective": (SELECTIVE, "parallel.ep=2"),
        "moe ep2 compiled": (COMPILE, "parallel.ep=2"),
    },
}


def model_of(way: str) -> str:
    return "moe" if way.startswith("moe") else "llama"


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    found = {}
    for ranks, ways in WAYS.items():
        cases = {name: (settings_of(model_of(name), F64, *words), 2) for name, words in ways.items()}
        plain = {model: (settings_of(model, F64), 2) for model in ("llama", "moe")} if ranks == 1 else {}
        found |= world.run_afresh(ranks, train_cases, cases | plain)[-1]
    return found


@pytest.mark.parametrize("way", [name for ways in WAYS.values() for name in ways])
def test_trains_the_same_model(outcomes: dict[str, Any], way: str) -> None:
    assert differences(outcomes[way], outcomes[model_of(way)], 1e-10, 1e-10) == []


def errors_of_compiled_gradients() -> list[float]:
    """In bfloat16, of microbatches of one size and of another, in shares of the gradient's norm."""
    words = ("train.dtype=bfloat16", "model.layers=1", "model.width=64", "model.heads=1", "model.kv_heads=1")
    engines = [
        Training(settings_of("llama", *words, "data.sequence_length=128", *more)).engine for more in ((), (COMPILE,))
    ]
    errors = []
    for size in (4, 6):
        tokens = torch.arange(size * 129).view(size, 129) % 127
        found = []
        for engine in engines:
            engine.forward_backward([Batch(tokens, None, np.arange(size))], 1, size * 128)
            found.append(torch.cat([grad.flatten() for grad in engine.gradients()]))
            engine.zero()
        errors.append(((found[1] - found[0]).norm() / found[0].norm()).item())
    return errors


def test_another_size_of_microbatches_compiles_to_the_same() -> None:
    """torch 2.13's blocks for any size gave gradients of NaN in bfloat16, where those for one size are right."""
    assert all(error < 0.05 for error in world.run_afresh(1, errors_of_compiled_gradients)[0])


def compilations_of_growing_batches() -> int:
    """Of a model with experts, forward and backward under two weights of a token's loss."""
    training = Training(settings_of("moe", COMPILE))
    (model,) = training.engine.stages
    x = torch.zeros(2, 16, dtype=torch.int64)
    for weight in (0.5, 0.25, 0.125):
        model(x, targets=x, loss_weight=weight).sum().backward()
        if weight == 0.5:
            first = counters["frames"]["total"]
    return counters["frames"]["total"] - first


def test_another_weight_of_the_loss_compiles_nothing_anew() -> None:
    """The weight changes with the batch and with float16's loss scale."""
    assert world.run_afresh(1, compilations_of_growing_batches) == [0]


def test_importing_changes_nothing_of_torch() -> None:
    code = (
        "from torch.utils.checkpoint import SAC_IGNORED_OPS as ignored; before = set(ignored);"
        "import megahp.model.build; assert ignored == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def flops_of_a_step() -> dict[str, int]:
    found = {}
    for words in ((), (FULL,), (FULL, "compute.recompute_every=2"), (SELECTIVE,)):
        training = Training(settings_of("llama", *words))
        with FlopCounterMode(display=False) as counter:
            training.step()
        found[" ".join(words)] = counter.get_total_flops()
    return found


def test_what_is_computed_again() -> None:
    """Full: all of the forward's matrix products in the blocks, half of it in every second of two; selective: none."""
    flops = world.run_afresh(1, flops_of_a_step)[0]
    plain, full, second, selective = flops.values()
    assert selective == plain
    assert 1.15 * plain < full < 4 / 3 * plain  # the unembedding is no block's, and is computed again anyway
    assert second - plain == (full - plain) / 2
