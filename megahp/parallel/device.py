"""The device that a rank computes on, and what the machine has for it.

torch is imported where it is needed: `megahp train --ranks` checks settings without, and starts its ranks sooner.
"""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from megahp.config import AUTO, Config, with_values
from megahp.errors import UserError
from megahp.launch import World, has_own_device

if TYPE_CHECKING:
    import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
# Files of a control group: its limit, what it uses, and the word in memory.stat for cached files not lately used
CGROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
CGROUP_V2 = ("memory.max", "memory.current", "inactive_file")
Limit = tuple[int, int]  # bytes in all, and left


def uses_cuda(config: Config) -> bool:
    """Return whether this run computes on CUDA devices."""
    if config.train.device != "auto":
        return config.train.device == "cuda"
    import torch

    return torch.cuda.is_available()


def may_use_cuda(config: Config) -> bool:
    """Return whether this run may compute on CUDA devices, by NVIDIA's driver where it is left open; without torch."""
    return config.train.device == "cuda" or config.train.device == "auto" and Path("/dev/nvidiactl").exists()


def fast_dtype(device: torch.device) -> str:
    """Return the dtype that "auto" is on a device: bfloat16, or float32 where it has no instructions for that."""
    import torch

    is_cuda = device.type == "cuda"
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False) if is_cuda else cpu_has_bfloat16()
    return "bfloat16" if has_bfloat16 else "float32"


def with_fast_dtype(config: Config, device: torch.device) -> Config:
    """Return the config with a train.dtype that is "auto" decided for one device."""
    return with_values(config, {"train.dtype": fast_dtype(device)}) if config.train.dtype == AUTO else config


def cpu_has_bfloat16() -> bool:
    """Return whether this CPU has instructions for bfloat16. One without computes it tens of times more slowly than
    float32 (docs/compute.md)."""
    import torch

    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def memory_here() -> int:
    """Return the bytes of memory that this process may have: the machine's, or a control group's limit."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(limit for limit, _ in memory_limits())])


def memory_limits(groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> list[Limit]:
    """Return the limit of memory, and what is left of it, of every control group that this process is in: a Slurm job's
    or a container's. Bytes; a cached file counts as left, since the kernel drops it before it refuses memory."""
    found = []
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):  # not Linux
        return []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            top, files = mounted / "memory", CGROUP_V1
        elif number == "0":
            top, files = mounted, CGROUP_V2
        else:
            continue
        # a group's parents limit it too; within a container only some of them are mounted, or only the top
        group = top / path.lstrip("/")
        for folder in (group, *group.parents[: len(group.parts) - len(top.parts)]):
            try:
                limit, used = (int((folder / name).read_text(encoding="ascii")) for name in files[:2])
                stat = (folder / "memory.stat").read_text(encoding="ascii").split()
                found.append((limit, limit - used + int(stat[stat.index(files[2]) + 1])))
            except (OSError, ValueError):  # no limit ("max"), or not to be seen from here
                continue
    return found


def free_memory(device: torch.device) -> int:
    """Return the bytes that a rank can take on its device: of a CPU's memory, what can be had without swapping and
    within the limits of its control groups, which the machine's other ranks will take from too."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        words = Path("/proc/meminfo").read_text(encoding="ascii").split()
        available = 1024 * int(words[words.index("MemAvailable:") + 1])
    except (OSError, ValueError):  # not Linux
        return memory_here()
    return max(0, min([available, *(left for _, left in memory_limits())]))


def keep_heap() -> None:
    """Keep what tensors free in this process's heap, in huge pages, for the next ones: mapping, faulting in and
    unmapping large tensors at every use takes up to a tenth of a CPU rank's step (docs/benchmarks/training.md).

    Call before torch makes its first tensor, when it reads the variable. Does nothing where the environment
    decides for itself: malloc's settings, or another allocator that is preloaded.
    """
    if any(name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD") for name in os.environ):
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's own: advise huge pages for tensors of 2 MiB and more
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # never


def cores_here() -> int:
    """Return the cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_devices(config: Config, local_ranks: int) -> None:
    """Raise UserError when this machine has fewer CUDA devices than ranks."""
    if not local_ranks:
        return
    import torch

    devices = torch.cuda.device_count()
    # a launcher may show each rank its own device alone: then every rank counts one
    if uses_cuda(config) and devices < local_ranks and not (devices == 1 and has_own_device()):
        raise UserError(
            f"train.device = {config.train.device!r} needs a CUDA device for each of {local_ranks} ranks and this "
            f"machine has {devices}; start fewer ranks, or set train.device=cpu"
        )


def claim_device(config: Config, world: World) -> torch.device:
    """Return this rank's device, and make it torch's current one; on CPUs, divide the threads among the local ranks:
    call once a process, or they are divided again."""
    import torch

    if uses_cuda(config):
        index = 0 if torch.cuda.device_count() == 1 and has_own_device() else world.local_rank
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    torch.set_num_threads(max(1, torch.get_num_threads() // world.local_size))
    return torch.device("cpu")
