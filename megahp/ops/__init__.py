"""Operators with a PyTorch reference and a native kernel each."""

from megahp.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm

__all__ = ["add_layer_norm", "add_rms_norm", "layer_norm", "rms_norm"]
