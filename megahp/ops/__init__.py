"""Operators with a PyTorch reference and a native kernel each."""

from megahp.ops.norm import layer_norm, rms_norm

__all__ = ["layer_norm", "rms_norm"]
