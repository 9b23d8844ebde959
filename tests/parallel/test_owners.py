"""Whole weights on the ranks that own them, and back: on real ranks, against DTensor's own gathering."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed import world
from distributed.training import Training, settings_of, whole

from megahp.parallel.messages import all_gather_json
from megahp.parallel.owners import Owners
from megahp.parallel.parameters import extent, extents, like, storage
from megahp.scaling.parameterization import Role

LAYOUTS = {
    "shards": ("llama", ()),
    "uneven shards": ("llama", ("model.mlp_width=42",)),
    "tp, shards": ("llama", ("parallel.tp=2",)),
    "tp, cp": ("llama", ("parallel.tp=2", "parallel.cp=2")),
    "replicas of shards": ("llama", ("parallel.dp_replicate=2",)),
    "replicas": ("llama", ("parallel.dp_replicate=4", "parallel.dp_shard=1")),
    "experts": ("moe", ("parallel.ep=2",)),
    "experts, tp": ("moe", ("parallel.ep=2", "parallel.tp=2")),
}


def exchange(model: str, words: tuple[str, ...]) -> dict[str, Any]:
    training = Training(settings_of(model, *words))
    mesh, weights = training.mesh, training.engine.trained
    hidden = {name: weight for name, weight in weights.items() if training.engine.rows[name].role is Role.HIDDEN}
    owner = Owners(mesh)
    found: dict[str, Any] = {"size": owner.size, "weights": len(hidden), "owned": 0, "sent": 0, "numbers": 0}
    places = [all_gather_json(extent(weight), owner.replica) for weight in hidden.values()]
    found["extents"] = places == [
        [[list(part) for part in place] for place in extents(weight, mesh.layout)] for weight in hidden.values()
    ]
    real = dist.all_to_all_single

    def counted(output: torch.Tensor, source: torch.Tensor, *arguments: Any) -> None:
        found["sent"] += source.numel()
        real(output, source, *arguments)

    names = list(hidden)
    for first in range(0, len(names), owner.size):
        chunk = [hidden[name] for name in names[first : first + owner.size]]
        values = [torch.randn_like(storage(weight)) for weight in chunk]
        for value in values:  # as gradients are, the same on every replica
            dist.broadcast(value, group=owner.replicas, group_src=0)
        wanted = [whole(like(weight, value)) for weight, value in zip(chunk, values, strict=True)]
        with mock.patch.object(dist, "all_to_all_single", counted):
            gathered = owner.gather(chunk, values)
            returned = owner.scatter(chunk, None if gathered is None else 2 * gathered)
        assert (gathered is not None) == (owner.rank < len(chunk))
        if gathered is not None:
            assert torch.equal(gathered, wanted[owner.rank])
            found["owned"] += 1
            found["numbers"] += gathered.numel()
        assert all(torch.equal(got, 2 * value) for got, value in zip(returned, values, strict=True))
    return found


def exchange_all() -> dict[str, dict[str, Any]]:
    return {name: exchange(*case) for name, case in LAYOUTS.items()}


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, dict[str, Any]]]:
    return world.run(4, exchange_all)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_whole_on_their_owners_and_return(outcomes: list[dict[str, Any]], layout: str) -> None:
    ranks = [outcome[layout] for outcome in outcomes]
    assert all(rank["size"] == 4 and rank["extents"] for rank in ranks)
    assert sum(rank["owned"] for rank in ranks) == ranks[0]["weights"]


@pytest.mark.parametrize("layout", ["shards", "tp, shards", "experts"])
def test_a_rank_sends_about_what_it_owns(outcomes: list[dict[str, Any]], layout: str) -> None:
    """Once to the owners and once from them: not every weight, which would be four times as much."""
    ranks = [outcome[layout] for outcome in outcomes]
    total = sum(rank["numbers"] for rank in ranks)
    assert sum(rank["sent"] for rank in ranks) == 2 * total
    assert max(rank["sent"] for rank in ranks) < 0.75 * total
