"""Test the time-to-loss benchmark: real runs, rows by hand, and invalid input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megahp import cli
from megahp.exit_codes import USER_ERROR
from megahp.log.metrics import read_events, read_metrics

COMMAND = ["benchmark", "time-to-loss"]
RUN = """
[model]
layers = 1
width = 32
heads = 4
[data]
train = ["corpus"]
sequence_length = 16
validation_fraction = 0.1
[batch]
global_batch = 8
micro_batch = 8
[train]
tokens = 1536
validation_samples = 16
device = "cpu"
"""
ONE = ["--entries", "a: optimizer.lr=0.01"]
ENTRIES = ["still: optimizer.lr=1e-6", "tuned: optimizer.lr=1e-6", "tuned: optimizer.lr=0.02"]
WORDS = ["run.toml", "--target", "5.4", "--every", "4", "--out", "runs", "--seeds", "1,2", "--entries", *ENTRIES]


@pytest.fixture
def command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return lambda *words: cli.main([*COMMAND, *map(str, words)])


def test_the_fastest_trial_of_a_seed_counts_and_nothing_trains_twice(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*WORDS, "--json", "found.json", "--plot", "found.svg") == 0
    assert "[6/6] tuned, trial 2, seed 2" in capsys.readouterr().out and Path("found.svg").stat().st_size > 1000
    tuned, still = json.loads(Path("found.json").read_text())["rows"]
    assert (tuned["entry"], tuned["trials"], tuned["reached"], tuned["seeds"]) == ("tuned", 2, 2, 2)
    assert (still["entry"], still["trials"], still["reached"], still["seconds"]) == ("still", 1, 0, None)
    expected, totals = [], 0.0
    for seed in (1, 2):
        assert {event["event"] for event in read_events(Path(f"runs/tuned/2/{seed}"))} >= {"started", "finished"}
        steps = read_metrics(Path(f"runs/tuned/2/{seed}"))
        first = next(n for n, step in enumerate(steps) if step.get("validation_loss", 9) <= 5.4)
        assert steps[first]["step"] % 4 == 0 and len(steps) == 12
        expected.append(sum(step["step_seconds"] for step in steps[: first + 1]))
        totals += sum(step["step_seconds"] for n in (1, 2) for step in read_metrics(Path(f"runs/tuned/{n}/{seed}")))
    assert tuned["range"] == pytest.approx([min(expected), max(expected)])
    assert tuned["seconds"] == pytest.approx(sum(expected) / 2) and tuned["total_seconds"] == pytest.approx(totals / 2)
    before = Path("runs/tuned/2/2/metrics.jsonl").stat().st_mtime_ns
    assert command(*WORDS) == 0 and Path("runs/tuned/2/2/metrics.jsonl").stat().st_mtime_ns == before


def test_a_diverged_run_is_a_result(command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run.toml", "--target", "5.4", "--out", "wild", "--seeds", "1", "--entries"]
    assert command(*words, "a: optimizer.lr=1e30 optimizer.clip=0") == 0
    assert "not reached" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "0", *ONE], "--target 0 must be a loss above 0"),
        (["--every", "0", *ONE], "--every 0 must be at least 1"),
        (["--seeds", "1,1", *ONE], "has a seed twice"),
        (["--entries", "a: optimizer.lr=0.01", "b: data.sequence_length=8"], "validate on other samples"),
        (["--entries", "a: optimizer.lr=nothing"], "optimizer.lr"),
        (["--entries", "a b: optimizer.lr=0.01", "a/b: optimizer.lr=0.02"], "the same folder name"),
        (["--entries", "a: checkpoint.every=1"], "checkpoint.every (a) is set by the benchmark"),
        (["--entries", "a: missing.toml"], "missing.toml"),
    ],
)
def test_bad_input_is_refused_before_anything_trains(
    command: Callable[..., int], words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("run.toml", "--target", "5.4", "--out", "never", *words) == USER_ERROR
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1 and not Path("never").exists()
