"""Test the baseline of the training benchmark."""

from __future__ import annotations

from commands.test_benchmark_training import COMMAND, TINY

from megahp import cli
from megahp.commands import benchmark_training as tool
from megahp.scaling.flops import parameters


def test_the_baseline_has_as_many_weights() -> None:
    options = cli.parse([*COMMAND, *TINY, "--contestants", "nanogpt"])[1]
    config = tool.resolve_case(options, "2x128", 1, "float32").config
    model = tool.nanogpt.GPT(config.model, 16)
    assert sum(weight.numel() for weight in model.parameters()) == parameters(config.model, 16)
