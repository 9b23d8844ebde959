"""Test verify-layout: every run's small one is valid, and differences are named."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from megahp import cli
from megahp.config import Config, resolve
from megahp.config.checks import find_conflicts
from megahp.config.presets import PRESETS
from megahp.diagnose.verify import shrink_config
from megahp.parallel.layout import Layout, fit

POLICIES = {
    "constant": (),
    "ramp": ("batch.largest=64", "batch.increment=32", "batch.ramp_samples=1000"),
    "table": ('batch.table=["1e5:64"]', "batch.rule=sqrt"),
    "law": ("batch.target=0.3",),
    "noise-scale": ("batch.delay=0.2", "batch.growth=1.5"),
    "measured": ("batch.noise_share=0.3",),
}
LAYOUTS = {1: (), 8: ("parallel.tp=2", "parallel.pp=2", "parallel.cp=2", "parallel.sequence_parallel=true")}
MODELS = [name for name, model in PRESETS.items() if model.get("kv_heads", model["heads"]) % 2 == 0]
KINDS = {
    "plain": (),
    "experts": ("model.bias=false", "model.experts=8", "model.dense_layers=1", "model.experts_per_token=3"),
    "float8": ("compute.fp8=torchao", "train.dtype=bfloat16"),
    "sparse": ("sparsity.method=static", "sparsity.density=0.25"),
    "quantized": ("model.quantize=int4",),
    "lengths": ('data.lengths=["1e5:1024"]', "train.dtype=float16"),
    "fp4": ("compute.fp4_forward=nvfp4", "compute.fp4_backward=nvfp4", "compute.fp4_hadamard=both"),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rules", ["sp", "mup", "completep", "smupar"])
@pytest.mark.parametrize("preset", MODELS)
def test_the_small_run_is_valid(preset: str, rules: str, policy: str) -> None:
    for (ranks, layout), kind in itertools.product(LAYOUTS.items(), KINDS.values()):
        words = (f"model.preset={preset}", f"parameterization.name={rules}", f"batch.policy={policy}")
        words += (*POLICIES[policy], *layout, *kind, 'data.train=["a"]', "model.mlp_width=256")
        config = resolve.resolve([("test", resolve.parse_overrides(words))]).config
        small = shrink_config(config, fit(config.parallel, ranks))
        assert small.model.layers <= 3 and small.model.width <= 64 and small.train.dtype == "float64"
        assert small.parallel == config.parallel and not [*find_conflicts(small)]


def test_the_layout_is_the_runs() -> None:
    config = resolve.resolve([("test", {"data": {"train": ["a"]}, "parallel": {"tp": 2}})]).config
    assert fit(config.parallel, 4) == Layout(tp=2, dp_shard=2)


def test_a_run_on_series_has_the_levels_of_its_coding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").write_text("value\n" + "".join(f"{n % 7}\n" for n in range(30)))
    coding, seen = tmp_path / "a.series", list[Config]()
    words = f"preprocess --series --input {tmp_path}/a.csv --output {tmp_path}/a --tokenizer {coding}".split()
    assert cli.main([*words, "--conditioning", "4", "--horizon", "2", "--levels", "5", "7"]) == 0
    monkeypatch.setattr("megahp.diagnose.verify.verify", lambda config, ranks: seen.append(config) or [])
    run = f'[data]\ntrain = ["{tmp_path}/a"]\ntokenizer = "{coding}"\nsequence_length = 13\n'
    (tmp_path / "run.toml").write_text(run)
    assert cli.main(["verify-layout", str(tmp_path / "run.toml"), "--ranks", "2"]) == 0
    assert seen[0].model.levels == (5, 7)


@pytest.mark.parametrize(
    ("break_it", "code", "message"),
    [("", 0, "the same model"), ("tensor.leave = lambda x, axis: x", 1, "gradient embedding.weight")],
)
def test_the_command_names_what_differs(tmp_path: Path, break_it: str, code: int, message: str) -> None:
    """Run the command, optionally with a module in its ranks that breaks megahp."""
    (tmp_path / "run.toml").write_text('[model]\nlayers = 2\nwidth = 32\nheads = 4\n[data]\ntrain = ["a"]\n')
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif 'megahp.diagnose.verify' in sys.orig_argv:\n"
        f"    from megahp.parallel import tensor\n    {break_it or 'pass'}\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "megahp", "verify-layout", "run.toml", "parallel.tp=2", "--ranks", "2"],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{':'.join(sys.path)}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert message in done.stdout
