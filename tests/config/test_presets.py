"""Known shapes are what they are called, and give way to what else is chosen."""

from __future__ import annotations

import pytest

from megahp.config import resolve
from megahp.config.presets import PRESETS
from megahp.scaling.flops import parameters

UNITS = {"m": 1e6, "b": 1e9}
GPT2_LENGTH = 1024  # of its learned positions


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "debug"])
def test_a_preset_is_as_large_as_its_name_says(name: str) -> None:
    size = name.rpartition("-")[2]
    model = resolve.from_dict({"model": {"preset": name}}, "test").model
    assert parameters(model, GPT2_LENGTH) == pytest.approx(float(size[:-1]) * UNITS[size[-1]], rel=0.04)


def test_a_preset_s_value_that_another_choice_leaves_idle_is_the_default_again() -> None:
    resolved = resolve.resolve([("run.toml", {"model": {"preset": "llama-3-8b", "positions": "alibi"}})])
    assert (resolved.config.model.rope_theta, resolved.origins["model.rope_theta"]) == (10000.0, "default")
    assert (resolved.config.model.layers, resolved.origins["model.layers"]) == (32, "preset llama-3-8b")
