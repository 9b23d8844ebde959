"""How a run stands, or how it ended: from the ends of its logs, its lock and its jobs."""

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

OWN = {"checkpoints", "crashes", "slurm", "tensorboard", "wandb"}  # folders of a run that hold no other runs
ENDS = ("finished", "stopped", "broken")  # events after which a run does not train
SILENT = 600  # seconds without a line after which a run of another machine is taken to have ended
HEADER = ("RUN", "STATE", "STEP", "TOKENS", "SHARE", "LOSS", "JOB", "LOG", "ETA, OR END")
COLUMNS = ("run", "state", "step", "tokens", "share", "loss", "job", "log", "outlook")
NEWEST = 20  # steps, of which the median is a run's speed


@dataclass(frozen=True)
class Standing:
    """A run, as a line or a few words can show it; "" where something is not known."""

    run: str
    state: str  # queued, running, finished, stopped, broken, interrupted, not begun, unreadable; or as Slurm calls it
    step: str = ""
    tokens: str = ""  # done/planned
    share: str = ""  # of them
    loss: str = ""
    speed: str = ""
    outlook: str = ""  # the ETA; of a run that is over when, and why
    job: str = ""
    log: str = ""  # the newest file of what its ranks said


def runs_below(folder: Path) -> Iterator[Path]:
    """Yield every run directory in a folder, in order; it may be one itself."""
    for directory, inner, files in os.walk(folder):
        is_run = "events.jsonl" in files or inner == ["slurm"]  # of a job that has not come to train
        inner[:] = sorted(set(inner) - OWN if is_run else inner)
        if is_run:
            yield Path(directory)


def standing(run: Path, jobs: Sequence[Queued] = ()) -> Standing:
    """How a run stands; what of its files cannot be read is said in its place."""
    jobs = sorted(jobs, key=lambda job: job.state == "pending")  # the one that runs before one that waits for it
    state = _job_state(jobs) if jobs else "not begun"
    job, log = ", ".join(job.id for job in jobs), _newest_log(run)
    steps, event = list[Record](), None
    try:
        refuse_links(run)
        total, last_step = _horizon(run)
        if (run / "events.jsonl").exists():
            event = next((event for event in newest_events(run) if event["event"] in (*ENDS, *STARTS)), None)
        if (run / "metrics.jsonl").exists():
            steps = list(itertools.islice(newest_metrics(run), NEWEST))
        if event:
            state = _state(run, event, jobs)
        if not steps or not total:
            return Standing(str(run), state, outlook=_ended(event), job=job, log=log)
        step, tokens = steps[0]["step"], steps[0]["tokens"]
        loss = next((f"{loss:.4f}" for each in steps if (loss := each.get("loss")) is not None), "-")
        numbers = f"{step:,}", f"{human_count(tokens)}/{human_count(total)}", f"{tokens / total:.0%}", loss
        outlook = _eta(steps, total, last_step) if state in ("running", "queued") else _ended(event)
        return Standing(str(run), state, *numbers, human_count(steps[0].get("tokens_per_second")), outlook, job, log)
    except (UserError, OSError) as error:
        return Standing(str(run), "unreadable", outlook=str(error), job=job, log=log)


def table(standings: Sequence[Standing]) -> str:
    """Return a line for each run, in columns."""
    rows = [HEADER, *([printable(getattr(each, name)) for name in COLUMNS] for each in standings)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _state(run: Path, event: Record, jobs: Sequence[Queued]) -> str:
    """In a word, of a run whose newest start or end is this event."""
    if event["event"] == "finished":
        return "finished"
    if jobs:
        return _job_state(jobs)
    if event["event"] in ENDS:
        return str(event["event"])
    return "running" if _is_alive(run) else "interrupted"


def _job_state(jobs: Sequence[Queued]) -> str:
    return "queued" if jobs[0].state == "pending" else jobs[0].state


def _is_alive(run: Path) -> bool:
    """Whether the process that holds the run's lock lives; on another machine, whether it has lately logged a line."""
    lock = run / ".lock"
    owner = re.match(r"process (\d+) on (\S+?)(,|$)", read_text(lock, "lock")) if lock.exists() else None
    if owner and owner[2] == socket.gethostname():
        with open(lock) as file, contextlib.suppress(OSError):  # of file systems without locks
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return False
            except BlockingIOError:
                return True
        return Path(f"/proc/{owner[1]}").exists()
    written = [path.stat().st_mtime for path in (run / "metrics.jsonl", run / "events.jsonl") if path.exists()]
    return time.time() - max(written, default=0) < SILENT


def _horizon(run: Path) -> tuple[int, int]:
    """train.tokens and train.steps, 0 where config.toml, which another version may have written, does not say."""
    if not (run / "config.toml").exists():
        return 0, 0
    train = read_toml(run / "config.toml", "run file").get("train")
    found = [train.get(key) if isinstance(train, dict) else 0 for key in ("tokens", "steps")]
    tokens, steps = (value if type(value) is int and 0 < value < 2**63 else 0 for value in found)
    return tokens, steps


def _eta(newest: Sequence[Record], total: int, last_step: int) -> str:
    known = [each for each in newest if each.get("tokens_per_second") and each.get("step_seconds")]
    if not known:
        return ""
    speed, seconds = (statistics.median(each[key] for each in known) for key in ("tokens_per_second", "step_seconds"))
    left = (total - newest[0]["tokens"]) / speed
    if last_step:
        left = min(left, (last_step - newest[0]["step"]) * seconds)
    return f"ETA {human_duration(left)}"


def _ended(event: Record | None) -> str:
    """When the newest start or end was, and an end's reason."""
    if event is None:
        return ""
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(event["time"]))
    if event["event"] == "finished":
        return when
    return f"{when} {event['reason']}" if event["event"] in ENDS else f"{event['event']} {when}"


def printable(text: str) -> str:
    """A text that others wrote, on one line of a terminal, which it cannot command."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _newest_log(run: Path) -> str:
    logs = [*run.glob("slurm/*.out"), *run.glob("crashes/*.txt")]
    logs = [log for log in logs if not log.name.startswith("patience-")]  # of a job that only waits for nodes
    with contextlib.suppress(OSError):  # one that has just gone
        return str(max(logs, key=lambda path: path.lstat().st_mtime, default=""))
    return ""
