"""A run of two ranks that meets two dozen faults, one after another, and ends with the undisturbed run's numbers.

Every fault strikes once, at a step and a rank drawn with a seed (tests/faults/inject/sitecustomize.py). `python
tests/faults/test_soak.py` prints the table of docs/faults.md.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from corpus import write_corpus
from logged import numbers

from megahp import checkpoint
from megahp.exit_codes import FINISHED, STOPPED
from megahp.log.metrics import read_events

RUN = """
[model]
layers = 2
width = 16
heads = 2
[data]
train = ["corpus"]
sequence_length = 16
validation_fraction = 0.1
[batch]
global_batch = 4
micro_batch = 1
[train]
tokens = 9600
validate_every = 50
validation_samples = 4
[parallel]
dp_replicate = 2
[checkpoint]
every = 2
keep = 3
[resilience]
hang_after = 5.0
check_every = 2
[log]
tensorboard = false
baselines = false
"""
STEPS, INTERVAL = 150, 2
PASSING = ("activation", "gradient", "pause", "clock")  # which the run lives through
LEAVING = ("term", "usr1")  # after which whoever started it starts it again, as Slurm does
ENDING = ("kill", "exit", "exception", "segfault", "stop", "freeze", "weight", "drift", "sum")
SAVING = [f"{when} {what}" for what in ("shard", "manifest", "publication", "dropping") for when in ("before", "after")]
DAMAGE = ("flip",)  # of the newest checkpoint, and the run is killed


def faults(seed: int) -> list[dict[str, Any]]:
    """Two dozen, of every kind at least one, at steps apart so that none hides another."""
    draw = random.Random(seed)
    kinds = [*PASSING, *LEAVING, *ENDING, *SAVING, *DAMAGE]
    draw.shuffle(kinds)
    apart = STEPS // (len(kinds) + 1)
    return [
        {
            "kind": kind,
            "rank": 0 if kind in SAVING and "shard" not in kind else draw.randrange(2),
            "step": apart * number + draw.randrange(1, apart),
        }
        for number, kind in enumerate(kinds, start=1)
    ]


@dataclass
class Soak:
    """What a soak left: exit codes of its starts, what was said, and for each fault when it struck."""

    folder: Path
    faults: list[dict[str, Any]]
    codes: list[int]
    said: str
    seconds: float

    def events(self, *names: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.folder / "runs/soak") if event["event"] in names]

    def struck(self, number: int) -> tuple[float, int]:
        """When, and at which step."""
        mark = self.folder / f"faults.json.{number}"
        return mark.stat().st_mtime, int(mark.read_text())


def command(name: str, *words: str) -> list[str]:
    return [sys.executable, "-m", "megahp", "train", "run.toml", "--ranks", "2", f"log.name={name}", *words]


def soak(folder: Path, seed: int) -> Soak:
    """Start the run, as often as it asks for it, until it is finished."""
    planned = faults(seed)
    (folder / "faults.json").write_text(json.dumps(planned))
    inject = Path(__file__).parent / "inject"
    environment = {**os.environ, "FAULTS": str(folder / "faults.json"), "PYTHONPATH": f"{inject}:{os.getcwd()}"}
    codes, said, began = [], "", time.monotonic()
    while not codes or codes[-1] == STOPPED:
        done = subprocess.run(
            command("soak", "--restarts", "40", "--resume", "auto"),
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
        codes.append(done.returncode)
        said += done.stdout + done.stderr
    return Soak(folder, planned, codes, said, time.monotonic() - began)


def prepared(folder: Path) -> Path:
    """The folder, with data, run file and the undisturbed run."""
    write_corpus(folder / "corpus", 0.02)
    (folder / "run.toml").write_text(RUN)
    subprocess.run(command("undisturbed"), cwd=folder, check=True, capture_output=True, timeout=300)
    return folder


@pytest.fixture(scope="module")
def soaked(tmp_path_factory: pytest.TempPathFactory) -> Soak:
    return soak(prepared(tmp_path_factory.mktemp("soak")), seed=1)


def test_every_fault_struck(soaked: Soak) -> None:
    assert len(soaked.faults) == 24
    assert all(Path(f"{soaked.folder}/faults.json.{number}").exists() for number in range(24)), soaked.said


def test_the_run_is_the_undisturbed_one(soaked: Soak) -> None:
    assert soaked.codes[-1] == FINISHED, soaked.said
    wanted = numbers(soaked.folder / "runs/undisturbed")
    assert len(wanted) == STEPS
    assert numbers(soaked.folder / "runs/soak") == wanted  # losses, norms, noise scale, validation: every digit


def test_no_more_than_an_interval_is_lost(soaked: Soak) -> None:
    """Each start goes on from at most an interval, and the save that was under way, before the last fault."""
    struck = sorted(soaked.struck(number) for number in range(24))
    for start in soaked.events("resumed"):
        when, step = max(each for each in struck if each[0] <= start["time"])
        damaged = any(fault["kind"] in DAMAGE for fault in soaked.faults if fault["step"] == step)
        assert step - 1 - start["step"] <= 2 * INTERVAL + damaged * INTERVAL, (when, step, start)


def test_what_passes_ends_nothing(soaked: Soak) -> None:
    """Numbers that were not finite once are computed again; a pause and a clock that jumps change nothing."""
    kinds = [fault["kind"] for fault in soaked.faults]
    assert len(soaked.events("repeated")) == sum(kind in ("activation", "gradient") for kind in kinds)
    starts = 1 + sum(kind not in PASSING for kind in kinds)
    assert len(soaked.events("started", "resumed")) == starts
    assert soaked.seconds < 60 * starts  # each was noticed, and the run taken up again
    assert soaked.codes.count(STOPPED) == len(soaked.events("stopped")) == len(LEAVING)
    assert not soaked.events("skipped", "spike")


def test_the_guilty_are_named(soaked: Soak) -> None:
    rank = {fault["kind"]: fault["rank"] for fault in soaked.faults}
    said = re.sub(r"\s+", " ", soaked.said)
    for kind in ("stop", "freeze"):
        assert f"no step for 5 s: rank {rank[kind]} does not answer; rank {1 - rank[kind]} in" in said
    assert said.count("have come apart: unembedding.weight on ranks 0 and 1") == len({"weight", "drift"})
    for kind, signal_name in (("kill", "SIGKILL"), ("segfault", "SIGSEGV")):
        assert f"rank {rank[kind]} was ended by {signal_name}" in said
    assert (
        "RuntimeError: injected" in (soaked.folder / f"runs/soak/crashes/rank-{rank['exception']:05d}.txt").read_text()
    )
    (refused,) = soaked.events("refused")
    assert "damaged" in refused["reason"]


def test_nothing_is_left_behind(soaked: Soak) -> None:
    folder = soaked.folder / "runs/soak/checkpoints"
    assert [each for each in checkpoint.complete(folder) if checkpoint.problems(each)] == []
    assert not list(folder.glob(".partial-*"))


def table(soaked: Soak) -> str:
    """What each fault cost, as Markdown: which step it struck, which the run went on from, after how many seconds."""
    starts = soaked.events("resumed")
    rows = []
    for number, fault in enumerate(soaked.faults):
        when, step = soaked.struck(number)
        back = next((start for start in starts if start["time"] > when), None)
        if fault["kind"] in PASSING or back is None:
            cost = "none | none | -"
        else:
            cost = f"{back['step']} | {max(0, step - 1 - back['step'])} | {back['time'] - when:.1f}"
        rows.append(f"| {fault['kind']} | {fault['rank']} | {step} | {cost} |")
    head = (
        "| fault | rank | step | resumed from step | steps lost | seconds to train again |\n|---|---|---|---|---|---|"
    )
    return "\n".join([head, *rows, f"\n24 faults and {len(starts) + 1} starts in {soaked.seconds:.0f} s."])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        place = prepared(Path(name))
        outcome = soak(place, int(sys.argv[1]))
        same = numbers(place / "runs/soak") == numbers(place / "runs/undisturbed")
        print(table(outcome), f"Equal to the undisturbed run: {same}.")
