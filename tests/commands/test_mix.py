"""Test the search of data weights: on planted losses with a known optimum, with real runs, and with invalid input."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from corpus import write_corpus

from megahp import cli
from megahp.config import resolve
from megahp.data.indexed import IndexedDataset
from megahp.exit_codes import USER_ERROR
from megahp.log.metrics import newest_metrics

pytest.importorskip("optuna")
COMMAND = ["mix"]
RUN = """
[model]
layers = 1
width = 32
heads = 4
[data]
train = ["corpus", "second", "third"]
validation = ["a:held-out-a", "b:held-out-b"]
validation_fraction = 0.1
sequence_length = 16
[batch]
global_batch = 8
micro_batch = 8
[train]
tokens = 2304
validation_samples = 8
device = "cpu"
"""
BEST = np.array([0.7, 0.2, 0.1])


@pytest.fixture
def mix(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.chdir(folder)
    for number, name in enumerate(("second", "third", "held-out-a", "held-out-b")):
        if not Path(f"{name}.idx").exists():
            write_corpus(folder / name, 0.15 + 0.05 * number)
    (folder / "run.toml").write_text(RUN)
    return lambda *words: cli.main(["mix", "run.toml", *map(str, words)])


@pytest.fixture
def planted(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, ...]]:
    """Losses with their optimum at BEST, lower with more tokens; the weights and tokens asked for."""
    asked: list[tuple[float, ...]] = []

    def loss_of(config: Any, ranks: int) -> float:
        weights = np.array(config.data.weights)
        asked.append((*config.data.weights, config.train.tokens))
        return float(((weights - BEST) ** 2).sum() + 100 / config.train.tokens)

    monkeypatch.setattr(tool, "loss_of", loss_of)
    return asked


def test_finds_a_planted_optimum_and_saves_tokens(mix: Callable[..., int], planted: list[tuple[float, ...]]) -> None:
    Path("real.toml").write_text(RUN.replace("layers = 1", "layers = 2"))
    assert mix("--out", "planted", "--trials", 40, "--json", "found.json", "--set", "real.toml") == 0
    mixtures = json.loads(Path("found.json").read_text())["mixtures"]
    tokens = np.array([IndexedDataset(name).total_tokens for name in ("corpus", "second", "third")])
    assert len(mixtures) == 40 and mixtures[0]["weights"] == pytest.approx(tokens / tokens.sum())
    whole = [each for each in mixtures if len(each["losses"]) == 3]
    best = min(whole, key=lambda each: each["losses"]["9"])
    assert np.abs(np.array(best["weights"]) - BEST).sum() < 0.15
    written = [round(weight, 4) for weight in best["weights"]]
    assert resolve.load("real.toml").config.data.weights == pytest.approx(written)
    assert 5 < len(whole) < 30 and sum(tokens for *_, tokens in planted) < 0.9 * 40 * 2304


def test_resumes_and_gives_back_what_a_worker_left(
    mix: Callable[..., int], planted: list[tuple[float, ...]], tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mix("--out", "resumed", "--trials", 3) == 0
    count, kept = len(planted), tool.loss_of

    def killed(config: Any, ranks: int) -> float:
        kept(config, ranks)
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "loss_of", killed)
    mix("--out", "resumed", "--trials", 4)
    left = planted[count]
    monkeypatch.setattr(tool, "loss_of", kept)
    assert mix("--out", "resumed", "--trials", 4) == 0
    assert planted[count + 1] == pytest.approx(left)
    count = len(planted)
    assert mix("--out", "resumed", "--trials", 4) == 0 and len(planted) == count
    assert mix("--out", "resumed", "--trials", 4, "optimizer.lr=0.1") == USER_ERROR


def test_workers_take_different_mixtures_and_no_more_than_there_are(
    mix: Callable[..., int], planted: list[tuple[float, ...]], tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads are workers too: a lock is of an open file."""
    kept = tool.loss_of

    def slow(config: Any, ranks: int) -> float:
        time.sleep(0.05)
        return kept(config, ranks)

    monkeypatch.setattr(tool, "loss_of", slow)
    with ThreadPoolExecutor(3) as workers:
        assert [*workers.map(lambda _: mix("--out", "shared", "--trials", 7), range(3))] == [0, 0, 0]
    assert len({tuple(np.round(weights, 6)) for *weights, _ in planted}) == 7
    assert mix("--out", "shared", "--trials", 7, "--json", "shared.json") == 0
    assert len(json.loads(Path("shared.json").read_text())["mixtures"]) == 7


def test_trains_real_runs(mix: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert mix("--out", "real", "--trials", 1, "--shares", "0.5,1", "--json", "real.json") == 0
    (mixture,) = json.loads(Path("real.json").read_text())["mixtures"]
    (folder,) = Path("real").glob("*-*-*")
    for rung, tokens in (("1", 1152), ("3", 2304)):
        losses = next(newest_metrics(folder / str(tokens)))["validation_losses"]
        assert mixture["losses"][rung] == pytest.approx((losses["a"] + losses["b"]) / 2)
    assert not list(Path("real").rglob("checkpoints")) and math.isfinite(mixture["losses"]["3"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.train=['corpus']"], "is one source"),
        (["data.weights=[1, 1, 1]"], "are what is searched"),
        (["data.validation=[]"], "data.validation is empty"),
        (["--shares", "0.5,0.2,1"], "must be ascending"),
        (["train.steps=3"], "train.steps = 3 would end"),
        (["--set", "other.toml"], "has data.train = ['corpus']"),
        (["--shares", "0.5"], "end at 1"),
        (["--shares", "0.001,1"], "train.tokens"),
        (["--trials", "0"], "--trials 0 must be at least 1"),
    ],
)
def test_bad_input_is_refused_before_anything_trains(
    mix: Callable[..., int], words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("other.toml").write_text('[data]\ntrain = ["corpus"]\n')
    assert mix("--out", "never", *words) == USER_ERROR
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1 and not Path("never").exists()
