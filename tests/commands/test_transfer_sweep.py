"""The sweep: its cells, a small one really trained, interrupted and gone on with, and mistakes."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from distributed import world

from megahp import cli
from megahp.commands import transfer_sweep
from megahp.diagnose import child_runs
from megahp.diagnose.curves import show
from megahp.diagnose.transfer import Curve, drift

SCRIPT = Path(__file__).parents[2] / "tools" / "transfer_sweep.py"
COMMAND = ["transfer-sweep"]
RUN = """
[model]
layers = 1
width = 32
heads = 4
vocab_size = 257
[data]
train = ["corpus"]
sequence_length = 16
validation_fraction = 0.1
[batch]
global_batch = 4
micro_batch = 4
[train]
tokens = 192
validation_samples = 8
"""
SWEEP = ["run.toml", "--grid", "optimizer.lr=0.003,0.01,1e38", "--family", "model.layers=1,2", "--seeds", "1"]


@pytest.fixture
def sweep(tool: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.chdir(folder)
    return lambda *words: cli.main([*COMMAND, *map(str, words)])


@pytest.fixture(scope="module")
def interrupted(folder: Path) -> Path:
    """A sweep of six cells that two workers began, and that was ended with its first cell."""
    command = [sys.executable, str(SCRIPT), *SWEEP, "--out", "swept", "--jobs", "2"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        said = next(line for line in process.stdout if line.startswith("["))
        process.terminate()
    assert "/6] all, size 2, " in said and ", seed 1: loss " in said  # the costliest first
    assert process.returncode == 128 + signal.SIGTERM
    return folder / "swept"


def test_looking_at_a_sweep_trains_nothing(
    sweep: Callable[..., int], interrupted: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither here nor in a job array; cells that have not ended are counted."""

    def files() -> set[tuple[Path, int]]:
        return {(path, path.stat().st_mtime_ns) for path in interrupted.rglob("*")}

    before = files()
    for words in ((), ("--slurm", 4)):
        assert sweep(*SWEEP, "--out", "swept", *words, "--show") == 0
        out = capfd.readouterr().out
        assert files() == before and "optimum drifts" not in out
    assert out.count("(1/1)") == int(out.split(" cells, ")[1].split()[0]) >= 1 and "(0/1)" in out
    assert re.search(r"^all, size 2   0.003: .*   1e\+38: ", out, re.MULTILINE)
    assert sweep(*SWEEP, "--out", "nothing", "--show") == 0
    assert capfd.readouterr().out.count("(0/1)") == 6 and not Path("nothing").exists()


def test_a_sweep_goes_on_where_it_was_interrupted(
    sweep: Callable[..., int], interrupted: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ended = [path for path in interrupted.rglob("events.jsonl") if child_runs.is_done(path.parent)]
    written = {path: path.stat().st_mtime_ns for path in ended}
    assert 1 <= len(ended) < 6
    assert sweep(*SWEEP, "--out", "swept", "--jobs", 1, "--json", "found.json", "--plot", "found.svg") == 0
    assert {path: path.stat().st_mtime_ns for path in ended} == written  # not trained again
    out = capfd.readouterr().out
    assert f"6 cells, {len(ended)} of them there already" in out and "[6/6]" in out
    assert sweep(*SWEEP, "--out", "swept", "--show", "--json", "shown.json") == 0
    assert "the optimum drifts" in capfd.readouterr().out
    found = json.loads(Path("found.json").read_text())
    assert json.loads(Path("shown.json").read_text())["drifts"] == found["drifts"]
    assert [curve["size"] for curve in found["curves"]] == [1, 2]
    for curve in found["curves"]:
        (slow,), (fast,), (diverged,) = curve["losses"]
        assert fast < slow < math.log(257) + 0.5 and diverged is None
        assert (
            curve["optimum"] == pytest.approx(0.01) and not curve["optima"][0]["at_edge"]
        )  # since beyond it runs diverge
        assert json.dumps(fast) in (interrupted / f"all/{curve['size']:g}/0.01/1/metrics.jsonl").read_text()
    assert found["drifts"]["all"]["slope"]["value"] == pytest.approx(0, abs=1e-9) and "one seed: no interval" in out
    assert "inf" in out and Path("found.svg").stat().st_size > 1000
    assert not list(interrupted.rglob("checkpoints")) and not list(interrupted.rglob("baselines.json"))


def test_the_losses_of_training_serve_too(
    sweep: Callable[..., int], interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(*SWEEP, "--out", "swept", "--last", 0.5, "--json", "last.json") == 0
    found = json.loads(Path("last.json").read_text())
    steps = [json.loads(line) for line in (interrupted / "all/1/0.01/1/metrics.jsonl").read_text().splitlines()]
    assert found["curves"][0]["losses"][1][0] == pytest.approx(np.mean([step["loss"] for step in steps[-2:]]))


def train_three(folder: Path) -> list[tuple[int, int]]:
    """Threads and open files after each of three cells trained in this process."""
    os.chdir(folder)
    tool = transfer_sweep
    words = [*SWEEP[:2], "optimizer.lr=0.001,0.002,1e38", *SWEEP[3:], "--out", "thrice"]
    left = []
    for cell in tool.read_cells(cli.parse([*COMMAND, *words])[1])[:3]:
        with tool.claimed(cell.claim):
            tool.train_cell(cell, 1, dist.HashStore())
        left.append((threading.active_count(), len(os.listdir("/proc/self/fd"))))
    return left


def test_a_run_leaves_nothing_behind_in_its_process(folder: Path) -> None:
    first, *others = world.run(1, train_three, folder)[0]
    assert others == [first, first]


def test_a_cell_has_one_worker(tool: ModuleType, sweep: Callable[..., int]) -> None:
    cell, other = tool.read_cells(cli.parse([*COMMAND, *SWEEP, "--out", "claims"])[1])[:2]
    with tool.claimed(cell.claim) as mine, tool.claimed(cell.claim) as again, tool.claimed(other.claim) as another:
        assert (mine, again, another) == (True, False, True)
    with tool.claimed(cell.claim) as mine:
        assert mine


def test_what_another_worker_still_trains_is_not_taken_for_missing(
    tool: ModuleType, sweep: Callable[..., int], interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SWEEP, "--out", "swept"]
    last = tool.read_cells(cli.parse([*COMMAND, *words])[1])[-1]
    shutil.rmtree(last.directory)
    with tool.claimed(last.claim):
        assert sweep(*words, "--jobs", 1) == 2
    assert f"megahp: {last} and 0 more are being trained by other workers" in capsys.readouterr().err


def test_cells_are_the_run_files_own_but_for_what_is_swept(tool: ModuleType, sweep: Callable[..., int]) -> None:
    words = ["run.toml", "optimizer.clip=0", "--grid", "optimizer.lr=1e-3,2e-3", "--out", "out", "--seeds", "3,4"]
    words += ["--family", "model.width=64,32", "model.heads=2,1"]
    words += ["--variants", "SP: parameterization.name=sp optimizer.lr=5e-4", "parameterization.depth_alpha=0.5"]
    cells = tool.read_cells(cli.parse([*COMMAND, *words])[1])
    assert len(cells) == 2 * 2 + 2 * 2 * 2
    assert {(cell.variant, cell.value) for cell in cells} == {
        ("SP", 5e-4), ("depth_alpha=0.5", 1e-3), ("depth_alpha=0.5", 2e-3)
    }  # fmt: skip
    assert len({cell.directory for cell in cells}) == len(cells)
    for cell in cells:
        config = cell.config
        assert (cell.size, config.model.heads) in {(64, 2), (32, 1)} and config.model.width == cell.size
        assert config.optimizer.lr == cell.value and config.train.seed == cell.seed
        assert config.optimizer.clip == 0 and config.train.tokens == 192
        assert config.parameterization.name == ("sp" if cell.variant == "SP" else "completep")


def test_a_job_array_runs_the_same_workers(sweep: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(*SWEEP, "--out", "array", "--slurm", 4, "--sbatch", "--time=1:00:00 -p gpu", "--dry-run") == 0
    line = capsys.readouterr().out.splitlines()[-1]
    comment = f"'--comment=megahp {Path('array').resolve()}'"
    assert line.startswith(f"sbatch --array=1-4 --output=array/worker-%a.log {comment} --time=1:00:00 -p gpu")
    assert "slurm/sweep.sbatch " in line and "--dry-run" not in line
    assert not Path("array").exists()


def test_a_sweep_with_a_job_array_gets_no_second_one(
    sweep: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Queued or running; and `megahp status` shows it."""
    (tmp_path / "squeue").write_text(
        f"#!/bin/sh\necho '12_[1-4]|PENDING|0:00|2:00|1|(Priority)|megahp {Path.cwd()}/array'\n"
    )
    (tmp_path / "sbatch").write_text("#!/bin/sh\nfalse\n")
    for name in ("squeue", "sbatch"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert sweep(*SWEEP, "--out", "array", "--slurm", 4) == 2
    assert "array has job 12_[1-4]: pending, 0:00 of 2:00" in capsys.readouterr().err and not Path("array").exists()
    assert cli.main(["status"]) == 0
    assert f"{Path('array').resolve()}\n  job 12_[1-4]: pending" in capsys.readouterr().out


def test_edges_and_divergence_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    lowest = Curve([1.0, 2.0, 4.0], np.array([[1.0, 1.1], [2.0, 2.0], [np.inf, np.nan]]))
    inside = Curve([1.0, 2.0, 4.0], np.array([[2.0, 2.1], [1.0, 1.0], [2.0, 2.2]]))
    highest = Curve([1.0, 2.0, 4.0], np.array([[3.0, 3.1], [2.0, 2.0], [1.0, 1.0]]))
    families = {"SP": {1.0: lowest, 2.0: highest}, "muP": {1.0: inside, 2.0: inside}}
    show(families, {name: drift(family) for name, family in families.items()})
    _, low, high, *calm, drifts, calm_too = capsys.readouterr().out.splitlines()
    assert low.endswith("at the grid's edge: extend it to 0.5; 2 of 6 runs diverged")
    assert high.endswith("at the grid's edge: extend it to 8") and drifts.endswith("add 0.5, 8 to --grid")
    single = {"one": {1.0: Curve([2.0], np.array([[1.0]])), 2.0: Curve([2.0], np.array([[1.0]]))}}
    show(single, {"one": drift(single["one"])})
    assert capsys.readouterr().out.count("one value, with nothing to compare") == 2
    assert not any("edge" in line or "diverged" in line for line in (*calm, calm_too))


MISTAKES: dict[str, tuple[list[Any], str]] = {
    "no such setting": (["--grid", "optimizer.rate=1,2"], "'optimizer.rate=1,2' is not a setting with values"),
    "no values": (["--grid", "optimizer.lr="], "is not a setting with values"),
    "one value": (
        ["--grid", "optimizer.lr=0.1"],
        "--grid optimizer.lr=0.1 has one value, and nothing to compare it with",
    ),
    "a value twice": (["--grid", "optimizer.lr=1,1"], "has a value twice"),
    "no number": (["--grid", "optimizer.name=adamw,muon"], "'adamw' is not a positive number"),
    "one size": (["--family", "model.layers=2"], "--family gives 1 of model.layers; give one value for each size"),
    "uneven": (["--family", "model.width=32,64", "model.heads=4"], "gives 2 of model.width, 1 of model.heads"),
    "grid in family": (["--grid", "model.layers=1,2"], "model.layers is given twice"),
    "given to all": (["--variants", "A: model.layers=3"], "model.layers is given twice"),
    "same label": (["--variants", "A: model.width=32", "A: model.width=64"], "two have the same label"),
    "its own": (["--variants", "A: train.seed=3"], "train.seed is set by the sweep"),
    "seeds": (["--seeds", "1,1"], "--seeds [1, 1] has a seed twice"),
    "jobs": (["--jobs", "0"], "--jobs 0 must be at least 1"),
    "share": (["--last", "2"], "--last 2 must be a share"),
    "sbatch alone": (["--sbatch", "-p gpu"], "add --slurm N"),
    "impossible": (["--family", "model.width=32,63"], "model.width = 63"),
    "idle": (["--variants", "A: parameterization.name=sp parameterization.base_layers=4"], "has no effect with"),
    "batch": (["--family", "batch.global_batch=4,6"], "batch.global_batch = 6 is not a multiple of 4"),
    "no validation": (["--variants", "A: train.validation_samples=0"], "add --last"),
}


@pytest.mark.parametrize(("words", "told"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_before_anything_is_trained(
    sweep: Callable[..., int], capsys: pytest.CaptureFixture[str], words: list[Any], told: str
) -> None:
    assert sweep(*SWEEP, "--out", "mistaken", *words) == 2
    said = capsys.readouterr().err
    assert said.startswith("megahp: ") and told in said and not Path("mistaken").exists()


def test_another_sweep_in_the_same_folder_is_refused(
    sweep: Callable[..., int], interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep("run.toml", "optimizer.clip=0.5", *SWEEP[1:], "--out", "swept") == 2
    said = capsys.readouterr().err
    assert "was trained with optimizer.clip = 1.0, not 0.5; name another --out" in said
