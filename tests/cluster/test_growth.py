"""Growth: the plan of a chain is what its jobs will do, a node's load stays, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest

from megahp.cluster.growth import Growth, forecast_segments, segments
from megahp.config import Config, with_values
from megahp.scaling.batch import BatchScheduler, Progress, noise_forecast

LENGTH = 16
TABLE = {"batch.policy": "table", "batch.table": ("640:8", "1664:16")}
RAMP = {"batch.policy": "ramp", "batch.largest": 20, "batch.increment": 2, "batch.ramp_samples": 200}
MEASURED = {
    "batch.policy": "measured",
    "batch.critical_batch": (300.0, 0.5),
    "batch.look_every": 1,
    "optimizer.beta2": 0.5,
}
LAW = {"batch.policy": "law", "batch.critical_batch": (30.0, 0.5)}


def config(tokens: int = 240 * LENGTH, **more: Any) -> Config:
    values = {"data.sequence_length": LENGTH, "batch.global_batch": 4, "batch.micro_batch": 1, "train.tokens": tokens}
    return with_values(Config(), values | {key.replace("__", "."): value for key, value in more.items()})


def growth(config: Config, nodes: int = 1, largest: int = 4, ranks: int = 1) -> Growth:
    return Growth(config, nodes, largest, lambda nodes: nodes * ranks)


def lives(config: Config, growth: Growth) -> list[tuple[int, int, int]]:
    """(nodes, first tokens, steps) of the jobs of a chain, step by step: each on the nodes that its first batch asks
    for, until the batch is one that asks for more."""
    found, progress, state = [], Progress(), {**BatchScheduler(config, 1).state()}
    forecast = noise_forecast(config, progress, None)
    while True:
        nodes, stop = growth.nodes_for(state["batch"]), growth.stop_at(state["batch"])
        plan, begin = BatchScheduler(config, growth.dp(nodes)), progress
        plan.load_state(state, progress)
        while step := plan.step(progress):
            progress = progress.after(step)
            plan.update(progress, forecast(progress.tokens))
            if stop and plan.batch >= stop:
                break
        if progress == begin:
            return found
        found.append((nodes, begin.tokens, progress.step - begin.step))
        state = plan.state()


@pytest.mark.parametrize("policy", [TABLE, RAMP, LAW, MEASURED], ids=lambda policy: policy["batch.policy"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_plan_is_what_the_jobs_do(policy: dict[str, Any], ranks: int) -> None:
    run = config(**policy)
    found = growth(run, ranks=ranks)
    parts = segments(found, Progress(), BatchScheduler(run, 1).state(), None)
    assert [(part.nodes, part.begin, part.steps) for part in parts] == lives(run, found)
    assert {part.nodes for part in parts} == {1, 2, 4}
    assert [part.end for part in parts[:-1]] == [part.begin for part in parts[1:]]


@pytest.mark.parametrize("policy", [LAW, MEASURED], ids=lambda policy: policy["batch.policy"])
def test_a_long_run_is_foretold_in_strides(policy: dict[str, Any]) -> None:
    run = config(tokens=400_000 * LENGTH, **policy | {"batch.critical_batch": (0.5, 0.5), "batch.look_every": 10})
    found = growth(run, largest=64)
    parts, truth = segments(found, Progress(), BatchScheduler(run, 1).state(), None), lives(run, found)
    assert [part.nodes for part in parts] == [nodes for nodes, _, _ in truth]
    assert sum(len(part.strides) for part in parts) < sum(part.steps for part in parts) / 4
    for part, (_, begin, steps) in zip(parts, truth, strict=True):
        assert part.begin == pytest.approx(begin, abs=run.train.tokens / 1000)
        assert part.steps == pytest.approx(steps, rel=0.02)


@pytest.mark.parametrize(("nodes", "largest"), [(1, 4), (1, 7), (3, 24), (2, 4)])
def test_the_load_of_a_node_stays(nodes: int, largest: int) -> None:
    """Between that of the first batch and twice that, until there are no more nodes to be had."""
    found = growth(config(**TABLE), nodes, largest)
    for batch in range(4, 200):
        needed, stop = found.nodes_for(batch), found.stop_at(batch)
        load = (batch / needed) / (4 / nodes)
        assert load >= 1 and (load < 2 or 2 * needed > largest)
        assert stop == 0 if 2 * needed > largest else stop == 4 * 2 * needed / nodes > batch
        assert found.nodes_for(batch, at_most=largest // 2) == min(
            needed, max(n for n in found.sizes if n <= largest // 2)
        )


def test_what_it_costs() -> None:
    """10 steps of 4 sequences, 8 of 8 and 8 of 16: on the nodes that grow with them, and on as many throughout. Where
    each of four nodes takes at least two sequences, a step of fewer than eight costs as much as one of eight."""
    run = config(**TABLE, batch__micro_batch=2)
    found = growth(run)
    parts = segments(found, Progress(), BatchScheduler(run, 1).state(), None)
    assert [part.steps for part in parts] == [10, 8, 8]
    growing = [found.seconds([part], part.nodes, speed=LENGTH) for part in parts]
    assert growing == [10 * 4, 8 * 8 / 2, 8 * 16 / 4]
    assert found.seconds(parts, 1, speed=LENGTH) == 10 * 4 + 8 * 8 + 8 * 16
    assert found.seconds(parts, 4, speed=LENGTH) == (10 * 8 + 8 * 8 + 8 * 16) / 4


def test_what_was_measured_revises_what_remains() -> None:
    """The law is taken through the noise scale there is, so that twice the noise asks for the next nodes sooner."""
    run = config(tokens=4000 * LENGTH, batch__policy="noise-scale", batch__critical_batch=(30.0, 0.5))
    now = Progress(100, 400, 400 * LENGTH)
    plan = BatchScheduler(run, 1)
    for noise in (10.0, 20.0):
        assert BatchScheduler(forecast_segments(run, now, noise), 1).target(now, None) == pytest.approx(
            plan.target(now, noise)
        )
    less, more = ([part.begin for part in segments(growth(run), now, plan.state(), noise)] for noise in (10.0, 20.0))
    assert less[1] / more[1] == pytest.approx(4, rel=0.02)  # the batch goes with the root of the tokens
    assert forecast_segments(run, Progress(), None).batch.critical_batch == (30.0, 0.5)
