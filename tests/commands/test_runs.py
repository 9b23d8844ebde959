"""What a run's owner asks of runs, with and without Slurm."""

from __future__ import annotations

from pathlib import Path

import pytest
from log.test_status import write_run

from megahp.cli import main

ANSWERS = """#!/bin/sh
echo "12|RUNNING|1:00|2:00|1|n1|megahp $PWD/runs/mine"
echo "13|PENDING|0:00|2:00|1|(Priority)|megahp $PWD/runs/new"
echo "14|RUNNING|1:00|2:00|1|n1|somebody else's"
"""
FAILS = "#!/bin/sh\necho 'squeue: error: no\nconfiguration' >&2\nexit 1\n"


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site's answer, which no emulated cluster gives; until it is written there is no squeue."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "bin/squeue"


def answer(squeue: Path, text: str) -> None:
    squeue.write_text(text.replace("$PWD", str(squeue.parent.parent)))
    squeue.chmod(0o755)


def test_runs_are_a_line_each(squeue: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(Path("runs/mine"))
    write_run(Path("runs/old/one"), ("started", "finished"))
    answer(squeue, ANSWERS)
    assert main(["runs"]) == 0
    said = capsys.readouterr()
    lines = [line.split() for line in said.out.splitlines()]
    assert lines[1][:7] == ["runs/mine", "running", "10", "100/1k", "10%", "3.0000", "12"]
    assert lines[2][:3] == ["runs/old/one", "finished", "10"]
    assert lines[3] == [str(squeue.parent.parent / "runs/new"), "queued", "13"] and said.err == ""
    assert main(["runs", "runs/old"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["RUN", "runs/old/one"]


def test_without_slurm_progress_is_shown(squeue: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And one line says what is lacking, where Slurm fails or a run came from it."""
    run = write_run(Path("runs/mine"), ("started", "finished"))
    for words in (["runs"], ["status"], ["status", str(run)]):
        assert main(words) == 0
        said = capsys.readouterr()
        assert "finished" in said.out and "100/1k" in said.out and said.err == ""
    (run / "slurm").mkdir()
    assert main(["status", str(run)]) == 0
    assert capsys.readouterr().err.startswith(
        "megahp: Slurm does not answer, so jobs are not shown: squeue is not installed"
    )
    answer(squeue, FAILS)
    for words in (["runs"], ["status"], ["status", str(run)]):
        assert main(words) == 0
        said = capsys.readouterr()
        assert "finished" in said.out and said.err.count("\n") == 1 and "no configuration" in said.err


def test_status_tells_more_of_the_runs_of_jobs(squeue: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(Path("runs/mine"))
    write_run(Path("runs/old"), ("started", "finished"))
    answer(squeue, ANSWERS)
    assert main(["status"]) == 0
    mine, rest = capsys.readouterr().out.split(f"{Path.cwd()}/runs/new\n")
    assert mine.splitlines()[:3] == [
        str(run.resolve()),
        "  job 12: running, 1:00 of 2:00, 1 nodes n1",
        "  running: step 10, loss 3.0000, 100/1k tokens 10%, 5 tok/s, ETA 3 min 00 s",
    ]
    assert "step 0 started: why started" in mine
    assert rest.startswith("  job 13: pending") and "  queued\n" in rest and "runs/old  finished" in rest


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["runs"], "runs is not a folder"),
        (["runs", "bin"], "bin holds no runs"),
        (["status"], "runs holds no runs, and you have no job of megahp launch"),
        (["status", "absent"], "absent is not a run directory"),
    ],
)
def test_where_there_is_nothing(squeue: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert told in capsys.readouterr().err
