"""Run directories that commit c70b15a wrote, before the modules moved: whatever moves, they go on as they would have.

Its commands, in this folder, the second of which ended by itself when the batch had grown beyond 14:

    megahp train run.toml log.name=origin train.steps=30
    megahp train run.toml log.name=branched train.start_from=runs/origin train.tokens=12000 optimizer.lr=0.01 \
        resilience.stop_at_batch=14

`expected` is what it then wrote with --resume auto in place of resilience.stop_at_batch, and its sample of 40 tokens.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from distributed import runs, world

from megahp import checkpoint, cli
from megahp.exit_codes import NOT_CHECKED
from megahp.log.metrics import read_events, read_metrics
from megahp.log.replay import replay

HERE = Path(__file__).parent
BRANCH = ["train.start_from=runs/origin", "train.tokens=12000", "optimizer.lr=0.01"]
MEASURED = (
    "loss",
    "grad_norm",
    "grad_sq_example",
    "grad_sq_batch",
    "noise_scale",
    "validation_loss",
)  # all else is exact
NEW = ("noise_scale_total", "noise_scale_total_low", "noise_scale_total_high", "noise_to_total")  # not in c70b15a
CLOCK = ("tokens_per_second", "step_seconds", "noise_scale_layers", "noise_scale_tokens", "batch_target")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden") / "golden"
    shutil.copytree(HERE, folder)
    return folder


@pytest.fixture(scope="module")
def resumed(folder: Path) -> Path:
    runs.train(folder, "branched", *BRANCH, "--resume", "auto")
    return folder / "runs/branched"


def agree(got: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """Every logged number: what is decided to the last digit, what is measured up to another machine's rounding."""
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert [key for key in one if key not in NEW] == list(other)
        for key in other:
            if key in MEASURED:
                assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), (key, other["step"])
            elif key not in CLOCK:
                assert one[key] == other[key], (key, other["step"])


def test_it_resumes(resumed: Path, folder: Path) -> None:
    """To the same end, with the batch and the masks that it had: all that was logged, before and after, is equal."""
    agree(read_metrics(resumed), read_metrics(folder / "expected"))
    names = [(event["event"], event["step"], event.get("now")) for event in read_events(folder / "expected")]
    found = [(event["event"], event["step"], event.get("now")) for event in read_events(resumed)]
    assert [each[:2] for each in found] == [each[:2] for each in names]
    assert [now for event, _, now in found if event == "batch"] == [6, 8, 12, 18]
    assert not checkpoint.problems(checkpoint.find(resumed))


def test_it_replays(resumed: Path) -> None:
    """From its log, half of which was written by the old commit."""
    replayed = replay(resumed)
    assert replayed.differences == [] and [change.now for _, change in replayed.changes] == [6, 8, 12, 18]


def test_its_origin_is_branched_from_again(folder: Path) -> None:
    runs.train(folder, "again", *BRANCH)
    agree(read_metrics(folder / "runs/again"), read_metrics(folder / "expected"))
    assert [change.now for _, change in replay(folder / "runs/again").changes] == [6, 8, 12, 18]


def run(folder: Path, *words: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return cli.main(words)


def use(folder: Path) -> list[int]:
    """On one rank, which these commands expect to be alone."""
    sample = ["sample", "runs/branched", "--prompt", "abc ", "--tokens", "40", "--temperature", "0", "--save"]
    formats = ("huggingface", "megatron")
    return [run(folder, *sample)] + [
        run(folder, "convert", "--from", "megahp", "--to", form, "runs/branched", form) for form in formats
    ]


def test_it_samples_converts_and_reports(resumed: Path, folder: Path) -> None:
    assert world.run(1, use, folder)[0] == [0, 0, NOT_CHECKED]  # Megatron's format is not checked
    assert (resumed / "sample.txt").read_text() == (folder / "expected/sample.txt").read_text().removesuffix("\n")
    assert run(folder, "report", "runs/branched", "runs/origin") == 0
    page = (resumed / "report.html").read_text()
    assert "branched" in page and "origin" in page and "global batch 12 -&gt; 18" in page
    assert run(folder, "config", "runs/branched/config.toml") == 0
