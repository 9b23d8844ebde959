"""A traced step against a real one, and against closed forms."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import world
from plan.small import with_settings
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from megahp.config import Config, with_values
from megahp.parallel.layout import fit
from megahp.parallel.mesh import make_mesh
from megahp.plan.trace import recording, step, trace, trace_step
from megahp.scaling.flops import training_flops

RUN: dict[str, Any] = {
    "model": {"layers": 4, "width": 256, "heads": 4, "vocab_size": 4096},
    "data": {"train": ["none"], "sequence_length": 256},
    "batch": {"global_batch": 8, "micro_batch": 2},
    "train": {"tokens": 1e6, "device": "cpu"},
}
MIXTURE = {"model.experts": 8, "model.expert_width": 128}
GPT = {"activation": "gelu", "norm": "layernorm", "positions": "learned", "bias": True, "tied_embeddings": True}
CASES: dict[str, dict[str, Any]] = {
    "shards": {},
    "replicas": {"parallel.dp_replicate": 2, "parallel.dp_shard": 1},
    "shards, zero 2": {"parallel.zero": 2},
    "tp": {"parallel.tp": 2},
    "tp, sequence": {"parallel.tp": 2, "parallel.sequence_parallel": True},
    "context": {"parallel.cp": 2},
    "context, documents": {"parallel.cp": 2, "data.mask_documents": True},
    "pp": {"parallel.pp": 2},
    "pp, interleaved": {"parallel.pp": 2, "parallel.schedule": "interleaved"},
    "pp, zero bubble": {"parallel.pp": 2, "parallel.schedule": "zero-bubble"},
    "bfloat16": {"train.dtype": "bfloat16", "train.device": "cpu"},
    "recomputed": {"compute.recompute": "full"},
    "muon": {"optimizer.name": "muon"},
    "dct": {"optimizer.name": "dct", "optimizer.rank": 64},
    "experts": MIXTURE,
    "experts, one product": MIXTURE | {"train.dtype": "bfloat16"},
    "gpt-2": {f"model.{key}": value for key, value in GPT.items()},
}


def config_of(case: str) -> Config:
    return with_settings(RUN, CASES[case])


def without_others(case: str, rank: int) -> int:
    """Return `allocated` of a rank whose collectives do nothing: gloo's threads free what they have sent at moments of
    their own, by which the peaks of two real ranks differ from run to run (docs/plan.md)."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
    try:
        return allocated(case)
    finally:
        dist.destroy_process_group()


def allocated(case: str) -> int:
    """Return the peak of what PyTorch's allocator gives to a step on real tensors, in bytes."""
    config = config_of(case)
    mesh = make_mesh(fit(config.parallel, 2), torch.device("cpu"))
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled, recording(mesh) as recorder:
        step(config, mesh, recorder)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.fixture(scope="module")
def alone() -> Iterator[ProcessPoolExecutor]:
    """A process without a process group, as a trace needs."""
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        yield executor


def peak(case: str, rank: int) -> int:
    return sum(trace(config_of(case), 2, rank).peak.values())


@pytest.mark.parametrize("case", CASES)
def test_peak_memory_is_that_of_a_real_step(alone: ProcessPoolExecutor, case: str) -> None:
    """Within 5 %; most are equal to the byte."""
    traced = [alone.submit(peak, case, rank).result() for rank in range(2)]
    if case.startswith("pp"):  # whose ranks agree on shapes before a step
        real = world.run(2, allocated, case)
    else:
        real = [alone.submit(without_others, case, rank).result() for rank in range(2)]
    assert traced == pytest.approx(real, rel=0.05)


def totals(layers: int, ranks: int, **values: Any) -> dict[str, Any]:
    """Return a trace's floating-point operations for each token, and its collectives' calls and bytes by axes."""
    config = config_of("shards")
    for key, value in {"model.layers": layers, **values}.items():
        config = with_values(config, {key: value})
    found = trace(config, ranks, 0, 1)
    calls = Counter[tuple[str, str, str]]()
    for collective, count in found.collectives.items():
        calls[collective.name, collective.axes, collective.phase] += count
    return {"products": found.flops("product"), "attention": found.flops("attention"), "calls": calls}


@pytest.mark.parametrize(("case", "layers"), [("shards", 1), ("shards", 3), ("experts, one product", 2)])
def test_operations_are_those_of_the_closed_form(alone: ProcessPoolExecutor, case: str, layers: int) -> None:
    """But for attention's scores, which are computed once more in the backward pass, except in bf16 on the CPU, where
    attention is plain products."""
    found = alone.submit(totals, layers, 2, **CASES[case]).result()
    config = with_values(config_of(case), {"model.layers": layers})
    model, tokens = config.model, config.batch.micro_batch * config.data.sequence_length
    expected = training_flops(model, config.data.sequence_length, causal=False)
    scores = 2 * config.data.sequence_length * model.width * layers if found["attention"] else 0
    assert found["products"] + found["attention"] == tokens * (expected + scores)


def test_collectives_of_a_sharded_step(alone: ProcessPoolExecutor) -> None:
    """Each of the units, the blocks and the rest, is gathered twice and reduced once."""
    calls = alone.submit(totals, 3, 2).result()["calls"]
    data = {key: count for key, count in calls.items() if key[1] == "dp_shard"}
    assert {(name, phase) for name, _, phase in data} == {
        ("all-gather", "forward"),
        ("all-gather", "backward"),
        ("reduce-scatter", "backward"),
    }
    assert list(data.values()) == [4, 4, 4]


ALIKE: dict[str, dict[str, Any]] = {
    "shards": {"model.layers": 6, "batch.global_batch": 20},
    "context": {"model.layers": 7, "batch.global_batch": 10, "model.window": 32, "model.full_attention_every": 2},
    "pp": {"model.layers": 6, "batch.global_batch": 12},
    "muon": {"model.layers": 6, "batch.global_batch": 20},
    "dct": {"model.layers": 6, "batch.global_batch": 20},
}


@pytest.mark.parametrize("case", ALIKE)
def test_what_is_alike_is_traced_once(alone: ProcessPoolExecutor, case: str) -> None:
    """Six blocks and five microbatches by those of four and three; seven of two kinds by five; pipelines' too.
    Of matrices that ranks own, a rank's are not alike."""
    config = with_values(config_of(case), ALIKE[case])
    whole, extrapolated = alone.submit(trace, config, 2).result(), alone.submit(trace_step, config, 2).result()
    assert whole.flops("product", "attention") == extrapolated.flops("product", "attention")
    assert whole.collectives == extrapolated.collectives
    assert sum(extrapolated.peak.values()) == pytest.approx(sum(whole.peak.values()), rel=0.001)
    assert extrapolated.resident == pytest.approx(whole.resident, rel=0.001)


def test_a_trace_is_that_of_a_new_process(alone: ProcessPoolExecutor) -> None:
    """Nothing that DTensor remembers of those before is missing."""
    alone.submit(trace, config_of("tp"), 2).result()
    with ProcessPoolExecutor(1, get_context("spawn")) as new:
        first = new.submit(trace, config_of("tp"), 2)
        assert alone.submit(trace, config_of("tp"), 2).result() == first.result()


def test_ranks_are_traced_one_after_another(alone: ProcessPoolExecutor) -> None:
    """Muon gathers over groups of the trace's own, not over those of the trace before, which are gone."""
    config = with_values(config_of("muon"), {"parallel.dp_replicate": 2})
    first, last = (alone.submit(trace, config, 4, rank).result() for rank in (0, 3))
    assert first.collectives == last.collectives


def test_the_command(tmp_path: Path) -> None:
    run = "[model]\nvocab_size = 4096\nlayers = 4\n[data]\ntrain = ['none']\n[parallel]\npp = 2\ntp = 2\n"
    (tmp_path / "run.toml").write_text(run)
    command = [sys.executable, "-m", "megahp", "plan", "run.toml", "--ranks"]
    done = subprocess.run([*command, "8", "--json", "plan.json"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("8 ranks: pp 2 x dp_shard 2 x tp 2\npipeline rank 0\n  peak memory")
    found = json.loads((tmp_path / "plan.json").read_text())["ranks"]
    assert [each["rank"] for each in found] == [0, 4] and found[0]["kernels"] and found[1]["collectives"]
    for words, problem in ((["6"], "needs a multiple of 4 ranks"), (["8", "parallel.pp=9"], "model.layers = 4")):
        done = subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and problem in done.stderr and done.stderr.count("\n") == 1
