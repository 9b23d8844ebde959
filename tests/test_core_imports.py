"""What training and the kernels' benchmark need beside a CUDA build of torch, and nothing else: README says it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from train.test_run import RUN

from megahp.data.indexed import IndexedWriter
from megahp.exit_codes import USER_ERROR

OPTIONAL = [
    *("sentencepiece", "tokenizers", "zstandard", "rich", "matplotlib", "tensorboard", "wandb", "torchao", "mpi4py"),
    "deepspeed",
]
# Runs a command without the packages that are named. At its end, says what our modules that were imported import.
ALONE = """
import ast, sys
SLOW = ("torch._dynamo", "torch.distributed.tensor", "torch.distributed.checkpoint", "sympy", "matplotlib")
absent, words = sys.argv[1].split(","), sys.argv[2:]
for name in absent:
    sys.modules[name] = None  # importing it now raises ImportError
from megahp import cli, launch

def leave(code):
    found = set()
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "megahp" and getattr(module, "__file__", None):
            for node in ast.parse(open(module.__file__).read()).body:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                found |= {each.split(".")[0] for each in names} - sys.stdlib_module_names
    print("slow:", *(name for name in SLOW if sys.modules.get(name)))
    print("imported:", *sorted(found - {"megahp"}), flush=True)
    old(code)

old, launch.leave = launch.leave, leave
launch.leave(cli.main(words))
"""
# Checks a run and stops where its ranks would be started.
STARTING = """
import sys
from megahp import cli, launch
sys.modules["torch"] = None
launch.spawn = lambda words, ranks, at_notice: print("started", ranks) or 0
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with IndexedWriter(str(tmp_path / "corpus"), 257) as writer:
        for _ in range(40):
            writer.add_document(list(b"some text, again and again " * 8))
    (tmp_path / "run.toml").write_text(RUN)
    return tmp_path


def run(folder: Path, absent: list[str], *words: str) -> str:
    command = [sys.executable, "-c", ALONE, ",".join(absent), *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_training_needs_only_torch_and_numpy(folder: Path) -> None:
    """And fsspec and pydantic, for its checkpoints; on one rank none of torch's parts that would double the time to its
    first step."""
    said = run(folder, [*OPTIONAL, "safetensors"], "train", "run.toml", "train.steps=2", "log.tensorboard=false")
    assert "no report: " in said and "matplotlib" in said
    assert len((folder / "runs/run/metrics.jsonl").read_text().splitlines()) == 2
    assert said.splitlines()[-2] == "slow:"
    assert said.splitlines()[-1] == "imported: fsspec numpy pydantic torch typing_extensions"


def test_ranks_are_started_before_torch_is_imported(folder: Path) -> None:
    """After the settings, the tokenizer and the data have been checked."""
    command = [sys.executable, "-c", STARTING, "train", "run.toml", "--ranks", "2", "--resume", "auto"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "started 2\n"), done.stderr
    (folder / "corpus.bin").unlink()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == USER_ERROR and "corpus.bin" in done.stderr and not done.stdout


def test_the_benchmark_of_kernels_needs_only_torch_and_numpy(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--shape", "2x4x16", "--dtype", "float32", "--turns", "1", "--peer", "torch"]
    said = run(tmp_path, [*OPTIONAL, "safetensors", "fsspec"], "benchmark", "norm", *words)
    assert said.splitlines()[-1] in ("imported: torch", "imported: numpy torch") and "rms_norm" in said
