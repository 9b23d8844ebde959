"""Test the checkpoint benchmark: its figures, and invalid input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megahp import cli

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "benchmark_checkpoint.py"
COMMAND = ["benchmark", "checkpoint"]


def test_two_ranks_on_a_small_model(tmp_path: Path) -> None:
    config = ["model.layers=1", "model.width=32", "model.heads=1", "model.vocab_size=256", "train.device=cpu"]
    words = ["--ranks", "2", "--saves", "2", "--folder", str(tmp_path), "--json", str(tmp_path / "found.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *words, "--settings", *config]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "found.json").read_text())
    weights = 2 * 256 * 32 + 4 * 32 * 32 + 3 * 32 * 128 + 3 * 32
    assert results["bytes"] == 3 * 4 * weights and results["machine"]["ranks"] == 2
    assert all(
        0 < stall < save for stall, save in zip(results["turns"]["stall"], results["turns"]["save"], strict=True)
    )
    assert all(len(turns) == 3 for turns in results["turns"].values())
    assert "stall / synchronous save" in done.stdout
    assert [each.name for each in tmp_path.iterdir()] == ["found.json"]  # it clears away what it wrote


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--saves", "1"], "--saves 1 must be at least 2"), (["nowhere.toml"], "nowhere.toml does not exist")],
)
def test_invalid_input(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*COMMAND, *words]) == 2
    assert re.search(message, capsys.readouterr().err)
