"""The Python code's CUDA branches, walked without a GPU on a CUDA device that computes on the CPU (cuda_on_host.py).

Every tensor is on the device it should be on: an operator that mixes devices is refused, and numbers are the CPU's.
What cannot be walked so is listed in docs/gpu.md.
"""

from __future__ import annotations

import functools
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from corpus import write_corpus
from cuda.cuda_on_host import build
from distributed import world
from distributed.test_layouts import LAYOUTS, runs
from distributed.training import differences, settings_of, train_cases

from megahp.config import ParallelConfig
from megahp.config.resolve import with_values
from megahp.log.metrics import read_events, read_metrics
from tools.gpu_check import parts_of

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++ to compile the device")
RUN = """
[model]
layers = 2
width = 64
heads = 2
[data]
train = ["corpus"]
sequence_length = 32
mask_documents = true
validation_fraction = 0.2
[batch]
global_batch = 8
micro_batch = 4
[train]
device = "cuda"
tokens = 100_000
steps = 6
validation_samples = 6
[checkpoint]
every = 3
[log]
tensorboard = false
every = 1
"""
# All that the code uses of a CUDA build's own names; each was found in torch 2.11.0+cu130 on 2026-11-30.
NAMES = {
    *("CUDAGraph", "Stream", "_sleep", "current_device", "device", "device_count", "empty_cache"),
    *("get_device_capability", "get_device_name", "get_device_properties", "graph", "is_available", "is_initialized"),
    *("max_memory_allocated", "mem_get_info", "memory_allocated", "nccl.version", "reset_peak_memory_stats"),
    *("set_device", "set_sync_debug_mode", "stream", "synchronize", "is_bf16_supported"),
}
CELLS = [  # layout, model
    ("tp2 sp", "llama"),
    ("shard2", "muon"),
    ("shard2, zero 2, reduced every time", "gpt2"),
    ("replicate2", "alibi"),
    ("cp2", "gemma"),
    ("ep2", "moe"),
    ("pp2 1f1b", "gpt2"),
    ("pp2 zbv", "moe-loss"),
    ("tp2 sp shard2", "olmo"),
    ("replicate2 shard2", "neox"),
    ("pp2 tp2 sp, interleaved", "llama"),
]
EVERY = [
    (layout, model)
    for layouts in LAYOUTS.values()
    for layout in layouts
    for model in ("llama", "moe")
    if runs(layout, model)
]


@functools.cache
def environment() -> dict[str, str]:
    """That of a process which has the device, and so have its children."""
    build()
    paths = (HERE / "preloaded", ROOT, ROOT / "tests")
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}


def run(folder: Path, *words: str, code: int = 0, **more: str) -> str:
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=folder, env=environment() | more, capture_output=True, text=True, timeout=280)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def megahp(folder: Path, *words: str, code: int = 0, **more: str) -> str:
    return run(folder, "-m", "megahp", *words, code=code, **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda")
    write_corpus(folder / "corpus")
    (folder / "run.toml").write_text(RUN)
    return folder


def test_devices_do_not_mix(tmp_path: Path) -> None:
    """Else all below would show nothing: a CPU tensor beside a CUDA one is refused, forward, backward, by NCCL, and on
    another CUDA device; a scalar is not."""
    (tmp_path / "mixing.py").write_text("""
import torch, torch.distributed as dist
from megahp import launch, ops
launch.join(launch.World(), cuda=True)
x = torch.randn(4, 5, device="cuda", requires_grad=True)
(x * torch.tensor(2.0)).softmax(-1).square().sum().backward()
assert x.grad.device == torch.device("cuda", 0) and torch.ones(3).pin_memory().is_pinned()
for mix in (lambda: x + torch.ones(4, 5), lambda: x @ torch.ones(5, 2), lambda: torch.stack([x, torch.ones(4, 5)]),
            lambda: x + torch.ones(4, 5, device="cuda:1"), lambda: x.detach().numpy(),
            lambda: torch.ops.megahp.norm(x, None, 1.0, torch.ones(5), None, None, False, 1e-5, ""),
            lambda: torch._foreach_add_([x.detach()], [torch.ones(4, 5)]),
            lambda: torch._fused_adamw_([x.detach()], *[[torch.ones_like(x)] for _ in range(3)], [],
                [torch.tensor(1.0)], lr=0.1, beta1=0.9, beta2=0.9, weight_decay=0, eps=1e-8, amsgrad=False,
                maximize=False),
            lambda: dist.distributed_c10d._get_default_group()._get_backend(torch.device("cuda")).allreduce(
                [torch.ones(3)])):
    try:
        mix()
    except (RuntimeError, TypeError) as error:
        assert "device" in str(error) or "cuda" in str(error).lower(), error
    else:
        raise SystemExit("not refused")
print("all refused")
""")
    assert "all refused" in run(tmp_path, "mixing.py")


def test_names_are_those_of_a_cuda_build() -> None:
    """A name that only a CUDA build has cannot be tried here: look a new one up there, and add it to NAMES."""
    sources = [
        path.read_text() for folder in ("megahp", "tests/gpu", "tools") for path in (ROOT / folder).rglob("*.py")
    ]
    found = {name for source in sources for name in re.findall(r"torch\.(?:cuda|_C\._cuda)[._]([\w.]*\w)", source)}
    assert found <= NAMES, found - NAMES


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_trains_validates_saves_and_resumes(folder: Path, ranks: int) -> None:
    """With the CPU's numbers, to the rounding of float32; and it resumes from the checkpoint before its last."""
    sparse = ["sparsity.method=rigl", "sparsity.density=0.5", "sparsity.every=2"]
    words = ["train", "run.toml", *(["--ranks", str(ranks)] if ranks > 1 else sparse)]
    name, on_cpu = f"cuda{ranks}", f"cpu{ranks}"
    megahp(folder, *words, f"log.name={name}")
    megahp(folder, *words, f"log.name={on_cpu}", "train.device=cpu")
    got, wanted = (read_metrics(folder / "runs" / each) for each in (name, on_cpu))
    for key in ("loss", "grad_norm", "grad_sq_example", "grad_sq_batch"):
        assert [record[key] for record in got] == pytest.approx([record[key] for record in wanted], rel=1e-4), key
    assert got[-1]["validation_loss"] == pytest.approx(wanted[-1]["validation_loss"], rel=1e-5)
    shutil.rmtree(folder / "runs" / name / "checkpoints" / "step-00000006")
    megahp(folder, *words, f"log.name={name}", "--resume", "auto")
    again = read_metrics(folder / "runs" / name)
    assert [record["loss"] for record in again[-3:]] == pytest.approx([record["loss"] for record in got[-3:]], rel=1e-6)
    assert "resumed" in {event["event"] for event in read_events(folder / "runs" / name)}


COMMANDS = [
    "sample runs/trained --tokens 8",
    "evaluate runs/trained run.toml",
    "measure noise-scale runs/trained --batches 2",
    "benchmark checkpoint run.toml --saves 2 --folder .",
    "benchmark communication --ranks 2 --sizes 1K --repeats 1",
    "benchmark norm --device cuda --shape 2x8x64 --dtype float32 --op rms_norm --peer torch --turns 1",
]


def test_commands_compute_on_cuda(folder: Path) -> None:
    """Those that choose the device themselves find it too. train.steps=1: they need a checkpoint alone."""
    megahp(folder, "train", "run.toml", "log.name=trained", "train.steps=1")
    for command in COMMANDS:
        megahp(folder, *command.split())


def differing(folder: Path, cells: Iterable[tuple[str, str]]) -> list[str]:
    """What differs between cells on CUDA devices and one CPU rank, in float64."""
    lines: list[str] = []
    for ranks, layouts in LAYOUTS.items():
        cases, alone = {}, {}
        for layout, model in cells:
            if layout in layouts:
                config = settings_of(model, *layouts[layout], "train.dtype=float64")
                cases[f"{layout}: {model}"] = with_values(config, {"train.device": "cuda"}), 2
                alone[f"{layout}: {model}"] = replace(config, parallel=ParallelConfig()), 2
        (folder / "cases").write_bytes(pickle.dumps(cases))
        run(folder, str(HERE / "cells.py"), str(ranks), "cases", "outcomes")
        found, wanted = pickle.loads((folder / "outcomes").read_bytes()), world.run(1, train_cases, alone)[0]
        lines += [f"{name}: {each}" for name in cases for each in differences(found[name], wanted[name], 1e-9, 1e-9)]
    return lines


def test_layouts_train_what_one_cpu_rank_trains(tmp_path: Path) -> None:
    assert differing(tmp_path, CELLS) == []


@pytest.mark.slow
def test_every_layout_trains_what_one_cpu_rank_trains(tmp_path: Path) -> None:
    assert differing(tmp_path, EVERY) == []


def test_two_ranks_on_one_device_are_refused(folder: Path) -> None:
    """Where there are too few devices, before ranks start; where a launcher gives two ranks the same one, by all, in
    the words of `make gpu-check`."""
    words = ["train", "run.toml", "--ranks", "2", "log.name=refused"]
    said = megahp(folder, *words, code=2, CUDA_VISIBLE_DEVICES="0")
    assert "needs a CUDA device for each of 2 ranks and this machine has 1" in said
    (part,) = (part for part in parts_of("cuda", tiny=False) if part.exit_code == 2)
    done = subprocess.run(part.command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=100)
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert said.count("ranks 0 and 1 compute on one CUDA device (GPU-0 of ") == 1 and "Traceback" not in said


@pytest.mark.slow
def test_the_gpu_tests_of_training_pass() -> None:
    """Those that `make gpu-check` will run."""
    assert "2 passed" in run(ROOT, "-m", "pytest", "-p", "no:cacheprovider", "tests/gpu/test_train_gpu.py")
