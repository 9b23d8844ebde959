"""A step's work by formulas against the trace of the step."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
from plan.small import with_settings

from megahp.config import Config
from megahp.plan.formulas import rank_works
from megahp.plan.machine import load_machine
from megahp.plan.step_time import estimate, step_time
from megahp.plan.trace import trace
from megahp.plan.work import Work

RUN: dict[str, Any] = {
    "model": {"layers": 3, "width": 512, "heads": 8, "kv_heads": 2, "mlp_width": 1792, "vocab_size": 8192},
    "data": {"train": ["none"], "sequence_length": 1024},
    "batch": {"global_batch": 16, "micro_batch": 2},
    "train": {"tokens": 1e9, "device": "cuda", "dtype": "bfloat16"},
}
GPT = {"activation": "gelu", "norm": "layernorm", "positions": "learned", "bias": True, "tied_embeddings": True}
EXPERTS = {"model.mlp_width": 0, "model.experts": 8, "model.expert_width": 256, "parallel.ep": 2}
CASES: dict[str, dict[str, Any]] = {
    "shards": {},
    "replicas, recomputed": {"parallel.dp_replicate": 2, "compute.recompute": "full"},
    "replicas without shards": {"parallel.dp_replicate": 4, "parallel.dp_shard": 1},
    "tp, sequence, recomputed": {"parallel.tp": 2, "parallel.sequence_parallel": True, "compute.recompute": "full"},
    "tp, zero 1": {"parallel.tp": 2, "parallel.zero": 1},
    "selective, reduced at once": {"compute.recompute": "selective", "parallel.reduce": "every"},
    "pp": {"parallel.pp": 2},
    "zero bubble": {"parallel.pp": 2, "parallel.schedule": "zero-bubble"},
    "gpt-2": {f"model.{key}": value for key, value in {**GPT, "kv_heads": 8}.items()},
    "experts": EXPERTS,
    "muon, tp, replicas": {"optimizer.name": "muon", "parallel.tp": 2, "parallel.dp_replicate": 2},
    "muon, pp, experts": {"optimizer.name": "muon", "parallel.pp": 2, **EXPERTS},
    "dct": {"optimizer.name": "dct"},
    "galore, replicas without shards": {
        **{"optimizer.name": "galore", "optimizer.remainder": False},
        **{"parallel.dp_replicate": 4, "parallel.dp_shard": 1},
    },
}
RANKS = 4


def config_of(case: str) -> Config:
    return with_settings(RUN, CASES[case])


@pytest.fixture(scope="module")
def alone() -> Iterator[ProcessPoolExecutor]:
    """A process without a process group, as a trace needs."""
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        yield executor


def products(work: Work, kind: str) -> Counter[tuple[Any, ...]]:
    found = Counter[tuple[Any, ...]]()
    for kernel, count in work.kernels.items():
        if kernel.kind == kind:
            found[kernel.shape, kernel.phase] += count
    return found


def sent(work: Work) -> Counter[tuple[Any, ...]]:
    """Return the bytes of each kind of collective; the step's few sums of numbers are in no formula."""
    found = Counter[tuple[Any, ...]]()
    for each, count in work.collectives.items():
        if each.axes not in ("world", "ends") and each.bytes > 8000:
            found[each.name, each.axes, each.size] += each.bytes * count
    return found


def moved(work: Work, phase: str) -> float:
    return sum(kernel.bytes * count for kernel, count in work.kernels.items() if kernel.phase == phase)


@pytest.mark.parametrize("case", CASES)
def test_work_is_that_of_the_trace(alone: ProcessPoolExecutor, case: str) -> None:
    config = config_of(case)
    positions = config.parallel.pp
    traced = [alone.submit(trace, config, RANKS, rank * RANKS // positions).result() for rank in range(positions)]
    counted = rank_works(config, RANKS)
    for ours, real in zip(counted, traced, strict=True):
        assert products(ours, "product") == products(real, "product")
        assert products(ours, "attention") == products(real, "attention")
        ours_sent, real_sent = sent(ours), sent(real)
        assert ours_sent.keys() == real_sent.keys()
        for name, size in real_sent.items():  # FSDP2 pads its shards
            assert ours_sent[name] == pytest.approx(size, rel=0.001), name
        for phase in ("forward", "backward", "update"):
            assert moved(ours, phase) == pytest.approx(moved(real, phase), rel=0.5), phase
    # the fullest rank's; of ranks with as many blocks the first stands for the others
    peaks = [max(sum(work.peak.values()) for work in works) for works in (counted, traced)]
    assert peaks[0] == pytest.approx(peaks[1], rel=0.1)
    # and so is the time
    machine = load_machine("h100")
    exact = step_time(traced, config, RANKS, machine).seconds
    assert estimate(config, RANKS, machine).seconds == pytest.approx(exact, rel=0.25)


def test_replicas_without_shards_sum_once_after_the_backward_pass(alone: ProcessPoolExecutor) -> None:
    """They gather no weights, and nothing hides the one sum of their gradients."""
    config, machine = config_of("replicas without shards"), load_machine("h100")
    for work in (rank_works(config, RANKS)[0], alone.submit(trace, config, RANKS).result()):
        assert [count for each, count in work.collectives.items() if each.axes == "dp_replicate"] == [1]
        split = step_time([work], config, RANKS, machine).split
        assert split["exposed dp_replicate"] > 0 and "exposed dp" not in split and not work.peak["gathered"]


@pytest.mark.parametrize("optimizer", ["muon", "dct", "galore"])
def test_moments_are_those_of_the_optimizer(alone: ProcessPoolExecutor, optimizer: str) -> None:
    """On average over the ranks, of which low-rank moments of a matrix are on one."""
    config = with_settings(RUN, {"optimizer.name": optimizer})
    ours = rank_works(config, RANKS)[0].peak["moments"]
    traced = [alone.submit(trace, config, RANKS, rank).result().peak["moments"] for rank in range(RANKS)]
    assert ours == pytest.approx(sum(traced) / RANKS, rel=0.01)
    replicated = with_settings(RUN, {"optimizer.name": optimizer, "parallel.dp_replicate": 2})
    of_replicas = rank_works(replicated, RANKS)[0].peak["moments"]
    if optimizer == "muon":
        assert of_replicas == pytest.approx(2 * ours)
    else:  # those of the matrices have no copies
        outer = 2 * 4 * 2 * config.model.vocab_size * config.model.width / RANKS
        assert of_replicas == pytest.approx(ours + outer, rel=0.001)


def test_no_torch_is_imported() -> None:
    """Formulas import no torch, so that a search of thousands of layouts begins at once."""
    code = "import sys, megahp.plan.step_time, megahp.plan.validation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
