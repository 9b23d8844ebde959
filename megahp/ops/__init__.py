"""Operators with a PyTorch reference and a native kernel each."""

from megahp.ops.norm import add_and_normalize, normalize

__all__ = ["add_and_normalize", "normalize"]
