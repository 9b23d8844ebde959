"""The schedules against torch's own, and their replay against closed forms."""

from __future__ import annotations

from typing import Any

import pytest
from torch.distributed import pipelining
from torch.distributed.pipelining import schedules

from megahp.config import ParallelConfig
from megahp.parallel.pipeline import SCHEDULES
from megahp.plan.schedules import Action, actions, replay, steady
from megahp.scaling.flops import pipeline_bubble


def parallel_of(schedule: str, pp: int) -> ParallelConfig:
    return ParallelConfig(pp=pp, schedule=schedule, stages_per_rank=2 if schedule in ("interleaved", "zbv") else 1)  # type: ignore[arg-type]


def of_torch(parallel: ParallelConfig, microbatches: int) -> list[list[Any]]:
    """Return the actions that torch plans, from a schedule without stages: only its arithmetic runs."""
    schedule: Any = object.__new__(getattr(pipelining, SCHEDULES[parallel.schedule]))
    schedule._n_microbatches, schedule.pp_group_size = microbatches, parallel.pp
    schedule.n_local_stages, schedule.num_stages = parallel.local_stages, parallel.pp * parallel.local_stages
    schedule._num_stages = schedule.num_stages
    schedule.number_of_rounds = max(1, microbatches // parallel.pp)
    schedule.microbatches_per_round = microbatches // schedule.number_of_rounds
    if parallel.schedule == "1f1b":
        lists = [schedule._get_pipeline_order()[rank] for rank in range(parallel.pp)]
    else:
        lists = [schedule._calculate_single_rank_operations(rank) for rank in range(parallel.pp)]
    kinds = (schedules.F, schedules.B, schedules.I, schedules.W)
    return [[each for each in actions if each and each.computation_type in kinds] for actions in lists]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("pp", "microbatches"), [(2, 2), (2, 8), (4, 4), (4, 12), (4, 16)])
def test_actions_are_those_of_torch(schedule: str, pp: int, microbatches: int) -> None:
    parallel = parallel_of(schedule, pp)
    kinds = {schedules.F: "F", schedules.B: "B", schedules.I: "I", schedules.W: "W"}
    for ours, torchs in zip(actions(parallel, microbatches), of_torch(parallel, microbatches), strict=True):
        if schedule == "1f1b":  # of which torch's list numbers the last rank's microbatches from 1; its step does not
            assert [each.kind for each in ours] == [kinds[each.computation_type] for each in torchs]
        else:
            expected = [
                Action(kinds[each.computation_type], each.stage_index, each.microbatch_index) for each in torchs
            ]
            assert ours == expected


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_microbatch_passes_each_stage_once(schedule: str) -> None:
    lists = actions(parallel_of(schedule, 4), 8)
    assert all(len(set(each)) == len(each) for each in lists)
    forward = [action for each in lists for action in each if action.kind == "F"]
    assert len(forward) == 8 * (1 + max(action.stage for action in forward))


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_bubble_of_equal_stages(schedule: str) -> None:
    """That of Narayanan et al., arXiv 2104.04473."""
    parallel, microbatches = parallel_of(schedule, 4), 12
    busy = microbatches * parallel.local_stages * 3.0
    total = replay(actions(parallel, microbatches), lambda action: 1.0 if action.kind == "F" else 2.0, lambda *_: 0.0)
    assert total / busy - 1 == pytest.approx(pipeline_bubble(4, microbatches, parallel.local_stages))


def test_zero_bubble_is_shorter() -> None:
    def total(schedule: str) -> float:
        parallel = parallel_of(schedule, 4)
        seconds = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
        part = 1 / parallel.local_stages
        return replay(actions(parallel, 8), lambda action: part * seconds[action.kind], lambda *_: 0.0)

    assert total("zbv") < total("zero-bubble") < total("1f1b")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rounds_are_alike(schedule: str) -> None:
    """Many microbatches by a straight line through few, also of unequal stages and with transfers."""
    parallel, many = parallel_of(schedule, 4), 40

    def seconds(action: Action) -> float:
        return (1.0 if action.kind in "FIW" else 2.0) * (1 + 0.3 * (action.stage % 3))

    few, more = steady(parallel, many)
    assert few < more < many
    took = {count: replay(actions(parallel, count), seconds, lambda *_: 0.1) for count in (few, more, many)}
    line = took[few] + (took[more] - took[few]) / (more - few) * (many - few)
    assert line == pytest.approx(took[many], rel=0.01)
