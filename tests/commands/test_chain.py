"""Test `megahp launch --grow`: its plan, the script it would submit, invalid input. Needs no Slurm."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from corpus import write_corpus

from megahp.cli import main
from megahp.exit_codes import STOPPED
from megahp.log.metrics import read_metrics
from megahp.log.progress import human_count

RUN = """
[model]
layers = 1
width = 16
heads = 2
[data]
train = ["corpus"]
sequence_length = 16
[batch]
policy = "table"
table = ["640:8", "1664:16"]
global_batch = 4
micro_batch = 1
[train]
tokens = 3840
device = "cpu"
"""
GROW = ("launch", "run.toml", "--dry-run", "--nodes", "1", "--grow", "4")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "corpus", 0.02)
    (tmp_path / "run.toml").write_text(RUN)


def test_the_plan_beside_fixed_numbers_of_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    """10 steps of 4 sequences of 16 tokens, 8 of 8, 8 of 16, at 0.01 tokens a second: 64,000 s for the first, ..."""
    assert main([*GROW, "--speed", "0.01"]) == 0
    script, plan = capsys.readouterr()
    rows = [" ".join(line.split()) for line in plan.splitlines() if "megahp: warning: " not in line]
    assert rows[1:-1] == [
        "0 to 640 4 to 4 10 1 17 h 46 min 17.8",
        "640 to 1.66k 8 to 8 8 2 14 h 13 min 28.4",
        "1.66k to 3.71k 16 to 16 8 4 14 h 13 min 56.9",
        "growing to 4 1 d 22 h 103.1",
        "throughout 1 4 d 7 h 103.1",
        "throughout 4 1 d 1 h 103.1",
    ]
    assert (
        "\nnodes=1 grow=4 patience=1800 chain=${1:-$SLURM_JOB_ID} before=$2\nset -- run.toml\n" in script
        and "#SBATCH --nodes=1\n" in script
    )


def test_memory_is_compared_before_a_job_is_queued(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["launch", "run.toml", "--dry-run", "--nodes", "1", "train.device=cuda"]
    for more, said in (([], "GiB of a GPU\n"), (["--cluster", "h100"], "GiB of the 79.1 GiB of h100\n")):
        assert main([*words, *more]) == 0
        found = capsys.readouterr()
        assert found.err.endswith(said) and "memory: a step takes about " in found.err and "#SBATCH" in found.out
    large = [*words, "--cluster", "h100", "model.width=16384", "model.layers=40"]
    assert main(large) == 2
    found = capsys.readouterr()
    assert "no layout fits 1 GPUs of h100" in found.err and not found.out
    assert main([*large, "--ignore-memory"]) == 0 and "#SBATCH" in capsys.readouterr().out


def test_without_a_speed_it_is_shares(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*GROW, "--patience", "0.5"]) == 0
    script, plan = capsys.readouterr()
    assert "growing to 4 45% 100%" in " ".join(plan.split()) and "patience=30 chain" in script


def test_a_started_run_continues_at_its_current_size(capsys: pytest.CaptureFixture[str]) -> None:
    """Its batch of 8 keeps two nodes busy; its speed is the logged one."""
    words = ("train", "run.toml", "resilience.stop_at_batch=8", "log.tensorboard=false")
    assert subprocess.run([sys.executable, "-m", "megahp", *words], capture_output=True).returncode == STOPPED
    assert main([*GROW]) == 0
    script, plan = capsys.readouterr()
    rows = [" ".join(line.split()) for line in plan.splitlines() if "megahp: warning: " not in line]
    assert rows[1].startswith("640 to 1.66k 8 to 8 8 2 ") and rows[2].startswith("1.66k to 3.71k 16 to 16 8 4 ")
    speeds = [step["tokens_per_second"] for step in read_metrics(Path("runs/run"))]
    assert rows[-1].startswith(f"{human_count(statistics.median(speeds))} tokens a second and node")
    assert "#SBATCH --nodes=2\n" in script and "\nnodes=1 grow=4 " in script


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*GROW[:5], "--speed", "3"), "--speed 3 must be above 0, and needs --grow N"),
        ((*GROW[:5], "--patience", "3"), "--patience 3 must be above 0, and needs --grow N"),
        ((*GROW, "--patience", "0"), "--patience 0 must be above 0, and needs --grow N"),
        ((*GROW[:-1], "1"), "--grow 1 is less than twice --nodes 1"),
        ((*GROW, "--launcher", "torchrun"), "--launcher torchrun with --grow"),
        ((*GROW, "batch.policy=constant", "batch.table=[]"), "batch.policy = 'constant' never grows"),
        ((*GROW, "resilience.stop_at_batch=8"), "resilience.stop_at_batch = 8 would end the job before the run"),
        ((*GROW, "--speed", "nan"), "--speed nan must be above 0"),
        ((*GROW, "--sbatch=--requeue"), "--sbatch --requeue: megahp sets --requeue itself"),
        ((*GROW[:5], "--sbatch=--nodes=3"), "--sbatch --nodes=3: megahp sets --nodes itself"),
        ((*GROW[:5], "--sbatch=--comment='a"), "cannot be read (No closing quotation)"),
        ((*GROW[:5], "--exclude", "."), "--exclude . is a folder; name a file"),
        ((*GROW, "parallel.dp_shard=1"), "needs 1 ranks and there are 2"),
        ((*GROW, "--ranks-per-node", "3"), "batch.global_batch = 4"),
    ],
)
def test_what_cannot_grow(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(list(words)) == 2
    output = capsys.readouterr()
    assert message in output.err and output.err.splitlines()[-1].startswith("megahp: ") and not output.out


def test_a_batch_to_stop_at_that_is_never_reached(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "run.toml", "resilience.stop_at_batch=4"]) == 2
    assert "resilience.stop_at_batch = 4 is not reached by growth from batch.global_batch =" in capsys.readouterr().err
