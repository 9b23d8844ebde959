"""Loading the shared objects that setup.py built."""

import warnings
from pathlib import Path

import torch


def load(name: str) -> bool:
    """Load ``megahp/<name>.*so``, whose kernels then serve their device; nothing is compiled here.

    Return False, after one warning that says why, where the object is missing or does not load: then the PyTorch
    reference serves.
    """
    package = Path(__file__).resolve().parent.parent
    try:
        torch.ops.load_library(next(package.glob(f"{name}.*so")))
        return True
    except StopIteration:
        builds = "builds it" if name == "_cpu" else "builds it where nvcc is on PATH or in CUDA_HOME/bin"
        reason = f"{package} holds no {name} object; `pip install --no-build-isolation -e .` {builds}"
    except OSError as error:  # built for another torch, say
        reason = str(error)
    warnings.warn(f"megahp: the slower PyTorch reference of the norm ops is used: {reason}", stacklevel=2)
    return False
