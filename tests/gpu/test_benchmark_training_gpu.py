"""The training benchmark on a CUDA device: memory of its own, a split made of kernels, the compiled baseline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
ROOT = Path(__file__).parents[2]


def test_every_contestant(tmp_path: Path) -> None:
    words = ["--device", "cuda", "--shape", "2x1024", "--dtype", "bfloat16", "--turns", "2", "--profile"]
    words += ["--peak-tflops", "989", "--json", str(tmp_path / "found.json")]
    command = [sys.executable, str(ROOT / "tools" / "benchmark_training.py"), *words]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # packages brought along too
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["contestant"] for row in rows] == ["megahp", "megahp-without-noise", "nanogpt", "nanogpt-compiled"]
    for row in rows:
        assert 0 < row["mfu"] < row["mfu_full_attention"] < 1
        assert 16 * row["parameters"] < row["peak_memory"] < 2**34  # weights, gradients and both moments at least
        assert row["split"]["compute"] > 0.05 and sum(row["split"].values()) == pytest.approx(1)
        assert len(row["costliest"]) == 10 and not any("aten::" in each["name"] for each in row["costliest"])
