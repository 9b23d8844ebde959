"""Every study of examples/ that trains, at toy size: its own command, in an empty folder, writes results and figure,
and run again adds nothing.

Not here: the density study and infinite-compute, whose commands tests/test_examples.py runs; decay-to-zero/long.sh,
which is study.sh's command at other tokens and rates; forecasting needs statsmodels; batch-growth/branches.py,
batch-target and the quick start's seeds start dozens of processes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from corpus import write_corpus

ROOT = Path(__file__).parent.parent
TOY = "model.width=16 model.heads=1 train.validation_samples=64 train.dtype=float32"
SWEEP = f"{TOY} train.tokens=2048 --seeds 1 --jobs 2"
SCRIPT = f"{TOY} train.tokens=4096 --seeds 1"
CHAINS = (  # of examples/studies.py
    *("btlm", "crystal", "bilingual", "sparse-to-dense", "pruning", "family", "multigrid", "qat", "experts", "mixture"),
    *("low-memory", "fp4"),
)
COMMANDS = {  # a study's command, and its results
    **{
        f"python examples/{name}/study.py --scale 0.05 --seeds 1 --jobs 2": f"runs/{name}-0.05/results.jsonl"
        for name in CHAINS
    },
    f"sh examples/depth-transfer/study.sh {SWEEP} --family model.layers=1,2": "runs/depth-transfer.json",
    f"sh examples/depth-transfer/sparse.sh {SWEEP} --family model.layers=1,2": "runs/depth-sparse.json",
    f"sh examples/decay-to-zero/study.sh {TOY} --seeds 1 --jobs 2 --family train.tokens=2048,4096 && "
    "python examples/decay-to-zero/compare.py": "examples/decay-to-zero/results.json",
    f"python examples/norm-layers/study.py {SCRIPT} model.layers=1 checkpoint.every=2 --batches 2": (
        "runs/norm-layers-*/results.jsonl"
    ),
    f"python examples/power-lines/study.py {SCRIPT} model.layers=1 --jobs 2 --points 1": (
        "runs/power-lines-*/results.jsonl"
    ),
    f"python examples/batch-growth/study.py --quick --corpora english --jobs 2 {TOY} train.tokens=4096": (
        "runs/batch-growth-quick.jsonl"
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples without the results that these commands write, and toy corpora in place of their own."""
    folder = tmp_path_factory.mktemp("studies")
    shutil.copytree(ROOT / "examples", folder / "examples")
    for results in folder.glob("examples/*/results*.json*"):
        if results.parent.name != "batch-growth":  # whose --quick reads its rates there
            results.unlink()
    (folder / "docs/figures").mkdir(parents=True)
    for prefix in ("data/stdlib/bytes", "data/batch-growth/english"):
        (folder / prefix).parent.mkdir(parents=True)
        write_corpus(folder / prefix)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_study(folder: Path, command: str) -> None:
    if "mixture" in command:
        pytest.importorskip("optuna")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    found = []
    for _ in range(2):
        done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
        (results,) = folder.glob(COMMANDS[command])
        found.append(results.read_text().splitlines())
    assert len(found[0]) == len(found[1]) > 1
