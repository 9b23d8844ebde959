"""Describe the machine of a measurement, and wait for its device."""

import platform
from pathlib import Path
from typing import Any

import torch


def machine_of(device: torch.device) -> dict[str, Any]:
    """Return the device's name, the number of CPU threads and torch's version."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()  # has no model name on Arm
        models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        name = f"{next(models, platform.machine())} ({torch.backends.cpu.get_cpu_capability()})"
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def synchronize(device: torch.device) -> None:
    """Wait for the kernels queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
