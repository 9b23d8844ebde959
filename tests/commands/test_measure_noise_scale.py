"""Test the noise scale at a run's checkpoints: against the run's own next step, and invalid input."""

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
from distributed import runs

from megahp import cli
from megahp.checkpoint.store import write_manifest
from megahp.log.metrics import read_metrics
from megahp.scaling.noise_scale import estimate

SCRIPT = Path(__file__).parents[2] / "tools" / "measure_noise_scale.py"
COMMAND = ["measure", "noise-scale"]
RUN = """
[model]
layers = 1
width = 32
heads = 4
[data]
train = ["corpus"]
sequence_length = 16
[batch]
policy = "table"
global_batch = 4
micro_batch = 2
table = ["192:8"]
[train]
tokens = 5120
steps = 6
validation_samples = 0
[checkpoint]
every = 2
keep = 9
[log]
tensorboard = false
"""
KINDS = ["embedding", "norms", "attention", "mlp", "unembedding", "total"]


@pytest.fixture(scope="module")
def folder(folder: Path) -> Path:
    """Return a folder with a run of six steps, a checkpoint every second one, and the command's results."""
    runs.train(folder, "run")
    words = ["runs/run", "--batches", "3", "--json", "found.json", "--plot", "found.svg"]
    (folder / "out").write_text(command([sys.executable, str(SCRIPT), *words], folder))
    return folder


def command(words: list[str], folder: Path) -> str:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_first_batch_is_the_step_that_the_run_took_next(folder: Path) -> None:
    """Weights, data, examples and the loss's normalization agree, for the norm layers and for the total."""
    steps = read_metrics(folder / "runs/run")
    results = json.loads((folder / "found.json").read_text())["checkpoints"]
    assert [(row["tokens"], row["batch"], row["micro_batch"]) for row in results] == [
        (128, 4, 2),
        (320, 8, 2),
        (576, 8, 2),
    ]
    assert [row["smoothed"] for row in results] == [step["noise_scale"] for step in steps[1::2]]
    for row, step in zip(results[:2], (steps[2], steps[4]), strict=True):
        first = row["batches"][0]
        norms = [layer for layer in first["example"] if layer.endswith("norm")]
        assert sum(first["example"][norm] for norm in norms) == pytest.approx(step["grad_sq_example"], rel=1e-5)
        assert sum(first["batch"][norm] for norm in norms) == pytest.approx(step["grad_sq_batch"], rel=1e-5)
        assert sum(first["batch"].values()) == pytest.approx(step["grad_norm"] ** 2, rel=1e-5)
        assert first["example"].keys() == first["micro"].keys() == first["batch"].keys()


def test_what_is_told_follows_from_the_batches(folder: Path) -> None:
    results = json.loads((folder / "found.json").read_text())
    for row in results["checkpoints"]:
        assert list(row["kinds"]) == KINDS
        example, micro, batch = (
            np.array([sum(each[key].values()) for each in row["batches"]]) for key in ("example", "micro", "batch")
        )
        assert len(set(batch)) == 3
        total, (true_sq, noise) = row["kinds"]["total"], estimate(example.mean(), batch.mean(), row["batch"])
        assert [total[key] for key in ("sq_example", "sq_batch", "true_sq", "noise")] == pytest.approx(
            [example.mean(), batch.mean(), true_sq, noise]
        )
        assert sum(each["noise"] for each in list(row["kinds"].values())[:-1]) == pytest.approx(noise)
        by_ranks = row["data_parallel"]
        assert by_ranks["noise"] == pytest.approx(estimate(micro.mean(), batch.mean(), row["batch"], 2)[1])
        assert abs(by_ranks["apart"]) < 10  # t of two degrees of freedom
    assert list(results["comparison"]) == ["norms, in training", *KINDS[:-1]]
    out = (folder / "out").read_text()
    assert "step-00000002 measured; 1 of 3, ETA" in out and "after 320 tokens: batches of 8 x 16 tokens" in out
    assert "total from microbatches of 2: S" in out
    assert out.splitlines()[-1].endswith("x the norm layers' in training; the run has batch.noise_to_total = 1.4")
    assert "norm layers' noise scale in training" in (folder / "found.svg").read_text()


def test_a_factor_is_found_again(tool: ModuleType) -> None:
    """Of a total whose noise scale is 1.4 times the norms' at every checkpoint, beside a kind that has nothing to do
    with it."""
    random = np.random.default_rng(0)
    scale = np.array([2.0, 10.0, 30.0, 50.0, 90.0, 100.0, 120.0, 160.0])
    other = random.permutation(scale)
    exact = np.ones((8, 16, 3, 2))
    for k, each in enumerate((scale, other, 1.4 * scale)):
        exact[:, :, k, 1] = each[:, None]
    exact[..., 0] += 0.05 * random.normal(size=(8, 16, 3))
    exact[..., 1] *= 1 + 0.05 * random.normal(size=(8, 16, 3))
    smoothed = np.stack((np.full(8, 0.1), 0.1 * 0.5 * scale), -1)
    results = tool.compare(smoothed, exact, ["norms", "mlp", "total"])
    assert results["norms, in training"]["slope"] == pytest.approx(2.8, rel=0.05)
    assert results["norms, in training"]["r"] > 0.98
    low, high = results["norms"]["slope_interval"]
    assert 1.3 < low < 1.4 < high < 1.5 and low < results["norms"]["slope"] < high
    assert results["norms"]["r_interval"][0] > 0.98 > 0.9 > results["mlp"]["r"] > results["mlp"]["r_interval"][0]
    exact[..., 0] -= 1  # of either sign
    results = tool.compare(smoothed, exact, ["norms", "mlp", "total"])
    assert np.isnan(results["norms"]["slope_interval"]).all()


def test_the_kinds_of_layers(tool: ModuleType) -> None:
    block = ["blocks.0.attention_norm", "blocks.0.attention.query_norm", "blocks.0.attention.qkv", "blocks.0.mlp.up"]
    layers = ["embedding", *block, "final_norm", "unembedding"]
    inner = {"norms": [*block[:2], "final_norm"], "attention": [block[2]], "mlp": [block[3]]}
    assert tool.kinds_of(layers, True) == {**inner, "total": [*block, "final_norm"]}
    ends = {"embedding": ["embedding"], "unembedding": ["unembedding"]}
    assert tool.kinds_of(layers, False) == {**inner, **ends, "total": layers}


MISTAKES: dict[str, tuple[list[Any], str]] = {
    "nowhere": (["nowhere"], "nowhere is neither a checkpoint nor a run directory"),
    "one batch": (["runs/run", "--batches", 1], "--batches 1 must be at least 2"),
    "no multiple": (["runs/run", "--batch", 5], "--batch 5 at runs/run/checkpoints/step-00000002 must be"),
    "too small": (["runs/run", "--batch", 1, "--micro-batch", 1], "must be at least 2, and whole microbatches of 1"),
    "none": (["runs/run", "--batch", 0], "--batch 0 at"),
    "no microbatch": (["runs/run", "--micro-batch", 0], "whole microbatches of 0; change it, or --micro-batch"),
}


@pytest.fixture
def run(tool: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Callable[..., str]:
    """Return a function that runs the command and returns its one-line error."""
    monkeypatch.chdir(folder)

    def error_of(*words: Any) -> str:
        assert cli.main([*COMMAND, *map(str, words)]) == 2
        out, error = capfd.readouterr()
        assert out == "" and error.startswith("megahp: ") and error.count("\n") == 1
        return error

    return error_of


@pytest.mark.parametrize(("words", "expected"), MISTAKES.values(), ids=MISTAKES)
def test_invalid_input_is_reported_in_one_line(run: Callable[..., str], words: list[Any], expected: str) -> None:
    assert expected in run(*words)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("config", {"model": {"experts": 4}}, "model.experts = 4 at"),
        ("config", {"sparsity": {"method": "static", "density": 0.5}}, "sparsity.method = 'static' at"),
        ("data", "another", "is not what"),
    ],
    ids=["experts", "sparse", "other data"],
)
def test_runs_that_cannot_be_measured(
    run: Callable[..., str], folder: Path, tmp_path: Path, key: str, value: Any, expected: str
) -> None:
    state = json.loads((folder / "runs/run/checkpoints/step-00000006/state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps({**state, key: value}))
    write_manifest(tmp_path)
    assert expected in run(tmp_path)
