"""Refuse a run whose step cannot fit into the memory of its GPUs, before it is queued or started."""

from dataclasses import replace

from megahp.config import Config, get_setting
from megahp.config.schema import toml_value
from megahp.errors import UserError
from megahp.plan.formulas import rank_works
from megahp.plan.machine import Machine, load_machine, machine_names
from megahp.plan.search import WRITTEN, Candidate, search
from megahp.plan.work import at_each_length

ERROR = 0.1  # of the formulas' peak (tests/plan/test_formulas.py): what is refused is too large even if they err so far
GIB = 2**30


def check_fits(config: Config, ranks: int, machine: Machine) -> str:
    """Return a line that says the predicted peak beside the device's memory. Raises UserError where a step cannot fit,
    with the nearest layout that can."""
    peak = predicted_peak(config, ranks)
    beside = f"a step takes about {peak / GIB:,.1f} GiB of the {machine.memory / GIB:,.1f} GiB of {machine.name}"
    if (1 - ERROR) * peak <= machine.memory:
        warning = "" if peak <= machine.usable else ", and with what CUDA and NCCL take it may not fit"
        return f"memory: {beside}{warning}"
    try:
        found = search(config, ranks, machine).fitting
    except UserError as error:
        raise UserError(f"{beside}; {error}") from None
    nearest = min(found, key=lambda each: len(changes(config, each)))  # of several the fastest, which is first
    settings = " ".join(f"{key}={toml_value(value)}" for key, value in changes(config, nearest).items())
    raise UserError(f"{beside}; the nearest layout that fits: {settings} ({nearest}); or pass --ignore-memory")


def predicted_peak(config: Config, ranks: int) -> int:
    """Return the bytes that PyTorch allocates at most on the fullest rank at any sequence length, by formulas."""
    return max(work.bytes for each in at_each_length(config) for work in rank_works(each, ranks))


def changes(config: Config, candidate: Candidate) -> dict[str, object]:
    """Return the settings that lead to a candidate: section.key -> value."""
    values = {key: get_setting(candidate.config, key) for key in WRITTEN}
    return {key: value for key, value in values.items() if value != get_setting(config, key)}


def machine_here(device: str, memory: int) -> Machine:
    """Return the machine of a device by the name that CUDA gives it; one unknown gets an H100's speeds."""
    return replace(load_machine(name_of(device) or "h100"), name=device, memory=float(memory))


def name_of(device: str) -> str:
    """Return the name of the machine that a device is of, "" if none is known: NVIDIA H100 80GB HBM3 -> h100."""
    return next((name for name in machine_names() if name.partition("-")[0] in device.lower()), "")
