"""The status of a run, from what it left."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from megahp.cluster.job import Queued
from megahp.log import metrics
from megahp.log.metrics import RunLog
from megahp.log.status import SILENT, RunStatus, read_status, runs_below, table

RUNNING, PENDING = Queued("12", "running", "1:00 of 2:00, 1 nodes n1"), Queued("13", "pending", "")


def write_run(
    folder: Path, events: Sequence[str] = ("started",), steps: int = 10, config: str = "tokens = 1_000"
) -> Path:
    """A run of 10 tokens a step and 5 tokens a second."""
    log = RunLog(folder)
    for event in events:
        log.event(event, f"why {event}", time=0)
    for step in range(1, steps + 1):
        log.metrics({"step": step, "tokens": 10 * step, "loss": 3.0, "tokens_per_second": 5.0, "step_seconds": 2.0})
    log.close()
    (folder / "config.toml").write_text(f"[train]\n{config}\n")
    return folder


@pytest.fixture(autouse=True)
def in_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


@pytest.mark.parametrize(
    ("events", "jobs", "state", "outlook"),
    [
        (("started", "finished"), (), "finished", "1970-01-01 00:00"),
        (("started", "finished"), (RUNNING,), "finished", "1970-01-01 00:00"),  # its job writes the report
        (("started", "stopped"), (), "stopped", "1970-01-01 00:00 why stopped"),
        (("started", "stopped", "requeued"), (), "stopped", "1970-01-01 00:00 why stopped"),
        (("started", "stopped", "requeued"), (PENDING,), "queued", "ETA 3 min 00 s"),
        (("started", "stopped", "resumed", "batch"), (PENDING, RUNNING), "running", "ETA 3 min 00 s"),
        (("started", "broken"), (), "broken", "1970-01-01 00:00 why broken"),
        (("started",), (Queued("12", "suspended", ""),), "suspended", "started 1970-01-01 00:00"),
    ],
)
def test_events_and_jobs_decide(
    tmp_path: Path, events: Sequence[str], jobs: Sequence[Queued], state: str, outlook: str
) -> None:
    found = read_status(write_run(tmp_path / "run", events), jobs)
    numbers = "10", "100/1k", "10%", "3.0000", "5"
    ids = ", ".join(job.id for job in sorted(jobs, key=lambda job: job.id))
    assert found == RunStatus(str(tmp_path / "run"), state, *numbers, outlook, ids)


def test_without_a_job_the_process_that_holds_the_lock_decides(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / ".lock").write_text(f"process {os.getpid()} on {socket.gethostname()}, Slurm job 7")
    with (run / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert read_status(run).state == "running"
    assert read_status(run).state == "interrupted"  # whoever has its number now
    assert read_status(run).outlook == "started 1970-01-01 00:00"


@pytest.mark.parametrize("lock", ["process 1 on elsewhere", "process 1", "nonsense", None])
def test_of_another_machine_s_process_silence_decides(tmp_path: Path, lock: str | None) -> None:
    run = write_run(tmp_path / "run")
    if lock:
        (run / ".lock").write_text(lock)
    assert read_status(run).state == "running"
    for name in ("metrics.jsonl", "events.jsonl"):
        os.utime(run / name, (0, time.time() - SILENT - 1))
    assert read_status(run).state == "interrupted"


def test_a_run_that_train_steps_ends_is_over_sooner(tmp_path: Path) -> None:
    (write_run(tmp_path / "run", config="tokens = 1_000\nsteps = 15") / ".lock").touch()
    assert read_status(tmp_path / "run").outlook == "ETA 10 s"


@pytest.mark.parametrize("config", ["tokens = 'many'", "tokens = -1", "steps = 5", "tokens = true"])
def test_what_the_settings_do_not_say_is_left_out(tmp_path: Path, config: str) -> None:
    found = read_status(write_run(tmp_path / "run", ("started", "finished"), config=config))
    assert (found.state, found.tokens) == ("finished", "")


def test_a_run_that_cannot_be_read_is_a_line_too(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "config.toml").write_text("[train")
    assert read_status(run).state == "unreadable" and "config.toml is not valid TOML" in read_status(run).outlook
    (run / "config.toml").unlink()
    (run / "config.toml").symlink_to("/etc/passwd")
    assert read_status(run).state == "unreadable" and "config.toml is a symbolic link" in read_status(run).outlook
    (tmp_path / "new").mkdir()
    assert read_status(tmp_path / "new") == RunStatus(str(tmp_path / "new"), "not begun")
    assert read_status(tmp_path / "new", [PENDING]).state == "queued"


def test_what_others_wrote_does_not_command_a_terminal(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ("started",))
    RunLog(run).event("stopped", "\x1b[2J\nmegahp: all is well", time=0)
    assert table([read_status(run)]).splitlines()[1].endswith("1970-01-01 00:00  [2J megahp: all is well")
    (tmp_path / "runs").mkdir()
    run.rename(tmp_path / b"runs/\xff".decode(errors="surrogateescape"))
    assert table([read_status(each) for each in runs_below(tmp_path / "runs")]).isascii()


def test_a_skipped_step_does_not_hide_the_loss_and_the_newest_log_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ("started", "finished"))
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "tokens": 110, "loss": null, "skipped": true}\n')
    for age, name in enumerate(("slurm/2.out", "crashes/rank-00000.txt", "slurm/1.out")):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).touch()
        os.utime(run / name, (0, age))
    found = read_status(run)
    assert (found.step, found.loss, found.speed, found.log) == ("11", "3.0000", "-", str(run / "slurm/1.out"))


def test_all_runs_below_a_folder_are_found(tmp_path: Path) -> None:
    """Runs in runs too, but not in what a run holds of its own, nor behind links."""
    names = ["a", "a/b", "sweep/mup/64/0.1/1", "z"]
    for name in [*names, "z/checkpoints/c"]:
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "events.jsonl").touch()
    (tmp_path / "link").symlink_to(tmp_path / "sweep")
    assert [str(run.relative_to(tmp_path)) for run in runs_below(tmp_path)] == names
    assert list(runs_below(tmp_path / "z")) == [tmp_path / "z"] and list(runs_below(tmp_path / "absent")) == []


def test_a_table_stands_in_columns() -> None:
    statuses = [RunStatus("a", "running", step="1,234", outlook="ETA 3 s"), RunStatus("longer", "queued")]
    rows = table(statuses).splitlines()
    assert [row.index(text) for row, text in zip(rows, ("STATE", "running", "queued"), strict=True)] == [8, 8, 8]
    assert rows[0].index("ETA, OR END") == rows[1].index("ETA 3 s") and rows[2] == "longer  queued"


def test_of_a_long_log_only_the_end_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, parsed, parse = write_run(tmp_path / "run", steps=2000), list[bytes](), metrics._parse
    monkeypatch.setattr(metrics, "_parse", lambda line: parsed.append(line) or parse(line))
    assert read_status(run).step == "2,000" and len(parsed) < 30
