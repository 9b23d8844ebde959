"""The status of a run: its progress, or how it ended, from the ends of its logs, its lock and its jobs."""

import contextlib
import fcntl
import itertools
import os
import re
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megahp.cluster.job import Queued
from megahp.errors import UserError
from megahp.files import read_text, read_toml, refuse_links
from megahp.log.events import STARTS
from megahp.log.metrics import Record, newest_events, newest_metrics
from megahp.log.progress import human_count, human_duration

RUN_FOLDERS = {"checkpoints", "crashes", "slurm", "tensorboard", "wandb"}  # of a run directory: hold no other runs
ENDS = ("finished", "stopped", "broken")  # events after which a run does not train
SILENT = 600  # seconds without a new line after which a run on another machine counts as interrupted
HEADER = ("RUN", "STATE", "STEP", "TOKENS", "SHARE", "LOSS", "JOB", "LOG", "ETA, OR END")
COLUMNS = ("run", "state", "step", "tokens", "share", "loss", "job", "log", "outlook")
NEWEST = 20  # steps whose median is the speed behind the ETA


@dataclass(frozen=True)
class RunStatus:
    """The status of a run, as text; "" if unknown."""

    run: str
    state: str  # queued, running, finished, stopped, broken, interrupted, not begun, unreadable; or a state of Slurm's
    step: str = ""
    tokens: str = ""  # done/planned
    share: str = ""  # of them
    loss: str = ""
    speed: str = ""  # tokens per second
    outlook: str = ""  # the ETA, or when and why the run ended
    job: str = ""
    log: str = ""  # the newest file of its ranks' output


def runs_below(folder: Path) -> Iterator[Path]:
    """Yield every run directory in a folder, and the folder itself if it is one, in order."""
    for directory, inner, files in os.walk(folder):
        is_run = "events.jsonl" in files or inner == ["slurm"]  # the latter of a job that has not begun to train
        inner[:] = sorted(set(inner) - RUN_FOLDERS if is_run else inner)  # os.walk descends into what remains
        if is_run:
            yield Path(directory)


def read_status(run: Path, jobs: Sequence[Queued] = ()) -> RunStatus:
    """Return the status of a run and its jobs. If a file cannot be read, the error is the outlook."""
    jobs = sorted(jobs, key=lambda job: job.state == "pending")  # a running job before one that waits for it
    job_state = ("queued" if jobs[0].state == "pending" else jobs[0].state) if jobs else ""
    state = job_state or "not begun"
    job, log = ", ".join(job.id for job in jobs), _newest_log(run)
    steps, event = list[Record](), None
    try:
        refuse_links(run)
        total, last_step = _horizon(run)
        if (run / "events.jsonl").exists():
            event = next((event for event in newest_events(run) if event["event"] in (*ENDS, *STARTS)), None)
        if (run / "metrics.jsonl").exists():
            steps = list(itertools.islice(newest_metrics(run), NEWEST))
        if event and event["event"] == "finished":
            state = "finished"
        elif event and jobs:
            state = job_state
        elif event and event["event"] in ENDS:
            state = str(event["event"])
        elif event:
            state = "running" if _is_alive(run) else "interrupted"
        if not steps or not total:
            return RunStatus(str(run), state, outlook=_ended(event), job=job, log=log)
        step, tokens = steps[0]["step"], steps[0]["tokens"]
        loss = next((f"{loss:.4f}" for record in steps if (loss := record.get("loss")) is not None), "-")
        numbers = f"{step:,}", f"{human_count(tokens)}/{human_count(total)}", f"{tokens / total:.0%}", loss
        outlook = _eta(steps, total, last_step) if state in ("running", "queued") else _ended(event)
        return RunStatus(str(run), state, *numbers, human_count(steps[0].get("tokens_per_second")), outlook, job, log)
    except (UserError, OSError) as error:
        return RunStatus(str(run), "unreadable", outlook=str(error), job=job, log=log)


def table(statuses: Sequence[RunStatus]) -> str:
    """Return a line for each run, in columns."""
    rows = [HEADER, *([printable(getattr(each, name)) for name in COLUMNS] for each in statuses)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _is_alive(run: Path) -> bool:
    """Return whether the process that holds the run's lock is alive; on another machine, whether it logged lately."""
    lock = run / ".lock"
    owner = re.match(r"process (\d+) on (\S+?)(,|$)", read_text(lock, "lock")) if lock.exists() else None
    if owner and owner[2] == socket.gethostname():
        with open(lock) as file, contextlib.suppress(OSError):  # file systems without locks: ask for the process
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return False
            except BlockingIOError:
                return True
        return Path(f"/proc/{owner[1]}").exists()
    written = [path.stat().st_mtime for path in (run / "metrics.jsonl", run / "events.jsonl") if path.exists()]
    return time.time() - max(written, default=0) < SILENT


def _horizon(run: Path) -> tuple[int, int]:
    """Return train.tokens and train.steps of config.toml, 0 if unknown: another version may have written the file."""
    if not (run / "config.toml").exists():
        return 0, 0
    train = read_toml(run / "config.toml", "run file").get("train")
    values = [train.get(key) if isinstance(train, dict) else 0 for key in ("tokens", "steps")]
    tokens, steps = (value if type(value) is int and 0 < value < 2**63 else 0 for value in values)
    return tokens, steps


def _eta(newest: Sequence[Record], total: int, last_step: int) -> str:
    """Return the ETA from the median speed of the newest steps, for the horizon in tokens or steps that comes first."""
    timed = [record for record in newest if record.get("tokens_per_second") and record.get("step_seconds")]
    if not timed:
        return ""
    speed, seconds = (
        statistics.median(record[key] for record in timed) for key in ("tokens_per_second", "step_seconds")
    )
    left = (total - newest[0]["tokens"]) / speed
    if last_step:
        left = min(left, (last_step - newest[0]["step"]) * seconds)
    return f"ETA {human_duration(left)}"


def _ended(event: Record | None) -> str:
    """Return when the newest start or end was, and the reason of an end."""
    if event is None:
        return ""
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(event["time"]))
    if event["event"] == "finished":
        return when
    return f"{when} {event['reason']}" if event["event"] in ENDS else f"{event['event']} {when}"


def printable(text: str) -> str:
    """Return untrusted text as one line without control characters, which could command a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _newest_log(run: Path) -> str:
    logs = [*run.glob("slurm/*.out"), *run.glob("crashes/*.txt")]
    logs = [log for log in logs if not log.name.startswith("patience-")]  # of a job that only waits for nodes
    with contextlib.suppress(OSError):  # a file that was just removed
        return str(max(logs, key=lambda path: path.lstat().st_mtime, default=""))
    return ""
