"""Test the coordinate check as a command: a small one on the run's data, and invalid input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from corpus import write_corpus
from distributed import world

from megahp import cli
from megahp.config import resolve, with_values
from megahp.diagnose import coordinates
from megahp.diagnose.verify import synthetic_batch
from megahp.parallel.mesh import single_rank_mesh

SCRIPT = Path(__file__).parents[2] / "tools" / "coordinate_check.py"
COMMAND = ["coordinate-check"]
RUN = """
[model]
width = 64
heads = 4
kv_heads = 2
mlp_width = 96
[data]
sequence_length = 16
validation_fraction = 0.1
"""


@pytest.fixture
def check(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    (tmp_path / "run.toml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    return lambda *words: cli.main([*COMMAND, "run.toml", *map(str, words)])


def test_a_check_on_the_runs_own_data(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    write_corpus(tmp_path / "corpus")
    words = ["run.toml", "--depths", "4,2", "--steps", "2", "--seeds", "1,2", "--data", "data.train=['corpus']"]
    words += [
        "parameterization.name=sp",
        "parameterization.init_std=0.3",
        "--json",
        "found.json",
        "--plot",
        "found.svg",
    ]
    done = subprocess.run([sys.executable, SCRIPT, *words], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("fails: stream (init)")
    results = json.loads((tmp_path / "found.json").read_text())
    assert results["sizes"] == [2, 4] and results["parameterization"]["name"] == "sp"
    (low, high), stream = np.mean(results["measured"]["stream init"], 1), results["slopes"][0]
    assert stream["slope"] == pytest.approx(np.log2(high / low)) and stream["needed"] == [-0.6, 0.1]
    assert (tmp_path / "found.svg").stat().st_size > 1000


def test_a_width_scales_all_that_belongs_to_it(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    words = [str(tmp_path / "run.toml"), "--widths", "128,32", "train.steps=7", "--batch", "2", "parallel.tp=2"]
    _, family = tool.read_family(cli.parse([*COMMAND, *words])[1])
    shapes = [(s.model.width, s.model.heads, s.model.kv_heads, s.model.mlp_width) for s in family.values()]
    assert list(family) == [32, 128] and shapes == [(32, 2, 1, 48), (128, 8, 4, 192)]
    for config in family.values():
        assert config.model.head_size == 16 and config.model.vocab_size == 257  # of bytes
        assert config.batch.global_batch == 2 and config.parallel.tp == 1 and config.train.steps == 0


def mlps_of_a_block(folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """What the check measures at init, and the same worked out from the inputs of the two blocks' MLPs."""
    words = ["model.vocab_size=128", "data.train=['none']", "train.dtype=float64"]
    (folder / "run.toml").write_text(RUN)
    config = resolve.load(folder / "run.toml", words).config
    config = with_values(config, {"train.noise_scale": False, "batch.micro_batch": config.batch.global_batch})
    mesh, samples = single_rank_mesh(config), lambda ids: synthetic_batch(ids, config).tokens
    trial, inputs = coordinates.HookedTrial(config, mesh, samples), {}
    blocks = trial.model.blocks.items()
    hooks = {block.mlp: lambda _m, args, _o, name=name: inputs.update({name: args[0]}) for name, block in blocks}
    trial.forward_with_hooks(hooks)
    found = {"mlp": 0.0, "pre-activation": 0.0}
    for name, block in blocks:
        up, gate, down = (getattr(block.mlp, part).weight.detach() for part in ("up", "gate", "down"))
        product = inputs[name] @ up.T
        gated = F.silu(inputs[name] @ gate.T) * product
        found["pre-activation"] += product.abs().mean().item() / len(blocks)
        found["mlp"] += (gated @ down.T).abs().mean().item() / len(blocks)
    return coordinates.activations(config, mesh, 0, samples)[0], found


def test_an_mlp_is_seen_before_its_activation_and_at_its_end(tmp_path: Path) -> None:
    measured, expected = world.run(1, mlps_of_a_block, tmp_path)[0]
    assert {key: measured[key] for key in expected} == pytest.approx(expected, rel=1e-6)
    assert measured["mlp"] < measured["pre-activation"]


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_the_relative_distance_is_that_of_the_second_order(activation: str) -> None:
    """Compare with finite differences; a tenth of the step has a tenth of the distance."""
    random = torch.Generator().manual_seed(1)
    names = ("up.weight", "down.weight") + ("gate.weight",) * (activation == "swiglu")
    shapes = {"up.weight": (12, 8), "gate.weight": (12, 8), "down.weight": (8, 12)}
    old = {name: torch.randn(shapes[name], generator=random, dtype=torch.float64) / 3 for name in names}
    change = {name: 1e-2 * torch.randn(shapes[name], generator=random, dtype=torch.float64) for name in names}
    x = torch.randn(5, 8, generator=random, dtype=torch.float64)

    def mlp(share: float) -> torch.Tensor:
        weights = {name: old[name] + share * change[name] for name in names}
        up = F.linear(x, weights["up.weight"])
        gated = activation == "swiglu"
        hidden = F.silu(F.linear(x, weights["gate.weight"])) * up if gated else F.gelu(up, approximate="tanh")
        return F.linear(hidden, weights["down.weight"])

    linear = (mlp(1e-5) - mlp(-1e-5)) / 2e-5
    distances = []
    for share in (1.0, 0.1):
        new = {name: old[name] + share * change[name] for name in names}
        distances.append(
            coordinates.relative_distance(lambda weights: coordinates.mlp_output(weights, x, activation), old, new)
        )
        expected = (mlp(share) - mlp(0) - share * linear).norm() / (share * linear).norm()
        assert distances[-1] == pytest.approx(expected.item(), rel=1e-3)
    assert distances[0] / distances[1] == pytest.approx(10, rel=0.1)


MISTAKES: dict[str, tuple[list[Any], str]] = {
    "one size": (["--depths", "2"], "--depths 2: give two or more sizes, each once"),
    "a size twice": (["--depths", "2,2,4"], "give two or more sizes, each once"),
    "no number": (["--depths", "2,x"], "'x' is no size"),
    "heads": (["--widths", "64,40"], "--widths 40: model.heads = 4 at model.width = 64 would not be whole"),
    "lazy in width": (["--widths", "32,64", "--lazy"], "--lazy is about depth, not --widths"),
    "lazy steps": (["--depths", "2,4", "--lazy", "--steps", "3"], "--steps 3 has no effect with --lazy"),
    "lazy experts": (["--depths", "2,4", "--lazy", "model.experts=4"], "not model.experts = 4"),
    "steps": (["--depths", "2,4", "--steps", "0"], "--steps 0 must be at least 1"),
    "batch": (["--depths", "2,4", "--batch", "0"], "--batch 0 must be at least 1"),
    "seeds": (["--depths", "2,4", "--seeds", "1,1"], "each is measured once"),
    "no data": (["--depths", "2,4", "--data"], "data.train is empty"),
    "dense": (["--densities", "1,0.5"], "sparsity.method = 'none' would check dense models"),
    "dense at first": (["--densities", "1,0.5", "sparsity.method=gradual"], "sparsity.method = 'gradual'"),
    "half a layer": (["--depths", "2,2.5"], "model.layers = 2.5"),
}


@pytest.mark.parametrize(("words", "message"), MISTAKES.values(), ids=MISTAKES)
def test_invalid_input_is_reported_before_anything_is_trained(
    check: Callable[..., int], capsys: pytest.CaptureFixture[str], words: list[Any], message: str
) -> None:
    assert check(*words) == 2
    output = capsys.readouterr().err
    assert output.startswith("megahp: ") and message in output
