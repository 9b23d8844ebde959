"""Stages: how blocks are dealt to them, whose they are, and which batches keep them busy."""

from __future__ import annotations

import itertools
import random

import pytest

from megahp.config import Config, ParallelConfig, resolve
from megahp.parallel.stages import owner, split, stages_of
from megahp.scaling.batch import batch_multiple, least_batch, runnable


def test_the_split_is_the_best_there_is() -> None:
    """Against all splits there are."""
    chance = random.Random(1)
    for _ in range(200):
        costs = [chance.choice((0.5, 1, 1, 2, 7)) for _ in range(chance.randint(1, 9))]
        parts = chance.randint(1, len(costs))
        cuts = [(0, *inner, len(costs)) for inner in itertools.combinations(range(1, len(costs)), parts - 1)]
        best = min(max(sum(costs[a:b]) for a, b in itertools.pairwise(cut)) for cut in cuts)
        found = split(tuple(costs), parts)
        assert [i for part in found for i in part] == list(range(len(costs)))
        assert len(found) == parts and all(found)
        assert max(sum(costs[i] for i in part) for part in found) == best


def test_more_stages_than_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="3 items"):
        split((1, 1, 1), 4)


def test_a_costly_unembedding_leaves_its_stage_fewer_blocks() -> None:
    assert [len(part) for part in split((1,) * 7 + (5,), 2)] == [6, 2]


@pytest.mark.parametrize(
    ("schedule", "per_rank", "owners"),
    [("1f1b", 0, [0, 1, 2]), ("interleaved", 2, [0, 1, 2, 0, 1, 2]), ("zbv", 0, [0, 1, 2, 2, 1, 0])],
)
def test_stages_belong_to_ranks_as_pytorch_deals_them(schedule: str, per_rank: int, owners: list[int]) -> None:
    from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

    parallel = ParallelConfig(pp=3, schedule=schedule, stages_per_rank=per_rank)  # type: ignore[arg-type]
    assert [owner(stage, parallel) for stage in range(len(owners))] == owners
    assert sorted(stage for rank in range(3) for stage in stages_of(rank, parallel)) == list(range(len(owners)))
    style = "v" if schedule == "zbv" else "loop"
    assert generate_stage_to_rank_mapping(3, len(owners), style) == dict(enumerate(owners))


def settings_of(*words: str) -> Config:
    base = {
        "model": {"layers": 8, "vocab_size": 128},
        "data": {"train": ["a"], "sequence_length": 16},
        "batch": {"micro_batch": 2},
    }
    return resolve.resolve([("base", base), ("test", resolve.parse_overrides(words))]).config


@pytest.mark.parametrize(
    ("words", "dp", "expected"),  # unit, least
    [
        ((), 2, (4, 4)),
        (("parallel.pp=4",), 2, (4, 16)),  # any count of microbatches from one a stage on
        (("parallel.pp=4", "parallel.schedule=interleaved"), 2, (16, 16)),  # rounds
        (("parallel.pp=4", "parallel.schedule=zero-bubble"), 1, (8, 8)),
        (("parallel.pp=2", 'data.lengths=["64:64"]'), 1, (4, 8)),  # one sequence of 64 is four of 16
    ],
)
def test_which_batches_a_pipeline_runs(words: tuple[str, ...], dp: int, expected: tuple[int, int]) -> None:
    config = settings_of(*words)
    assert (batch_multiple(config, dp), least_batch(config, dp)) == expected


def test_the_nearest_batch_is_never_below_the_least() -> None:
    assert runnable(8, 4, 16) == (16,)
    assert runnable(16, 4, 16) == (16,)
    assert runnable(18, 4, 16) == (16, 20)
