"""Jobs, progress, ETA and last events of runs."""

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from megahp.cluster.job import jobs
from megahp.errors import UserError

SHOWN = 3  # events


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="run directory (default: those of your jobs)")


def run(options: Namespace, words: Sequence[str]) -> int:
    found = jobs()
    runs = options.runs or [Path(run) for run in found]
    if not runs:
        raise UserError("no job of yours was submitted by megahp launch; name a run directory, such as runs/mine")
    for run in runs:
        if not run.is_dir():
            raise UserError(f"{run} is no run directory; name one, such as runs/mine")
        print(f"{run}\n" + "\n".join(f"  {line}" for line in (*found.get(str(run.resolve()), []), *progress(run))))
    return 0


def progress(run: Path) -> list[str]:
    """How far a run is, and its last events, in words. Raises UserError where its files are damaged."""
    from megahp.config import resolve
    from megahp.log.metrics import read_events, read_metrics
    from megahp.log.progress import human_count, human_duration

    if not (run / "config.toml").exists():
        return ["not begun"]
    total, steps, told = resolve.load(run / "config.toml").config.train.tokens, read_metrics(run), []
    if steps:
        last = steps[-1]
        tokens, speed = last["tokens"], last["tokens_per_second"]
        done = f"{human_count(tokens)}/{human_count(total)} tokens {tokens / total:.0%}"
        eta = human_duration((total - tokens) / speed) if speed else "-"
        loss = "-" if last["loss"] is None else f"{last['loss']:.4f}"
        told.append(f"step {last['step']:,}, loss {loss}, {done}, {human_count(speed)} tok/s, ETA {eta}")
    for event in read_events(run)[-SHOWN:]:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(event["time"]))
        told.append(f"{when}  step {event['step']:,} {event['event']}: {event['reason']}")
    return told
