"""Test the scaling benchmark: its points, two of them really trained, figures by hand, and invalid input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from megahp import cli
from megahp.config import with_values
from megahp.diagnose import child_runs
from megahp.log.metrics import RunLog, read_events, read_metrics

SCRIPT = Path(__file__).parents[2] / "tools" / "benchmark_scaling.py"
COMMAND = ["benchmark", "scaling"]
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
[schedule]
start = 900
[batch]
policy = "noise-scale"
global_batch = 8
micro_batch = 2
[train]
start_from = "elsewhere"
tokens = 1000
validate_every = 1
validation_samples = 8
device = "cpu"
[checkpoint]
every = 1
[resilience]
stop_after = 1e-9
"""
WORDS = ["run.toml", "--steps", "5", "--warm-up", "1", "--nodes"]
TRAINED = ["--modes", "strong", "--out", "trained"]


@pytest.fixture
def scaling(tool: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.chdir(folder)
    return lambda *words: cli.main([*COMMAND, *map(str, words)])


def curves_of(tool: ModuleType, *words: str) -> Mapping[tuple[str, str], Sequence[Any]]:
    return tool.read_curves(cli.parse([*COMMAND, *WORDS, *words])[1])


def test_an_interrupted_point_restarts_and_a_finished_one_does_not(
    scaling: Callable[..., int], tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    point, second = curves_of(tool, "1", "2", *TRAINED)["strong", "as given"]
    cut, other = point.directory, second.directory
    assert child_runs.train(with_values(point.config, {"train.steps": 2}), 1) == 0
    assert [path.name for path in (cut / "checkpoints").glob("step-*")] == ["step-00000002"]
    (cut / "events.jsonl").write_text("")
    (cut / "config.toml").unlink()
    capsys.readouterr()
    assert scaling(*WORDS, "1", *TRAINED) == 0
    assert "1 points, 0 of them already finished" in capsys.readouterr().out
    before = (cut / "metrics.jsonl").stat().st_mtime_ns
    assert scaling(*WORDS, "1", "2", *TRAINED, "--json", "found.json", "--plot", "found.svg") == 0
    assert (cut / "metrics.jsonl").stat().st_mtime_ns == before
    printed = capsys.readouterr().out
    assert "2 points, 1 of them already finished" in printed and "all ranks share this machine" in printed
    results = json.loads(Path("found.json").read_text())
    assert results["emulated"] and results["versions"]["torch"] and results["command"][:3] == ["megahp", *COMMAND]
    for run, row in zip((cut, other), results["rows"], strict=True):
        steps = read_metrics(run)
        assert [step["step"] for step in steps] == [1, 2, 3, 4, 5] and not (run / "checkpoints").exists()
        assert row["seconds"] == pytest.approx(np.median([step["step_seconds"] for step in steps[1:]]))
        assert row["tokens_per_second"] == pytest.approx(8 * 16 / row["seconds"])
        assert [event["event"] for event in read_events(run)] == [
            "started",
            "finished",
        ] and "validation_loss" not in steps[-1]
    assert results["rows"][1]["run"] == str(other) and read_events(other)[0]["layout"]["dp_shard"] == 2
    assert Path("found.svg").stat().st_size > 1000


def test_a_point_that_fails_ends_the_measurement(
    scaling: Callable[..., int], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first failure ends it with its exit code; runs get one thread per rank; unfinished points are not written."""
    monkeypatch.setattr(sys, "executable", str(trainer(folder / "failing", "echo $OMP_NUM_THREADS threads; exit 76")))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert scaling(*WORDS, "1", "2", "--modes", "strong", "--out", "failed") == 76
    out, err = capsys.readouterr()
    assert (
        err == "megahp: as given, 1 nodes, 1 ranks, batch 8 ended with exit code 76; repeat the command to continue\n"
    )
    assert "[1/2]" in out and "[2/2]" not in out
    assert (folder / "failed/as-given/emulated-1x1-batch-8/train.log").read_text() == "1 threads\n"
    monkeypatch.setattr(sys, "executable", str(trainer(folder / "idle", "exit 0")))
    assert scaling(*WORDS, "1", "--modes", "strong", "--out", "failed", "--json", "no.json") == 0
    assert (
        "nothing is finished yet; no.json is not written\n" in capsys.readouterr().out and not Path("no.json").exists()
    )


def trainer(file: Path, command: str) -> Path:
    """Stand in for Python when runs are started."""
    file.write_text(f"#!/bin/sh\n{command}\n")
    file.chmod(0o755)
    return file


def test_no_training_outlives_the_measurement(folder: Path) -> None:
    """The measurement is terminated while a run trains."""
    begin = "import sys; sys.executable = sys.argv.pop(1); from megahp.cli import main; sys.exit(main(sys.argv[1:]))"
    sleeper = trainer(folder / "sleeper", "echo $$ >pid; exec sleep 99")
    command = [sys.executable, "-c", begin, str(sleeper), *COMMAND, *WORDS, "1", "--modes", "strong", "--out", "ended"]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    measurement = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE)
    pid = folder / "pid"
    assert eventually(lambda: pid.exists() and pid.read_text())
    training = Path("/proc", pid.read_text().strip(), "cmdline")
    assert eventually(lambda: b"sleep" in training.read_bytes())
    measurement.terminate()
    assert measurement.wait(20) == -signal.SIGTERM
    assert eventually(lambda: not training.exists() or not training.read_bytes(), 9)


def eventually(what: Callable[[], Any], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not (done := what()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(done)


def test_a_point_of_another_measurement_is_refused(
    scaling: Callable[..., int], tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    point = curves_of(tool, "1", "--out", "other")["weak", "as given"][0]
    point.directory.mkdir(parents=True)
    child_runs.write_run_file(point.config).rename(point.directory / "config.toml")
    assert scaling(*WORDS, "1", "--out", "other", "--steps", "6", "--dry-run") == 2
    printed = capsys.readouterr().err
    assert "was trained with train.steps = 5, not 6; name another --out" in printed and printed.count("\n") == 1


def test_figures_by_hand(scaling: Callable[..., int], tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """From 2 nodes on 8 x 16 tokens; in weak scaling 16 and 32 sequences on 4 and 8 nodes."""
    words = ("2", "8", "4", "--layouts", "a: batch.micro_batch=1", "--out", "figures")
    seconds = {("weak", 2): 1.0, ("weak", 4): 1.25, ("weak", 8): 2.0, ("strong", 4): 0.8, ("strong", 8): 0.5}
    curves = curves_of(tool, *words)
    assert curves["weak", "a"][0] == curves["strong", "a"][0]
    for (mode, _), points in curves.items():
        for point in points:
            log(point.directory, seconds.get((mode, point.nodes), 1.0))
    assert scaling(*WORDS, *words, "--json", "figures.json") == 0
    assert "5 points, 5 of them already finished" in (printed := capsys.readouterr().out)
    columns = ("mode", "nodes", "global_batch", "tokens_per_second", "speed_up", "efficiency")
    rows = json.loads(Path("figures.json").read_text())["rows"]
    assert [tuple(row[key] for key in columns) for row in rows] == [
        ("weak", 2, 8, 128.0, 1.0, 1.0),
        ("weak", 4, 16, 204.8, 1.6, 0.8),
        ("weak", 8, 32, 256.0, 2.0, 0.5),
        ("strong", 2, 8, 128.0, 1.0, 1.0),
        ("strong", 4, 8, 160.0, 1.25, 0.625),
        ("strong", 8, 8, 256.0, 2.0, 0.5),
    ]
    assert rows[1]["quartiles"] == [1.25, 1.25 + 0.25] and rows[1]["steps"] == 3 and "62.5%" in printed
    first = curves["weak", "a"][0].directory
    (first / "events.jsonl").unlink()  # it is yet to be trained
    rows = tool.make_rows("weak", curves["weak", "a"], 1)
    assert [(row["nodes"], row["speed_up"], row["efficiency"]) for row in rows] == [(4, None, None), (8, None, None)]
    tool.show(rows, emulated=False)


def log(run: Path, seconds: float) -> None:
    """Log a run whose median step takes `seconds`, except for its warm-up and a skipped step."""
    steps = [{"step_seconds": 99.0}, *({"step_seconds": seconds + more} for more in (0.0, 0.5, 0.0))]
    steps.append({"step_seconds": 0.01, "skipped": True})
    log = RunLog(run)
    for number, step in enumerate(steps, start=1):
        log.metrics({"step": number, "tokens": number, **step})
    log.event("finished", "all steps")
    log.close()


def test_points_are_the_run_files_own_but_for_what_is_measured(scaling: Callable[..., int], tool: ModuleType) -> None:
    words = ("1", "2", "--ranks-per-node", "4", "--layouts", "FSDP: batch.micro_batch=1", "tensor: parallel.tp=2")
    curves = curves_of(tool, *words, "--out", "out")
    assert list(curves) == [(mode, layout) for mode in ("weak", "strong") for layout in ("FSDP", "tensor")]
    for (mode, layout), points in curves.items():
        assert [(point.nodes, point.ranks) for point in points] == [(1, 4), (2, 8)]
        for point, batch in zip(points, (8, 16 if mode == "weak" else 8), strict=True):
            config = point.config
            assert (config.batch.policy, config.batch.global_batch) == ("constant", batch)
            assert (config.parallel.tp, config.batch.micro_batch) == ((2, 2) if layout == "tensor" else (1, 1))
            assert config.train.steps == 5 and config.train.tokens == max(1000, 5 * batch * 16)
            assert config.model.width == 32 and str(point.directory).startswith(f"out/{layout}/emulated-")


def test_job_arrays(scaling: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One array per number of nodes, the largest first, without bad nodes."""
    (folder / "bad-nodes.txt").write_text("n7\n")
    words = ["1", "2", "--ranks-per-node", "2", "--out", "array", "--slurm", "--dry-run"]
    words.append("--sbatch=--time=9 --qos=high")
    assert scaling(*WORDS, *words) == 0
    (folder / "bad-nodes.txt").unlink()
    two, one = capsys.readouterr().out.split("#!/bin/bash")[1:]
    assert "\nset -- array/as-given/2x2-batch-16 array/as-given/2x2-batch-8\n" in two
    assert "\nset -- array/as-given/1x2-batch-8\n" in one
    for script, nodes, elements in ((two, 2, 2), (one, 1, 1)):
        for option in (f"array=1-{elements}", f"nodes={nodes}", "ntasks-per-node=2", "time=9", "qos=high"):
            assert script.count(f"#SBATCH --{option}\n") == 1
        assert f"#SBATCH --exclude={folder}/bad-nodes.txt\n" in script and "gpus" not in script
        assert f"#SBATCH --output={folder}/array/slurm/" in script
    assert not (folder / "array").exists()
    for run in ("2x2-batch-16", "1x2-batch-8"):
        log(folder / "array/as-given" / run, 1.0)
    assert scaling(*WORDS, *words) == 0
    (rest,) = capsys.readouterr().out.split("#!/bin/bash")[1:]
    assert "\nset -- array/as-given/2x2-batch-8\n" in rest and "#SBATCH --array=1-1\n" in rest
    assert scaling(*WORDS, "1", "--out", ".", "--slurm", "--dry-run") == 0
    assert f"#SBATCH --job-name={folder.name}\n" in capsys.readouterr().out


MISTAKES: dict[str, tuple[list[Any], str]] = {
    "no nodes": (["0", "2"], "--nodes [0, 2] and --ranks-per-node 1 must be at least 1"),
    "twice": (["2", "2"], "--nodes [2, 2]: each is measured once"),
    "warm-up": (["1", "--warm-up", "5"], "--warm-up 5 must be at least 0, and less than --steps 5"),
    "sbatch alone": (["1", "--sbatch=--time=9"], "--sbatch '--time=9' is for a job array; add --slurm"),
    "same label": (["1", "--layouts", "a b:", "a-b:"], "two of a b, a-b are the same"),
    "plot": (["1", "--plot", "f.doc"], "name a .svg"),
    "json": (["1", "--json", "nowhere/f.json"], "nowhere is no folder"),
    "its own": (["1", "--layouts", "a: train.steps=3"], "train.steps = 3 is set by the benchmark"),
    "policy": (["1", "--layouts", "a: batch.policy=law"], "batch.policy = 'law' is set by the benchmark"),
    "layout": (
        ["2", "3", "--layouts", "a: parallel.tp=2"],
        "layout a, 3 nodes: parallel: the layout dp_shard * x tp 2 needs a multiple of 2",
    ),
    "batch": (
        ["1", "8", "--modes", "strong"],
        "strong scaling, layout as given, 8 nodes: batch.global_batch = 8 is below 16",
    ),
    "no data": (["1", "--layouts", "a: data.train=['nothing']"], "nothing"),
}


@pytest.mark.parametrize(("words", "message"), MISTAKES.values(), ids=MISTAKES)
def test_invalid_input_is_reported_before_anything_is_trained(
    scaling: Callable[..., int], capsys: pytest.CaptureFixture[str], words: list[Any], message: str
) -> None:
    assert scaling(*WORDS, *words, "--out", "mistaken") == 2
    printed = capsys.readouterr().err
    assert (
        printed.startswith("megahp: ")
        and message in printed
        and printed.count("\n") == 1
        and not Path("mistaken").exists()
    )
