"""On every layout: what is not finite is found where it arose, and weights that came apart by one bit are found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import world
from distributed.training import Training, settings_of

from megahp.data.loader import rank_samples
from megahp.errors import Fault
from megahp.faults.copies import check_copies
from megahp.faults.suspects import Suspect, find_in_weights, first_suspects, watch_layers
from megahp.parallel.parameters import storage

LAYOUTS = {
    "dp4": (),
    "replicas": ("parallel.dp_replicate=4",),
    "tp2 sp": ("parallel.tp=2", "parallel.sequence_parallel=true", "parallel.dp_replicate=2"),
    "pp2": ("parallel.pp=2", "parallel.dp_replicate=2"),
    "pp2 zero bubble": ("parallel.pp=2", "parallel.schedule=zero-bubble", "compute.recompute=full"),
    "cp2": ("parallel.cp=2", "parallel.dp_replicate=2"),
}
BATCH = ("batch.policy=constant", "batch.table=[]", "batch.global_batch=16", "batch.micro_batch=2")
WHERE = ["output", "gradient", "weight"]


def spoil(training: Training, where: str) -> list[Any]:
    """Make something not a number in block 1, on data rank 1 alone: of its second microbatch's last example."""
    if training.mesh.data_rank != 1:
        return []
    calls = []

    def not_finite(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[-1] = float("nan")
        return value

    def hook(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        calls.append(module)
        if len(calls) != 2:
            return None
        if where == "output":
            return not_finite(output)
        output.register_hook(not_finite)
        return None

    blocks = [stage.blocks["1"] for stage in training.engine.stages if "1" in stage.blocks]
    if where == "weight":
        for name, weight in training.engine.weights.items():
            if name == "blocks.1.mlp_norm.weight" and storage(weight).numel():
                storage(weight)[-1] = float("nan")
        return []
    return [block.register_forward_hook(hook) for block in blocks]


def found_on(layout: tuple[str, ...], where: str) -> list[Suspect]:
    training = Training(settings_of("llama", *BATCH, *layout))
    plan = training.batch_scheduler.step(training.progress)
    assert plan is not None
    hooks = spoil(training, where)
    rank, ranks = training.mesh.data_rank, training.mesh.layout.dp
    samples = rank_samples(plan.first_sample, plan.global_batch, plan.micro_batch, rank, ranks)
    with watch_layers(training.engine.model.stages, samples) as found:
        training.engine.forward_backward(
            training.batches(plan), plan.num_microbatches(training.mesh.layout.dp), plan.tokens
        )
    for each in hooks:
        each.remove()
    grads = dict(zip(training.engine.trained, training.engine.gradients(), strict=True))
    return first_suspects([*found, *find_in_weights(training.engine.weights, grads)])


def come_apart(model: str, layout: tuple[str, ...]) -> dict[str, str]:
    """Name of a weight that is changed by one bit on the last rank -> what is said of it there and on the first."""
    training = Training(settings_of(model, *layout))
    weights, rows = training.engine.weights, training.engine.rows
    check_copies(weights, rows, training.mesh)
    told = {}
    for name in training.engine.rows:
        part = storage(weights[name]) if name in weights else torch.empty(0)
        sound = part.clone()
        if torch.distributed.get_rank() == 3 and part.numel():
            part.view(torch.int32).view(-1)[0] ^= 1
        try:
            check_copies(weights, rows, training.mesh)
        except Fault as fault:
            told[name] = str(fault)
        part.copy_(sound)
    check_copies(weights, rows, training.mesh)
    return told


def everything() -> dict[str, Any]:
    found: dict[str, Any] = {
        (name, where): found_on(layout, where) for name, layout in LAYOUTS.items() for where in WHERE
    }
    found["whole copies"] = come_apart("llama", ("parallel.dp_replicate=4",))
    found["halves"] = come_apart("llama", ("parallel.tp=2", "parallel.dp_replicate=2"))
    found["no copies"] = come_apart("llama", ("parallel.dp_shard=4",))
    found["norms alone"] = come_apart("llama", ("parallel.tp=4", "model.kv_heads=4"))
    found["tied ends"] = come_apart("gpt2", ("parallel.pp=2", "parallel.dp_shard=2"))
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return world.run(4, everything)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("where", WHERE)
def test_the_place_is_named(found: list[dict[str, Any]], layout: str, where: str) -> None:
    first, *others = (each[layout, where] for each in found)
    assert all(other == first for other in others) and first
    assert {each.layer for each in first} == {"blocks.1.mlp_norm.weight" if where == "weight" else "blocks.1"}
    kind = {"output": "output of", "gradient": "gradient at the output of", "weight": "weight"}[where]
    assert all(str(each).startswith(f"{kind} blocks.1") for each in first)
    data_ranks = 4 if layout in ("dp4", "replicas") else 2
    last_of_the_second = 2 * (data_ranks + 1) + 1  # microbatches of two, dealt in turn
    assert {each.samples for each in first} == {() if where == "weight" else (last_of_the_second,)}


def test_one_bit_is_found_wherever_there_is_a_copy(found: list[dict[str, Any]]) -> None:
    for case in ("whole copies", "halves", "no copies", "norms alone", "tied ends"):
        assert all(each[case] == found[0][case] for each in found)
    names = found[0]["whole copies"].keys()
    assert len(names) == 21  # all there are
    assert found[0]["halves"].keys() == names
    assert "is not what 3 ranks hold" in found[0]["whole copies"]["final_norm.weight"]
    assert "final_norm.weight on rank 3" in found[0]["whole copies"]["final_norm.weight"]
    assert found[0]["no copies"] == {}
    assert found[0]["norms alone"].keys() == {name for name in names if "norm" in name}
    assert found[0]["tied ends"].keys() == {"embedding.weight"}
    assert "embedding.weight on ranks 1 and 3" in found[0]["tied ends"]["embedding.weight"]
