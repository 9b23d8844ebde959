"""A run that its GPUs' memory cannot hold is refused, with the nearest layout that fits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from plan.small import GPUS, config, machine

from megahp.commands.train import check_device_memory
from megahp.config import Config, resolve, with_values
from megahp.errors import UserError
from megahp.launch import World
from megahp.parallel.layout import fit
from megahp.plan.guard import ERROR, check_fits, machine_here, predicted_peak
from megahp.plan.search import search


def test_what_fits_is_said() -> None:
    peak = predicted_peak(config(), GPUS)
    line = check_fits(config(), GPUS, machine(1.5 * peak / 2**30))
    assert line.startswith(f"memory: a step takes about {peak / 2**30:,.1f} GiB of the ") and line.endswith("of h100")
    near = check_fits(config(), GPUS, machine(peak / 2**30 - 1))
    assert near.endswith("it may not fit")


def test_what_cannot_fit_is_refused_and_the_remedy_fits() -> None:
    large = config(parallel={"pp": 1, "tp": 1}, batch={"micro_batch": 4})
    memory = 0.5 * (1 - ERROR) * predicted_peak(large, GPUS)
    with pytest.raises(UserError, match="the nearest layout that fits: .*; or pass --ignore-memory") as caught:
        check_fits(large, GPUS, machine(memory / 2**30))
    settings = str(caught.value).partition("fits: ")[2].partition(" (")[0].split()
    tree = resolve.parse_overrides(settings)
    values = {f"{section}.{key}": value for section, found in tree.items() for key, value in found.items()}
    fitting = with_values(large, values)
    assert len(settings) <= 2 and fit(fitting.parallel, GPUS) and predicted_peak(fitting, GPUS) <= memory


def alone(config: Config, length: int, batch: int, micro: int) -> int:
    """The peak of a run of one length."""
    values = {"data.sequence_length": length, "batch.global_batch": batch, "batch.micro_batch": micro}
    return predicted_peak(with_values(config, {"data.lengths": (), **values}), GPUS)


def test_every_sequence_length_must_fit() -> None:
    """Of longer sequences a microbatch has fewer, until it is one. Short ones may take more, in several microbatches
    between which FSDP keeps whole gradients."""
    growing = with_values(
        config(), {"data.lengths": ("2e8:16384", "4e8:65536"), "batch.micro_batch": 2, "parallel.pp": 1}
    )
    peak = predicted_peak(growing, GPUS)
    assert peak == alone(growing, 65536, 4, 1) > 3 * alone(growing, 4096, 64, 2)
    with pytest.raises(UserError, match="a step takes about"):
        check_fits(growing, GPUS, machine(0.8 * peak / 2**30))
    found = search(with_values(growing, {"parallel.tp": 1}), GPUS, machine(1.05 * peak / 2**30))
    assert all(predicted_peak(each.config, GPUS) == each.estimate.bytes for each in found.fitting)

    values = {"data.lengths": ("2e8:16384",), "batch.global_batch": 32, "batch.micro_batch": 2, "parallel.pp": 1}
    several = with_values(config(), {**values, "parallel.tp": 1, "compute.recompute": "full"})
    assert predicted_peak(several, GPUS) == alone(several, 4096, 32, 2) > alone(several, 16384, 8, 1)

    decided = {"batch.micro_batch": "auto", "batch.largest_micro_batch": 8, "batch.global_batch": 256}
    chosen = with_values(several, decided)
    assert predicted_peak(chosen, GPUS) == max(alone(chosen, 4096, 256, 8), alone(chosen, 16384, 64, 2))


def test_none_fits() -> None:
    with pytest.raises(UserError, match="no layout fits 8 GPUs of h100") as caught:
        check_fits(config(), GPUS, machine(2))
    assert "\n" not in str(caught.value)


def test_a_device_is_known_by_its_name() -> None:
    here = machine_here("NVIDIA H200", 150_000_000_000)
    assert (here.memory, here.memory_bandwidth) == (1.5e11, 4.8e12)
    assert machine_here("NVIDIA L4", 24_000_000_000).name == "NVIDIA L4"


def test_train_refuses_before_the_ranks_meet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On CUDA alone, by what the device says of itself."""
    device = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=85_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    large = config(
        model={"layers": 32}, parallel={"pp": 1, "tp": 1}, train={"device": "cuda"}, batch={"micro_batch": 16}
    )
    check_device_memory(with_values(large, {"train.device": "cpu"}), GPUS, World())
    assert not capsys.readouterr().out
    with pytest.raises(UserError, match="of NVIDIA H100 80GB HBM3; the nearest layout that fits: .*--ignore-memory"):
        check_device_memory(large, GPUS, World())
    check_device_memory(config(train={"device": "cuda"}), GPUS, World())
    assert capsys.readouterr().out.startswith("memory: a step takes about ")
