"""Finding and loading the objects that setup.py built."""

import warnings
from pathlib import Path

import torch


def load(name: str) -> bool:
    """Load ``megahp/<name>.*so``, whose kernels then serve their device; nothing is compiled here.

    Where the object is missing or does not load, the PyTorch reference goes on serving: the answer is False,
    after one warning that says why.
    """
    package = Path(__file__).resolve().parent.parent
    try:
        torch.ops.load_library(next(package.glob(f"{name}.*so")))
        return True
    except StopIteration:
        builds = "builds it" if name == "_cpu" else "builds it where nvcc is on PATH or in CUDA_HOME/bin"
        reason = f"{package} holds no {name} object; `pip install --no-build-isolation -e .` {builds}"
    except OSError as error:
        reason = str(error)
    warnings.warn(f"megahp: the slower PyTorch reference of the norm ops is used: {reason}", stacklevel=2)
    return False
