"""megahp plan on a cluster: the layout it sets, the run it simulates, one line for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from plan.small import config

from megahp import cli
from megahp.config import resolve
from megahp.plan import search
from megahp.plan.search import Found

RUN = """[model]  # of a test
preset = "llama-3-8b"
layers = 6
[parallel]
tp = 4
pp = 2
[data]
train = ["none"]
sequence_length = 4096
[batch]
global_batch = 64
micro_batch = 1
[train]
tokens = 1e11
dtype = "bfloat16"
[checkpoint]
every = 100
"""


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def confirm(found: Found, *_: object) -> Found:
        return found  # tests/plan/test_search.py has the trace's word

    monkeypatch.setattr(search, "confirm", confirm)
    (tmp_path / "run.toml").write_text(RUN)
    return tmp_path / "run.toml"


def test_the_best_layout_is_set(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run_file.parent / "found.json"
    assert cli.main(["plan", str(run_file), "--cluster", "h100", "--gpus", "8", "--set", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("8 x h100, ") and printed.endswith(f"written into {run_file}\n")
    best = json.loads(file.read_text())["layouts"][0]
    changed = resolve.load(run_file).config
    assert resolve.load(run_file, [f"{key}={value}" for key, value in best["settings"].items()]).config == changed
    assert changed.model == config().model and changed.checkpoint.every == 100
    assert "[model]  # of a test" in run_file.read_text()


def test_what_the_command_line_sets_is_written(run_file: Path) -> None:
    """Also what a search leaves alone; and a number of microbatches takes the place of "auto" and its limit."""
    automatic = 'micro_batch = "auto"\nlargest_micro_batch = 4'
    run_file.write_text(RUN.replace("micro_batch = 1", automatic).replace("pp = 2", "prefetch = 2"))
    words = ["parallel.zero=3", "parallel.prefetch=2", "model.vocab_size=128256"]
    assert cli.main(["plan", str(run_file), "--cluster", "H100", "--gpus", "8", "--set", *words]) == 0
    changed = resolve.load(run_file).config
    assert (changed.parallel.zero, changed.parallel.prefetch) == (3, 2)
    assert isinstance(changed.batch.micro_batch, int) and not changed.batch.largest_micro_batch


def test_a_run_is_simulated(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(run_file), "--cluster", "h100", "--gpus", "16", "--simulate", "--start", "2027-01-01"]
    growth = ["--grow", "64", "batch.policy=table", 'batch.table=["2e10:128", "5e10:256"]', "--price", "2"]
    assert cli.main([*words, *growth]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-6] for line in lines[1:4]] and len(lines) == 8
    assert (
        "2027-01-0" in lines[4] and lines[5].startswith("time        goodput 9") and lines[6].endswith("at 2 an hour")
    )


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--cluster", "h99", "--gpus", "8"], "--cluster h99 is unknown"),
        (["--cluster", "h100"], "--cluster NAME --gpus N"),
        (["--ranks", "8", "--cluster", "h100", "--gpus", "8"], "either --ranks N or --cluster"),
        (["--cluster", "h100", "--gpus", "0"], "--gpus 0 must be at least 1"),
        (["--cluster", "h100", "--gpus", "4", "parallel.tp=8"], "no layout of --gpus 4 divides"),
        (["--cluster", "v100-16", "--gpus", "1"], "no layout fits 1 GPUs of v100-16"),
        (["--cluster", "h100", "--gpus", "8", "--set", "--simulate"], "--set and --simulate"),
        (["--cluster", "h100", "--gpus", "8", "--mtbf", "5"], "add --simulate"),
        (["--cluster", "h100", "--gpus", "8", "--simulate", "--mtbf", "0"], "--mtbf 0 must be above 0"),
        (["--cluster", "h100", "--gpus", "12", "--simulate"], "not a whole number of nodes"),
        (["--cluster", "h100", "--gpus", "8", "--simulate", "parallel.tp=16"], "needs a multiple of 32 ranks"),
        (
            ["--cluster", "h100", "--gpus", "8", "--simulate", "--grow", "64", "parallel.tp=1"],
            "a constant one never does",
        ),
        (["--cluster", "h100", "--ranks", "8"], "either --ranks N or --cluster"),
        (["--validate"], "--validate alone"),
        (["--ranks", "8", "--plot", "x.svg"], "--plot x.svg is of --validate"),
        (["--ranks", "0"], "--ranks 0 must be at least 1"),
        (["--ranks", "8", "compute.fp4_forward=nvfp4"], "simulated FP4 is not planned; add compute.fp4_forward=none"),
        (["--ranks", "1024"], "batch.global_batch = 64 is below 256"),
        (["--ranks", "8", "--json", "parallel.tp=2"], "--json parallel.tp=2 looks like a setting"),
        (["--cluster", "h100", "--gpus", "1024", "--simulate"], "batch.global_batch = 64 is below 256"),
        (["--cluster", "h100", "--gpus", "8", "--simulate", "model.layers=200"], "no layout fits 8 GPUs of h100"),
        (["--cluster", "h100", "--gpus", "8", "--set", "batch.global_batch=32"], "set batch.global_batch in the file"),
        (["--cluster", "mine.toml", "--gpus", "8"], "cluster file mine.toml does not exist"),
    ],
)
def test_a_mistake_is_one_line(
    run_file: Path, words: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", str(run_file), *words]) == 2
    printed = capsys.readouterr()
    assert problem in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert run_file.read_text() == RUN


@pytest.mark.parametrize("line", ["launch = -1", "memory_bandwidth = 1e30", "memory_bandwidth = true", "units = 1.5"])
def test_absurd_numbers_of_a_cluster(
    run_file: Path, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megahp.plan.machine import FOLDER

    key = line.partition(" ")[0]
    lines = [line if each.startswith(f"{key} =") else each for each in (FOLDER / "h100.toml").read_text().splitlines()]
    monkeypatch.chdir(run_file.parent)
    Path("mine.toml").write_text("\n".join(lines))
    assert cli.main(["plan", "run.toml", "--cluster", "mine.toml", "--gpus", "8"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"megahp: cluster file mine.toml: {key} = ") and error.count("\n") == 1
