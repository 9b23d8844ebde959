"""Test the training benchmark: its JSON, layouts, the baseline's shape, the split of time, invalid input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megahp import cli
from megahp.scaling.flops import parameters, training_flops

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "benchmark_training.py"
COMMAND = ["benchmark", "training"]
TINY = ["--shape", "1x64", "--sequence", "16", "--micro-batch", "2", "--vocabulary", "128", "--dtype", "float32"]
SHORT = ["--turns", "2", "--steps", "1", "--warm-up", "1"]


def run(*words: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *TINY, *SHORT, "--device", "cpu", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_one_rank_beside_the_baseline(tool: ModuleType, tmp_path: Path) -> None:
    json_file, plot = tmp_path / "found.json", tmp_path / "found.svg"
    contestants = ["megahp", "megahp-without-noise", "nanogpt"]  # compiling takes longer than all of this
    words = ["--global-batch", "4", "--peak-tflops", "0.5", "--profile", "--json", str(json_file), "--plot", str(plot)]
    out = run(*words, "--contestants", *contestants, "--settings", "compute.recompute=full")
    results = json.loads(json_file.read_text())
    assert [row["contestant"] for row in results["rows"]] == contestants
    model = tool.resolve_case(
        cli.parse([*COMMAND, *TINY, "--contestants", "megahp"])[1], "1x64", 1, "float32"
    ).config.model
    for row in results["rows"]:
        assert row["tokens_per_step"] == 4 * 16 and row["parameters"] == parameters(model, 16)
        assert len(row["turns"]) == len(row["processor_turns"]) == 2
        assert min(row["turns"]) <= row["seconds"] <= max(row["turns"])
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(4 * 16)
        assert row["model_flops_per_token"] == training_flops(model, 16)
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * training_flops(model, 16) / 0.5e12)
        assert row["mfu"] < row["mfu_full_attention"]
        again = training_flops(model, 16, recomputed_layers=row["contestant"] != "nanogpt") / training_flops(model, 16)
        assert row["hfu"] == pytest.approx(row["mfu"] * again)
        assert sum(row["split"].values()) == pytest.approx(1) and min(row["split"].values()) >= 0
        assert list(row["split"]) == ["data", "compute", "communication", "host"] and row["split"]["compute"] > 0
        assert len(row["costliest"]) == 10 and row["costliest"][0]["name"] in out
        assert 2**26 < row["peak_memory"] < 2**36
    (comparison,) = results["comparisons"]
    assert comparison["baseline"] == "nanogpt" and comparison["speedup"]["low"] <= comparison["speedup"]["median"]
    ours, quiet, theirs = (row["turns"] for row in results["rows"])
    assert comparison["speedup"]["median"] == pytest.approx((theirs[0] / ours[0] + theirs[1] / ours[1]) / 2)
    assert comparison["noise_scale"]["median"] == pytest.approx((ours[0] / quiet[0] + ours[1] / quiet[1]) / 2)
    assert results["settings"][0]["model"]["width"] == 64 and results["machine"]["threads"] == 1
    assert "nanogpt" in plot.read_text() and "geometric mean of 1" in out


def test_every_layout_of_several_ranks(tmp_path: Path) -> None:
    run("--ranks", "2", "--tp", "1", "2", "--json", str(tmp_path / "found.json"), "--settings", "model.heads=2")
    results = json.loads((tmp_path / "found.json").read_text())
    rows = {(row["layout"], row["contestant"]): row for row in results["rows"]}
    assert [layout for layout, _ in rows] == ["tp1dp2", "tp1dp2", "tp2dp1", "tp2dp1"]
    assert [row["tokens_per_step"] for row in rows.values()] == [64, 64, 32, 32]
    assert all(row["split"]["communication"] > 0 and row["mfu"] is None for row in rows.values())
    assert "speedup" not in results["comparisons"][0]


def test_recomputed_layers(tool: ModuleType) -> None:
    full, second = "compute.recompute=full", "compute.recompute_every=2"
    for words, layers in (((full,), 5), ((full, second), 3), (("compute.recompute=selective",), 0)):
        options = cli.parse([*COMMAND, *TINY, "--contestants", "megahp", "--settings", *words])[1]
        assert tool.recomputed_layers(tool.resolve_case(options, "5x64", 1, "float32").config) == layers


MISTAKES = {
    "shape": (["--shape", "big"], "--shape big is neither LAYERSxWIDTH, such as 4x256, nor one of: debug"),
    "heads": (
        ["--shape", "1x130"],
        "model.head_size = 65 has 65 rotated dimensions, but rope rotates pairs of them; make it even",
    ),
    "turns": (["--turns", "0"], "--turns 0 must be at least 1"),
    "global batch": (["--global-batch", "0"], "--global-batch 0 must be at least 1"),
    "dtype": (["--dtype", "fp8"], "train.dtype = 'fp8' (options) must be one of: float32"),
    "batch": (["--global-batch", "3"], "batch.global_batch = 3 is not a multiple of 2"),
    "layout": (["--ranks", "3", "--tp", "2"], "needs a multiple of 2 ranks and there are 3"),
    "tp": (["--tp", "0"], "parallel.tp = 0 (--tp) must be at least 1"),
    "baseline of ranks": (["--ranks", "2", "--contestants", "nanogpt"], "the baseline runs on one rank; omit it"),
    "another model": (
        ["--settings", "model.norm=layernorm"],
        "model.norm = 'layernorm' and the baseline has 'rmsnorm'",
    ),
    "double": (["--settings", "model.vocab_size=9"], "model.vocab_size is set by another option"),
    "noise": (["--settings", "train.noise_scale=false"], "train.noise_scale is set by another option"),
    "setting": (["--settings", "model.wdth=9"], "model.wdth = 9 (command line) is not a setting; did you mean width"),
    "peak": (["--peak-tflops", "0"], "--peak-tflops 0 must be above 0"),
    "peaks": (["--peak-tflops", "9", "--dtype", "float32", "bfloat16"], "give one --dtype with it"),
    "cuda": (["--device", "cuda"], "needs a CUDA device for each of 1 ranks"),
}


@pytest.mark.parametrize(("words", "expected"), MISTAKES.values(), ids=MISTAKES)
def test_invalid_input_is_reported_in_one_line(
    tool: ModuleType, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    assert cli.main([*COMMAND, *TINY, *words]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("megahp: ") and error.count("\n") == 1
    assert expected in error
