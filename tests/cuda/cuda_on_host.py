"""torch.cuda over the device of cuda_on_host.cpp: a CUDA device that computes on the CPU, in torch's CPU build.

`start()` must come before torch is imported, which looks for CUDA once. What torch.cuda would ask the driver has an
answer here; all that needs a kernel of CUDA's own, such as graphs or the flash attention, is not there and raises.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SOURCE = Path(__file__).with_suffix(".cpp")
GIB = 2**30


def build() -> Path:
    """Compile the device once for this torch and source. Returns the object."""
    found = importlib.util.find_spec("torch")
    assert found and found.origin
    folder = Path(found.origin).parent  # in which the object looks for torch's libraries: another torch, another object
    identity = f"{folder}{importlib.metadata.version('torch')}{SOURCE.read_text()}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"megahp-cuda-on-host-{key}.so"
    command = ["g++", "-O1", "-g0", "-shared", "-fPIC", "-std=c++20", "-DTORCH_EXTENSION_NAME=cuda_on_host"]
    for include in (folder / "include", folder / "include/torch/csrc/api/include", sysconfig.get_path("include")):
        command += ["-isystem", str(include)]
    command += [str(SOURCE), f"-L{folder / 'lib'}", f"-Wl,-rpath,{folder / 'lib'}"]
    command += [f"-l{name}" for name in ("torch", "torch_cpu", "c10", "torch_python")]
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes one compiles
        if not target.exists():
            partial = target.with_suffix(".partial")
            subprocess.run([*command, "-o", str(partial)], check=True)
            partial.rename(target)
    return target


def start() -> None:
    """Put the device in place of CUDA's, in this process and to its end."""
    assert "torch" not in sys.modules
    built = build()
    ctypes.CDLL(str(built), ctypes.RTLD_GLOBAL)
    import torch
    from torch.distributed import distributed_c10d as c10d

    spec = importlib.util.spec_from_file_location("cuda_on_host", built)
    assert spec and spec.loader
    device = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(device)
    for name, value in answers(device).items():
        setattr(torch.cuda, name, value)
    resize = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        if storage.device.type != "cuda":
            return resize(storage, size)
        device.resize_storage(storage, size)
        return storage

    torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign]
    c10d.is_nccl_available = lambda: True  # type: ignore[assignment]
    c10d.ProcessGroupNCCL = nccl_of(device)  # type: ignore[attr-defined]


def nccl_of(device: ModuleType) -> Any:
    """Return what stands for the class ProcessGroupNCCL."""

    from torch import distributed as dist

    class Nccl(type):
        def __instancecheck__(cls, backend: Any) -> bool:
            return backend.name() == "nccl"

    class ProcessGroupNCCL(metaclass=Nccl):
        class Options(SimpleNamespace):
            _timeout = timedelta(minutes=5)

        def __new__(cls, store: Any, rank: int, size: int, options: Any) -> Any:
            return device.nccl(dist.ProcessGroupGloo(store, rank, size, timeout=options._timeout))

    return ProcessGroupNCCL


def answers(device: ModuleType) -> dict[str, Any]:
    """Return torch.cuda's functions, as this device answers them."""
    import torch

    def index_of(given: Any) -> int:
        index = given if isinstance(given, int) else None if given is None else torch.device(given).index
        return device.current_device() if index is None else index

    @contextlib.contextmanager
    def stream(entered: torch.Stream | None) -> Iterator[None]:
        with entered if entered is not None else contextlib.nullcontext():
            yield

    def current_stream(where: Any = None) -> torch.Stream:
        return torch.accelerator.current_stream(index_of(where))

    name = "NVIDIA H200 (on the host)"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3").split(",")

    def properties(where: Any = None) -> SimpleNamespace:
        numbers = {"total_memory": GIB, "multi_processor_count": 1, "major": 9, "minor": 0}
        return SimpleNamespace(name=name, uuid=f"GPU-{visible[index_of(where)]}", **numbers)

    return {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: len(visible),
        "current_device": device.current_device,
        "set_device": lambda where: device.exchange_device(index_of(where)),
        "_exchange_device": device.exchange_device,
        "_maybe_exchange_device": device.exchange_device,
        "synchronize": lambda where=None: None,
        "mem_get_info": lambda where=None: (GIB, GIB),
        "memory_allocated": lambda where=None: 0,
        "max_memory_allocated": lambda where=None: 0,
        "reset_peak_memory_stats": lambda where=None: None,
        "empty_cache": lambda: None,
        "get_device_name": lambda where=None: name,
        "get_device_properties": properties,
        "get_device_capability": lambda where=None: (9, 0),
        "Stream": lambda device=None, priority=0: torch.Stream(f"cuda:{index_of(device)}", priority=priority),
        "Event": lambda **options: torch.Event("cuda", enable_timing=options.get("enable_timing", False)),
        "stream": stream,
        "current_stream": current_stream,
        "default_stream": current_stream,
        "nccl": SimpleNamespace(version=lambda: (2, 0, 0)),
        "get_rng_state": lambda where=None: torch.get_rng_state(),  # the device's generator is the CPU's
        "set_rng_state": lambda state, where=None: torch.set_rng_state(state),
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
    }
