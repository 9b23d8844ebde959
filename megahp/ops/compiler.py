"""torch.compile: what it needs, and keeping it out of functions."""

import os
import shutil
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def has_compiler() -> bool:
    """Return whether torch.compile finds the C++ compiler that it needs on CPUs."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Do what torch.compiler.disable does, but without importing torch._dynamo, which takes half a second of a rank's
    start, where nothing is compiled."""
    disabled = torch._disable_dynamo(function)  # torch's own lazy one: it imports torch._dynamo when first called

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        return (disabled if "torch._dynamo" in sys.modules else function)(*arguments, **named)

    return call
