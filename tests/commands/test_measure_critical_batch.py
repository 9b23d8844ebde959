"""Test the critical batch by branched training: its branches, one real measurement, and invalid input."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from distributed import runs

from megahp import cli
from megahp.checkpoint.store import write_manifest
from megahp.config import BatchConfig, Config, OptimizerConfig, ScheduleConfig, config_to_dict, config_to_toml, resolve
from megahp.diagnose.critical_batch import scatter
from megahp.log.metrics import read_events, read_metrics
from megahp.scaling.batch import Hyperparameters

SCRIPT = Path(__file__).parents[2] / "tools" / "measure_critical_batch.py"
COMMAND = ["measure", "critical-batch"]
RUN = """
[model]
layers = 1
width = 32
heads = 4
[data]
train = ["corpus"]
sequence_length = 16
validation_fraction = 0.1
[schedule]
name = "cosine"
floor = 0.1
[batch]
policy = "table"
global_batch = 4
micro_batch = 4
table = ["128:8"]
[train]
tokens = 5120
steps = 6
validation_samples = 8
[log]
tensorboard = false
"""
# 2 steps of 64 tokens, then 4 of 128: 128 tokens after the 512 of the warm-up
DONE = 640
FRACTION = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 128 / 4608))


@pytest.fixture(scope="module")
def folder(folder: Path) -> Path:
    """Return a folder with a run of six steps."""
    runs.train(folder, "run")
    return folder


@pytest.fixture
def run(tool: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.chdir(folder)
    return lambda *words: cli.main([*COMMAND, *map(str, words)])


def origin_of(tool: ModuleType, tree: dict[str, Any]) -> Any:
    config = resolve.from_dict(tree, "test")
    return tool.Origin(Path("from"), config, 1, 3000, 64, Hyperparameters(2e-3, 0.2, 0.9, 0.98, 1e-9))


OTHER_RUNS: dict[str, dict[str, Any]] = {
    "wsd and the noise scale": {
        "schedule": {"name": "wsd", "floor": 0.1, "decay": 0.3, "shape": "linear"},
        "batch": {"policy": "noise-scale", "largest": 99, "rule": "sqrt", "target": 0.3, "hysteresis": 1.5},
    },
    "inverse-sqrt and a ramp": {
        "schedule": {"name": "inverse-sqrt", "warmup": 0.2},
        "batch": {"policy": "ramp", "largest": 64, "increment": 8, "ramp_samples": 100, "micro_batch": 4},
    },
    "all else that is written down": {
        "train": {"steps": 9, "validate_every": 3, "tokens": 99_999},
        "checkpoint": {"every": 2, "keep": 9},
        "log": {"every": 7, "wandb": "offline", "wandb_project": "mine"},
    },
}


@pytest.mark.parametrize("tree", OTHER_RUNS.values(), ids=OTHER_RUNS)
@pytest.mark.parametrize("factor", [1, 1.5, 2, 8])
def test_a_branch_of_any_run_is_one_that_can_be_trained(tool: ModuleType, tree: dict, factor: float) -> None:
    origin = origin_of(tool, tree)
    config = tool.branch(origin, factor, 20_000_000, Path("out"))
    assert resolve.from_dict(config_to_dict(config), "branch") == config  # nothing refused as unused
    assert config.batch == BatchConfig(global_batch=round(64 * factor), micro_batch=origin.config.batch.micro_batch)
    assert config.schedule == ScheduleConfig("constant", start=3000, warmup=0.0)
    assert config.optimizer == OptimizerConfig("adamw", 2e-3 * math.sqrt(factor), 0.2, 0.9, 0.98, 1e-9)
    assert config.directory == Path(f"out/k-{factor:g}") and config.log.every == 1
    assert (config.train.tokens, config.train.steps, config.checkpoint.every) == (20_000_000, 0, 0)
    assert config.log.wandb == "off" and not config.log.tensorboard and not config.train.validation_samples
    assert (config.model, config.data) == (origin.config.model, origin.config.data)


def test_a_doubled_batch_has_sqrt_2_times_the_learning_rate(tool: ModuleType) -> None:
    """Check 35; Muon's rate keeps its ratio."""
    origin = origin_of(tool, {"optimizer": {"name": "muon", "lr": 4e-3, "muon_lr": 0.02}})
    one, two = (tool.branch(origin, k, 20_000_000, Path("out")).optimizer for k in (1, 2))
    assert one.lr == 2e-3 and two.lr == math.sqrt(2) * 2e-3
    assert one.muon_lr == pytest.approx(0.01) and two.muon_lr == pytest.approx(math.sqrt(2) * 0.01)


def test_measured_through_the_real_command(
    run: Callable[..., int], folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["runs/run", "--factors", 2, 1, "--tokens", 1300, "--tolerance", 9, "--json", tmp_path / "found.json"]
    assert run(*words) == 0
    out = capfd.readouterr().out
    assert "branch k-1 done; 1 of 2, ETA" in out
    assert "critical batch at 640 tokens: at least 2 x 8 = 16 sequences (256 tokens)" in out.splitlines()[-1]

    directories = [folder / "runs/run-critical-batch/step-00000006" / name for name in ("k-1", "k-2")]
    one, two = (read_metrics(directory) for directory in directories)
    assert [record["tokens"] for record in one] == [DONE + 128 * n for n in range(1, 11)]  # 1,300 less what is no step
    assert [record["tokens"] for record in two] == [DONE + 256 * n for n in range(1, 6)]
    assert {record["global_batch"] for record in one} == {8} and {record["global_batch"] for record in two} == {16}
    (small,), (large,) = ({record["lr"] for record in each} for each in (one, two))
    assert small == pytest.approx(4e-3 * FRACTION, rel=1e-12)
    assert large == small * math.sqrt(2)  # exactly: check 35
    assert {record["weight_decay"] for record in one + two} == {0.2}  # as power-lines had it at twice the batch
    assert one[0]["samples"] == 2 * 4 + 4 * 8 + 8  # the data goes on
    assert not any("validation_loss" in record for record in one + two)
    assert [event["event"] for event in read_events(directories[1])] == ["branched", "finished"]

    results = json.loads((tmp_path / "found.json").read_text())
    assert results["checkpoint"] == str(folder / "runs/run/checkpoints/step-00000006")
    expected = {"tokens": DONE, "branch_tokens": 1280, "tolerance": 9, "batch": 8, "sequence_length": 16}
    expected |= {"factor": 2, "critical_batch": 16, "critical_batch_tokens": 256, "lower_bound": True}
    assert {key: results[key] for key in expected} == expected
    average = two[0]["loss"]
    for record in two[1:]:
        average = (average + record["loss"]) / 2
    row = {"factor": 2, "batch": 16, "batch_tokens": 256, "lr": large, "steps": 5, "loss": average, "harmless": True}
    row |= {"limit": results["rows"][0]["loss"] + 9, "scatter": scatter([record["loss"] for record in two])}
    assert results["rows"][1] == row
    assert results["rows"][0]["limit"] is None and results["machine"]["ranks"] == 1

    written = ("metrics.jsonl", "events.jsonl")
    before = [(directory / name).read_bytes() for directory in directories for name in written]
    assert run(*words, "--plot", tmp_path / "found.svg") == 0
    assert [(directory / name).read_bytes() for directory in directories for name in written] == before
    assert "2 of 2 branches are already trained" in capfd.readouterr().out
    assert "largest harmless batch, 16" in (tmp_path / "found.svg").read_text()
    assert run(*words[:-2], "--json", tmp_path / "found.json", "--tokens", 2600) == 2  # of another measurement
    (message,) = capfd.readouterr().err.splitlines()
    assert "train.tokens = 1920, not 3200; name another --out" in message
    assert run(*words, "--plot", tmp_path / "found.txt2") == 2
    assert "name a .svg" in capfd.readouterr().err


def pretend(losses: dict[int, list[float]], codes: dict[int, int], diverged: int = 0) -> Callable[..., int]:
    """Return a stand-in for `train` that logs a branch's losses, by its factor, and returns an exit code."""

    def train(config: Config, ranks: int) -> int:
        factor, directory = config.batch.global_batch // 8, config.directory
        directory.mkdir(parents=True)
        records = [{"step": step, "tokens": 0, "loss": loss} for step, loss in enumerate(losses[factor], start=7)]
        rest = {"tokens": 0, "time": 0, "reason": ""}
        events: list[dict[str, Any]] = [{"step": 6, "event": "branched"} | rest]
        if factor == diverged:  # as megahp/train/loop.py does: it gives up before the last one is among the metrics
            events += [{"step": step, "event": "skipped"} | rest for step in range(7, 27)]
        elif not codes.get(factor):
            events.append({"step": 6 + len(records), "event": "finished"} | rest)
        for name, lines in (("metrics", records), ("events", events)):
            (directory / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (directory / "config.toml").write_text(config_to_toml(config))
        return codes.get(factor, 0)

    return train


def test_a_branch_that_diverges_is_harmful_and_over(
    run: Callable[..., int], tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Even if its losses, at weights that are no longer updated, are finite and lower."""
    losses = {1: [3.0, 3.0], 2: [3.5, 3.0], 4: [2.0] * 19}
    monkeypatch.setattr(tool, "train", pretend(losses, {4: 2}, diverged=4))
    words = ["runs/run", "--factors", 1, 2, 4, "--tokens", 5000, "--out", tmp_path / "out", "--tolerance", 0.25]
    assert run(*words) == 0
    out = capsys.readouterr().out
    assert "branch k-4 diverged" in out and "chance" not in out
    assert out.splitlines()[-1] == "critical batch at 640 tokens: 2 x 8 = 16 sequences (256 tokens)"
    assert run(*words, "--json", tmp_path / "found.json", "--plot", tmp_path / "found.png") == 0  # none trained again
    results = json.loads((tmp_path / "found.json").read_text())
    assert [row["loss"] for row in results["rows"]] == [3.0, 3.25, None]
    assert [row["harmless"] for row in results["rows"]] == [True, True, False]
    assert results["factor"] == 2 and not results["lower_bound"]
    capsys.readouterr()
    assert run(*words, "--tolerance", 0.2) == 0
    *_, note, sentence = capsys.readouterr().out.splitlines()
    assert "scatter by up to 0.2, more than --tolerance 0.2" in note  # sqrt(0.5^2 / 6)
    assert sentence.endswith("no factor above 1 was harmless, so it may be less")


def test_where_factor_1_diverges_nothing_is_measured(
    run: Callable[..., int], tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(tool, "train", pretend({1: [3.0] * 19, 2: [3.0] * 2}, {1: 2}, diverged=1))
    assert run("runs/run", "--factors", 1, 2, "--tokens", 5000, "--out", tmp_path / "out") == 2
    assert "k-1, at the batch of" in capsys.readouterr().err


@pytest.mark.parametrize("code", [1, 2, 137])
def test_a_branch_that_fails_ends_the_measurement(
    run: Callable[..., int], tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(tool, "train", pretend({1: [3.0] * 2, 2: [3.0] * 2}, {2: code}))
    assert run("runs/run", "--factors", 1, 2, 4, "--tokens", 5000, "--out", tmp_path / "out") == code
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["k-1", "k-2"]


MISTAKES = {
    "nowhere": (["nowhere", "--tokens", 5000], "nowhere is neither a checkpoint nor a run directory"),
    "too few tokens": (["runs/run", "--tokens", 5000], "--tokens 5000 must be at least 5120, 5 steps of 8 x 8 "),
    "endless": (["runs/run", "--tokens", "inf"], "--tokens inf must be"),
    "twice": (["runs/run", "--tokens", 5000, "--factors", 1, 2, 2.0], "--factors 1 2 2: each is trained once"),
    "below 1": (["runs/run", "--tokens", 5000, "--factors", 1, 0.5], "--factors 1 0.5: each must be at least 1"),
    "without 1": (["runs/run", "--tokens", 5000, "--factors", 2, 4], "1 is missing"),
    "not whole": (["runs/run", "--tokens", 5000, "--factors", 1, 1.3], "1.3 x 8 sequences, the batch at"),
    "not runnable": (
        ["runs/run", "--tokens", 5000, "--factors", 1, 1.25],
        "branch k-1.25: batch.global_batch = 10 is not a multiple of 4",
    ),
    "ranks": (["runs/run", "--tokens", 5120, "--ranks", 0], "--ranks 0 must be at least 1"),
    "tolerance": (["runs/run", "--tokens", 5120, "--tolerance", -1], "--tolerance -1 must be at least 0"),
}


@pytest.mark.parametrize(("words", "expected"), MISTAKES.values(), ids=MISTAKES)
def test_invalid_input_is_reported_in_one_line_and_trains_nothing(
    run: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str], words: list[Any], expected: str
) -> None:
    assert run(*words, "--out", tmp_path / "out") == 2
    out, error = capfd.readouterr()
    assert out == "" and error.startswith("megahp: ") and error.count("\n") == 1
    assert expected in error and not (tmp_path / "out").exists()


def test_where_the_rate_is_0_there_is_nothing_to_measure(
    run: Callable[..., int], folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    state = json.loads((folder / "runs/run/checkpoints/step-00000006/state.json").read_text())
    state["config"]["schedule"]["floor"], state["progress"]["tokens"] = 0.0, 5120
    (tmp_path / "state.json").write_text(json.dumps(state))
    write_manifest(tmp_path)
    assert run(tmp_path, "--tokens", 9999) == 2
    assert "the learning rate is 0, after 5120 of train.tokens = 5120" in capfd.readouterr().err
