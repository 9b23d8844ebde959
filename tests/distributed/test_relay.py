"""A run that moves at every step from one kind of layout to another, through checkpoints, trains as one that stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distributed import world
from distributed.test_layouts import EIGHT, FULL, LAYOUTS
from distributed.training import Training, settings_of
from megahp import checkpoint
from megahp.config import CheckpointConfig
from megahp.diagnose.verify import gather_stages, synthetic_batch
from megahp.parallel.parameters import storage

BLOCKS = "model.layers=4"
LEGS = {  # of a model, and settings
    "moe": [
        "pp2 shard2, zbv",
        "cp2 tp2 sp",
        "ep2 replicate2",
        "pp4 zero-bubble",
        "ep4",
        "pp2 tp2 sp, interleaved",
        "replicate2 shard2",
        "pp2 ep2",
        "tp2 sp replicate2",
    ],
    "moe optimizer.name=galore optimizer.rank=8 optimizer.refresh=3": [
        "replicate2 shard2",
        "ep2 tp2 sp",
        "pp2 ep2",
        "tp2 sp replicate2",
        "pp4 1f1b",
    ],
    "gpt2 optimizer.name=dct optimizer.rank=8 optimizer.refresh=3": ["tp2 shard2", "pp2 cp2", "cp4", "tp4 sp"],
    "gpt2": ["pp4 1f1b", "cp4", "pp2 replicate2, zero-bubble", "tp2 shard2", "pp2 cp2", "shard4, zero 2, prefetch"],
}


def tensors(training: Training) -> dict[str, torch.Tensor]:
    return training.engine.saved | training.optimizer.state()


def relay(model: str, folder: str) -> dict[str, Any]:
    """One step on each leg's layout, starting from the checkpoint of the leg before."""
    losses: list[float] = []
    before: Training | None = None
    for number, leg in enumerate(LEGS[model]):
        training = Training(settings_of(*model.split(), "train.dtype=float64", BLOCKS, *LAYOUTS[4][leg]))
        if before:
            checkpoint.load(checkpoint.path(Path(folder), number), tensors(training))
            training.progress, training.optimizer.updates = before.progress, before.optimizer.updates
            training.batch_scheduler.load_state(before.batch_scheduler.state(), before.progress)
        losses.append(training.step()["measured"]["loss"])
        store = checkpoint.Store(Path(folder), CheckpointConfig(keep=1))
        store.begin(number + 1, tensors(training), {})
        store.wait()
        before = training
    assert before
    return {"losses": losses, "weights": gather_stages(before.weights(), before.mesh)}


def stay(model: str) -> dict[str, Any]:
    training = Training(settings_of(*model.split(), "train.dtype=float64", BLOCKS, EIGHT, FULL))
    losses = [training.step()["measured"]["loss"] for _ in LEGS[model]]
    return {"losses": losses, "weights": training.weights()}


@pytest.mark.parametrize("model", LEGS)
def test_a_run_that_moves_trains_as_one_that_stays(model: str, tmp_path: Path) -> None:
    moved, stayed = world.run(4, relay, model, str(tmp_path))[-1], world.run(1, stay, model)[0]
    assert moved["losses"] == pytest.approx(stayed["losses"], rel=1e-10)
    assert moved["weights"].keys() == stayed["weights"].keys()
    for name, weight in stayed["weights"].items():
        assert (moved["weights"][name] - weight).abs().max() <= 1e-10 * weight.abs().max(), name


def what_is_saved_after_a_validation() -> list[tuple[torch.dtype, bool]]:
    """A forward pass alone leaves gathered weights in the modules, rounded to the compute type."""
    config = settings_of("llama", "train.dtype=bfloat16", "parallel.zero=1", "batch.micro_batch=4")
    training = Training(config)
    before = {name: storage(value).clone() for name, value in training.engine.saved.items()}
    training.engine.evaluate(synthetic_batch(np.arange(4), config), torch.ones(4, 1, dtype=torch.bool))
    gathered = {weight.dtype for weight in training.engine.stages[0].parameters() if weight.dim()}
    assert torch.bfloat16 in gathered  # or this would test nothing
    after = {name: storage(value) for name, value in training.engine.saved.items()}
    training.engine.reshard()
    assert {weight.dtype for weight in training.engine.stages[0].parameters()} == {torch.float32}
    return [(value.dtype, torch.equal(value, before[name])) for name, value in after.items()]


def test_a_checkpoint_after_a_validation_is_in_full_precision() -> None:
    for saved in world.run(2, what_is_saved_after_a_validation):
        assert set(saved) == {(torch.float32, True)}
