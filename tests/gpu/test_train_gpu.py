"""Training on a CUDA device: the same run as on the CPU, and bf16 beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megahp.data.indexed import IndexedWriter

pytest.importorskip("pydantic", reason="checkpoints need it")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
ROOT = Path(__file__).parents[2]
RUN = """
[model]
layers = 2
width = 128
heads = 2
[data]
train = ["corpus"]
sequence_length = 64
validation_fraction = 0.1
[train]
tokens = 100_000
steps = 10
validation_samples = 8
[log]
tensorboard = false
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    random = np.random.RandomState(0)
    with IndexedWriter(str(folder / "corpus"), 257) as writer:
        for _ in range(40):
            writer.add_document(np.minimum(random.geometric(0.05, 2000), 256).tolist())
    (folder / "run.toml").write_text(RUN)
    return folder


def train(folder: Path, name: str, *words: str) -> list[dict[str, float]]:
    command = [sys.executable, "-m", "megahp", "train", "run.toml", f"log.name={name}", *words]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # packages brought along too
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def test_cuda_trains_what_the_cpu_trains(folder: Path) -> None:
    cpu, cuda = train(folder, "cpu", "train.device=cpu"), train(folder, "cuda", "train.device=cuda")
    for key in ("loss", "grad_norm", "grad_sq_example", "grad_sq_batch"):
        assert [record[key] for record in cuda] == pytest.approx([record[key] for record in cpu], rel=1e-3), key


def test_bf16_stays_near_fp32(folder: Path) -> None:
    fp32, bf16 = train(folder, "fp32", "train.device=cuda"), train(folder, "bf16", "train.dtype=bfloat16")
    assert [record["loss"] for record in bf16] == pytest.approx([record["loss"] for record in fp32], rel=1e-2)
