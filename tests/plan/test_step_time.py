"""The time model: single kernels and collectives by hand, and what hides behind what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megahp.config import Config, resolve, with_values
from megahp.errors import UserError
from megahp.parallel.layout import Layout
from megahp.plan.machine import Efficiency, Machine, load_machine
from megahp.plan.step_time import GAP, beside, collective_seconds, estimate, kernel_seconds, placement
from megahp.plan.work import Collective, Kernel

FULL = Efficiency(products=1, attention=1, memory=1, node=1, network=1, contention=0)


@pytest.fixture(scope="module")
def machine() -> Machine:
    return replace(load_machine("h100"), efficiency=FULL)


def product(m: int, n: int, k: int, dtype: str = "bfloat16") -> Kernel:
    return Kernel("mm", "product", (1, m, n, k), dtype, 2 * m * n * k, 2 * (m * k + k * n + m * n), "forward")


def rate(kernel: Kernel, machine: Machine) -> float:
    """Share of the peak."""
    return kernel.flops / kernel_seconds(kernel, machine) / machine.peak.bfloat16


def test_a_large_product_reaches_the_best(machine: Machine) -> None:
    assert rate(product(16896, 8192, 16384), machine) == pytest.approx(machine.best.products, rel=0.03)


def test_small_odd_and_thin_products_are_slower(machine: Machine) -> None:
    large = rate(product(16896, 8192, 8192), machine)
    one_more_wave = rate(product(128 * 133, 256, 8192), machine)  # 133 tiles of 132 multiprocessors
    assert one_more_wave < 0.65 * large
    assert rate(product(16896, 8192, 64), machine) < 0.5 * large  # bound by memory
    assert rate(product(16896, 8200, 8192), machine) < 0.9 * large  # multiples of 8 alone
    assert rate(product(16896, 8191, 8192), machine) < 0.1 * large  # not by the matrix units
    assert rate(product(64, 64, 64), machine) < 0.001


def test_memory_is_moved_at_its_bandwidth(machine: Machine) -> None:
    kernel = Kernel("add", "memory", (), "bfloat16", 0, 10**9, "forward")
    assert kernel_seconds(kernel, machine) == pytest.approx(1e9 / 3.35e12 + GAP)
    half = replace(machine, efficiency=replace(FULL, memory=0.5))
    assert kernel_seconds(kernel, half) == pytest.approx(2e9 / 3.35e12 + GAP)


def test_causal_attention_is_half(machine: Machine) -> None:
    shape, whole = (1, 32, 32768, 32768, 128), 4 * 32 * 32768**2 * 128
    kernel = Kernel("attention", "attention", shape, "bfloat16", whole, 0, "forward")
    seconds = whole / 2 / (machine.peak.bfloat16 * machine.best.attention)
    assert kernel_seconds(kernel, machine) == pytest.approx(seconds, rel=0.03)
    assert kernel_seconds(kernel, machine, 0.5) == pytest.approx(2 * kernel_seconds(kernel, machine), rel=0.01)


@pytest.mark.parametrize(
    ("axes", "nodes", "local"),
    [("tp", 1, 4), ("dp_shard", 4, 2), ("pp", 2, 1), ("dp_shard_ep", 4, 2), ("world", 8, 8), ("cp_tp", 1, 4)],
)
def test_where_groups_lie(axes: str, nodes: int, local: int) -> None:
    """2 x 8 x 4 = 64 ranks on nodes of 8: pp, dp_shard, tp."""
    assert placement(axes, Layout(pp=2, dp_shard=8, tp=4), 8) == (nodes, local)


def test_collectives_by_hand(machine: Machine) -> None:
    layout, size = Layout(dp_shard=16, tp=8), 8 * 10**9
    links = machine.links
    inside = collective_seconds(Collective("all-reduce", "tp", 8, size, "forward"), layout, machine)
    assert inside == pytest.approx(2 * (size * 7 / 8 / links.node_bandwidth + 7 * links.node_latency))
    # a rank a node: each has its own adapter
    across = collective_seconds(Collective("all-gather", "dp_shard", 16, size, "forward"), layout, machine)
    assert across == pytest.approx(size * 15 / 16 / links.network_bandwidth + 15 * links.network_latency)
    # all ranks of the nodes: the adapters of eight together, or the links inside, whichever is slower
    both = collective_seconds(Collective("all-gather", "dp_shard", 128, size, "forward"), Layout(dp_shard=128), machine)
    slower = min(links.node_bandwidth, 8 * links.network_bandwidth)
    assert both == pytest.approx(size * 127 / 128 / slower, rel=0.02)


def test_what_is_hidden_adds_what_is_longer_and_a_share(machine: Machine) -> None:
    assert beside(1.0, 3.0, machine) == 0 and beside(3.0, 1.0, machine) == 2
    contended = replace(machine, efficiency=replace(FULL, contention=0.25))
    assert beside(1.0, 3.0, contended) == 0.25 and beside(3.0, 1.0, contended) == 2.25


def config(**settings: Any) -> Config:
    tree = {"model": {"preset": "llama-3-8b"}, "data": {"train": ["none"], "sequence_length": 8192}}
    found = resolve.resolve([("test", {**tree, "train": {"tokens": 1e9, "dtype": "bfloat16"}})], written=True).config
    values = {"batch.global_batch": 64, "batch.micro_batch": 1, "compute.recompute": "full"}
    return with_values(found, {**values, **settings})


def test_an_estimate_adds_up() -> None:
    """The split's parts are the step, and utilization is of the peak."""
    machine = load_machine("h100")
    for settings in ({}, {"parallel.tp": 2, "parallel.pp": 4}):
        found = estimate(config(**settings), 64, machine)
        assert sum(found.split.values()) == pytest.approx(found.seconds)
        assert 0.15 < found.mfu < found.hfu < 0.7
        assert found.bytes == sum(found.peak.values()) < machine.usable
        assert found.tokens_per_second == pytest.approx(64 * 8192 / found.seconds)


def test_slower_links_cost_what_waits_for_them() -> None:
    machine = load_machine("h100")
    slow = replace(machine, links=replace(machine.links, node_bandwidth=machine.links.node_bandwidth / 4))
    tensor = config(**{"parallel.tp": 8})
    before, after = (estimate(tensor, 64, each).split["exposed tp"] for each in (machine, slow))
    assert 3 < after / before < 4


def test_shards_are_gathered_beside_what_is_computed() -> None:
    """Tensor parallelism's collectives are waited for, the shards' add a share alone; copies are summed at the end."""
    machine = load_machine("h100")
    sharded = estimate(config(**{"parallel.tp": 2}), 64, machine).split
    assert {name for name in sharded if name.startswith("exposed")} == {"exposed dp", "exposed tp"}
    settings = {"model.layers": 4, "parallel.dp_replicate": 0, "parallel.dp_shard": 1}
    copies = estimate(config(**settings), 64, machine).split
    assert copies["exposed dp_replicate"] > 0 and "exposed dp" not in copies


def test_longer_pipelines_have_larger_bubbles() -> None:
    machine = load_machine("h100")
    shares = []
    for pp in (2, 4, 8):
        found = estimate(config(**{"parallel.pp": pp, "batch.global_batch": 256}), 64, machine)
        shares.append(found.split["bubble"] / found.seconds)
    assert shares == sorted(shares)


def test_settings_change_the_step() -> None:
    machine = load_machine("h100")
    plain = estimate(config(), 64, machine)
    assert plain == estimate(config(**{"train.dtype": "auto"}), 64, machine)  # bfloat16, on a GPU
    assert plain.seconds < estimate(config(**{"train.dtype": "float32"}), 64, machine).seconds
    assert estimate(config(**{"compute.compile": True}), 64, machine).split["memory"] < plain.split["memory"]
    assert estimate(config(**{"compute.fp8": "torchao"}), 64, machine).split["products"] < plain.split["products"]
    assert "attention" not in estimate(config(**{"model.attention_softcap": 50.0}), 64, machine).split
    with pytest.raises(UserError, match="a100-80 has no float8"):
        estimate(config(**{"compute.fp8": "torchao"}), 64, load_machine("a100-80"))
