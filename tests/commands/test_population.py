"""Test populations: on planted losses with a known optimum, with real runs, and with invalid input."""

from __future__ import annotations

import json
import math
import subprocess
import sys
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
from megahp.data.indexed import IndexedWriter
from megahp.exit_codes import USER_ERROR
from megahp.log.metrics import newest_metrics

COMMAND = ["population"]
RUN = """
[model]
layers = 1
width = 32
heads = 4
[data]
train = ["corpus", "noise"]
validation = ["a:held-out"]
validation_fraction = 0.1
sequence_length = 16
[batch]
global_batch = 8
micro_batch = 8
[train]
tokens = 5120
validation_samples = 8
device = "cpu"
"""
RATE = "optimizer.lr=0.0001:1"


@pytest.fixture
def population(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.chdir(folder)
    if not Path("noise.idx").exists():
        write_corpus(folder / "held-out", 0.11)
        random = np.random.default_rng(0)
        with IndexedWriter("noise", 257) as writer:
            for _ in range(40):
                writer.add_document(random.integers(1, 257, 200).tolist())
    (folder / "run.toml").write_text(RUN)
    return lambda *words: cli.main(["population", "run.toml", *map(str, words)])


@pytest.fixture
def planted(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Losses that add up, over a member's line, how many octaves its rate is from one that falls from 0.1 to 0.01; the
    configs that were trained."""
    trained, losses = list[Any](), dict[Path, float]()

    def loss_of(config: Any, ranks: int) -> float:
        if config.directory not in losses:
            trained.append(config)
            number = int(config.directory.parent.name)
            parent = losses[Path(config.train.start_from)] if number else 0.0
            distance = math.log2(config.optimizer.lr / (0.1 * 10 ** (-number / 20)))
            losses[config.directory] = parent + distance**2
            config.directory.mkdir(parents=True, exist_ok=True)
            event = {"step": 1, "tokens": 1, "time": 0, "event": "finished", "reason": ""}
            (config.directory / "events.jsonl").write_text(json.dumps(event) + "\n")
        return losses[config.directory]

    monkeypatch.setattr(tool, "loss_of", loss_of)
    return trained


def loss_of_one_run(name: str, *settings: str) -> float:
    words = ["train", "run.toml", *settings, f"log.name={name}", "log.baselines=false"]
    subprocess.run([sys.executable, "-m", "megahp", *words], check=True)
    return next(newest_metrics(Path("runs", name)))["validation_losses"]["a"]


def decisions(folder: str) -> list[str]:
    return Path(folder, "decisions.jsonl").read_text().splitlines()[1:]


def test_follows_an_optimum_that_moves(population: Callable[..., int], planted: list[Any]) -> None:
    """The best rate falls tenfold: no constant one is as good as the schedule that the population finds."""
    assert population("--search", RATE, "--out", "moving", "--json", "moving.json", "--plot", "moving.svg") == 0
    found = json.loads(Path("moving.json").read_text())
    rates = np.array([step["optimizer.lr"] for step in found["schedule"]])
    optimum = 0.1 * 10 ** (-np.arange(20) / 20)
    octaves = np.abs(np.log2(rates / optimum))
    assert np.all(octaves[5:] < 0.6)
    constant = min((np.log2(rate / optimum) ** 2).sum() for rate in np.geomspace(0.001, 1, 1000))
    assert min(found["intervals"][-1]["losses"]) < constant / 2
    steps = {int(config.directory.parent.name): config.train.steps for config in planted}
    assert [*steps.values()] == [2 * (number + 1) for number in range(20)] and len(planted) == 400
    assert all(config.train.tokens == 5120 for config in planted)  # one schedule over all intervals
    assert [step["tokens"] for step in found["schedule"]] == [256 * number for number in range(20)]
    assert "<svg" in Path("moving.svg").read_text()


def test_the_worst_fifth_continue_from_the_best_fifth(tool: ModuleType) -> None:
    searched = [tool.Searched("optimizer.lr", 0.001, 0.1, None), tool.Searched("data.weights", 0.01, 1.0, 2)]
    settings = [{"optimizer.lr": 0.001 * (n + 1), "data.weights": [0.1 * n, 1 - 0.1 * n]} for n in range(10)]
    before = tool.Interval([], [*range(10)], settings)
    losses = [3.0, 1.0, 9.0, 2.0, math.inf, 4.0, 5.0, 6.0, 8.0, 7.0]
    factors = set()
    for seed in range(20):
        after = tool.next_interval(before, losses, searched, seed, 1)
        assert [n for n in range(10) if after.parents[n] != n] == [2, 4] and {*after.parents} >= {*range(10)} - {2, 4}
        assert {after.parents[2], after.parents[4]} <= {1, 3}
        for member in range(10):
            rate, of_parent = (
                each["optimizer.lr"] for each in (after.settings[member], settings[after.parents[member]])
            )
            if member in (2, 4):
                factors.add(round(rate / of_parent, 6))
                own, of_parent = (
                    each["data.weights"] for each in (after.settings[member], settings[after.parents[member]])
                )
                ratios = {round(a / b, 2) for a, b in zip(own, of_parent, strict=True) if 0.01 < a < 1}
                assert own != of_parent and ratios <= {0.8, 1.2}  # shares, before they add up to 1
                assert sum(tool.of_run_file(after.settings[member])["data.weights"]) == pytest.approx(1, abs=1e-3)
            else:
                assert after.settings[member] == settings[member]
    assert factors == {0.8, 1.2}
    edge = tool.Searched("optimizer.lr", 0.0019, 0.0021, None)
    assert {edge.explore(np.array(0.002), np.random.default_rng(seed)) for seed in range(9)} == {0.0019, 0.0021}
    losses = [math.inf, math.inf, 2.0, *[math.inf] * 7]  # more than a fifth diverged: all of them are replaced
    assert tool.next_interval(before, losses, searched, 1, 1).parents == [2] * 10


def test_repeats_itself_and_resumes_after_a_kill(
    population: Callable[..., int], planted: list[Any], tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--search", RATE, "--members", 4, "--intervals", 5]
    assert population(*words, "--out", "whole") == 0
    kept, count = tool.loss_of, len(planted)

    def killed(config: Any, ranks: int) -> float:
        if config.directory == Path("killed/3/2"):
            raise KeyboardInterrupt
        return kept(config, ranks)

    monkeypatch.setattr(tool, "loss_of", killed)
    population(*words, "--out", "killed")
    assert len(decisions("killed")) == 4 and decisions("killed") == decisions("whole")[:4]
    monkeypatch.setattr(tool, "loss_of", kept)
    assert population(*words, "--out", "killed") == 0
    assert decisions("killed") == decisions("whole") and len(planted) == 2 * count == 40
    assert population(*words, "--out", "killed") == 0 and len(planted) == 40  # replayed, and nothing trained
    assert population(*words, "--out", "other", "--seed", 2) == 0 and decisions("other") != decisions("whole")


def test_what_does_not_follow_from_the_losses_is_refused(
    population: Callable[..., int], planted: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--search", RATE, "--members", 3, "--intervals", 3, "--out", "replayed"]
    assert population(*words) == 0
    assert population(*words, "optimizer.beta2=0.9") == USER_ERROR
    assert "holds a population with other settings" in capsys.readouterr().err
    file = Path("replayed/decisions.jsonl")
    lines = file.read_text().splitlines()
    third = json.loads(lines[2])
    third["settings"][0]["optimizer.lr"] *= 2
    file.write_text("\n".join([*lines[:2], json.dumps(third), *lines[3:], ""]))
    assert population(*words) == USER_ERROR
    assert "line 3, does not follow from the runs' losses" in capsys.readouterr().err


def test_workers_share_an_interval_and_wait_for_its_end(
    population: Callable[..., int], planted: list[Any], tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads are workers too: a lock is of an open file."""
    kept, words, begun = tool.loss_of, ["--search", RATE, "--members", 4, "--intervals", 4], list[Path]()

    def slow(config: Any, ranks: int) -> float:
        if not (config.directory / "events.jsonl").exists():
            begun.append(config.directory)
            time.sleep(0.02)
        return kept(config, ranks)

    monkeypatch.setattr(tool, "loss_of", slow)
    with ThreadPoolExecutor(3) as workers:
        assert [*workers.map(lambda _: population(*words, "--out", "shared"), range(3))] == [0, 0, 0]
    assert len(begun) == len({*begun}) == 16
    numbers = [int(config.directory.parent.name) for config in planted]
    assert numbers == sorted(numbers)
    assert population(*words, "--out", "alone") == 0 and decisions("shared") == decisions("alone")


def test_weights_go_to_the_source_that_is_validated(
    population: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In real runs; the other source is noise. The weights that are printed, as settings of one run, train the same
    model as the intervals did."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["--search", "data.weights=0.05:1", "--members", 3, "--intervals", 2, "--seed", 11, "optimizer.lr=0.02"]
    assert population(*words, "--out", "real", "--json", "real.json") == 0
    said = capsys.readouterr().out
    found = json.loads(Path("real.json").read_text())
    first, last = found["intervals"]
    shares = [settings["data.weights"][0] / sum(settings["data.weights"]) for settings in first["settings"]]
    assert np.argsort(first["losses"]).tolist() == np.argsort(shares)[::-1].tolist()
    assert last["parents"][np.argmax(first["losses"])] == np.argmin(first["losses"])
    assert found["schedule"][-1]["data.weights"][0] > np.median(shares)
    assert [*Path("real").rglob("checkpoints")] == [Path(found["best"], "checkpoints")]
    settings = [line.replace(" = ", "=") for line in said.splitlines()[-2:]]
    assert loss_of_one_run("whole", *settings, "optimizer.lr=0.02") == min(last["losses"])


def test_a_member_with_an_absurd_rate_is_replaced(
    population: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In real runs: the other one goes on as if it were alone, and its moments go with its weights."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["--search", "optimizer.lr=0.01:100", "--members", 2, "--intervals", 2, "--seed", 10]
    assert population(*words, "--out", "absurd", "--json", "absurd.json") == 0
    first, second = json.loads(Path("absurd.json").read_text())["intervals"]
    rates = [[settings["optimizer.lr"] for settings in each["settings"]] for each in (first, second)]
    good = int(np.argmin(rates[0]))
    assert rates[0][1 - good] > 1 and second["parents"] == [good, good]
    assert round(rates[1][1 - good] / rates[0][good], 3) in (0.8, 1.2)
    assert loss_of_one_run("alone", f"optimizer.lr={rates[0][good]}") == second["losses"][good]
    assert second["losses"][1 - good] < first["losses"][good]  # trained further, not anew


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--search", "optimizer.rate=0.1:1"], "is not a setting; did you mean"),
        (["--search", "optimizer.lr=1:0.1"], "the range must ascend"),
        (["--search", "optimizer.lr=0:0.1"], "begin above 0"),
        (["--search", "optimizer.lr=0.1"], "'0.1' is no range; write section.key=LOW:HIGH"),
        (["--search", "model.layers=1:4"], "data.weights can be searched, and model.layers is none"),
        (["--search", "model.rope_theta=1e3:1e5"], "cannot change when a run starts from a checkpoint"),
        (["--search", "resilience.stop_after=1:10"], "resilience.stop_after is none"),
        (["--search", "optimizer.muon_lr=0.01:0.1"], "optimizer.muon_lr has no effect"),
        (["--search", "optimizer.beta2=0.9:0.999"], "would leave the range"),
        (["--search", RATE, "checkpoint.remote=memory://x", "checkpoint.every=4"], "'memory://x' is not for"),
        (["--search", RATE, "--search", RATE], "optimizer.lr is given twice"),
        (["--search", RATE, "optimizer.lr=0.1"], "optimizer.lr is given twice"),
        (["--search", "optimizer.beta1=0.5:1.5"], "optimizer.beta1 = 1.5"),
        (["--search", "data.weights=0.1:1", "data.train=['corpus']"], "needs several sources"),
        (["--search", "data.weights=0.1:1", "data.mixtures=['2560:1,0']"], "mixtures that are not set"),
        (["--search", "data.weights=0.1:1", "data.validation=[]"], "name sets in data.validation"),
        (["--search", RATE, "train.steps=3"], "train.steps = 3 would end"),
        (["--search", RATE, "train.start_from=elsewhere"], "begins with new weights"),
        (["--search", RATE, "data.validation=[]", "train.validation_samples=0"], "gives no loss to compare"),
        (["--search", RATE, "batch.policy=ramp", "batch.largest=16"], "batch.policy = 'ramp'"),
        (["--search", RATE, "--intervals", "41"], "more than the 40 steps"),
        (["--search", RATE, "--members", "1"], "--members 1 must be at least 2"),
        (["--search", RATE, "--intervals", "1"], "--intervals 1 must be at least 2"),
        (["--search", RATE, "data.train=['corpus', 'nowhere']"], "nowhere"),
    ],
)
def test_bad_input_is_refused_before_anything_trains(
    population: Callable[..., int], words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert population("--out", "never", *words) == USER_ERROR
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1 and not Path("never").exists()
