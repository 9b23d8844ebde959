"""How far a run has come: a bar on a terminal, a line now and then in a log file."""

import math
import sys
import time
from collections import deque
from typing import Any, TextIO

from megahp.log.metrics import Record


class ProgressDisplay:
    """Shows the steps of a run as they are logged.

        with Progress(total_tokens, done_tokens) as progress:
            progress.update(record)
            progress.message("global batch 64 -> 128")

    On a terminal, with rich installed, that is a bar with the newest numbers beneath it. Everywhere else, in
    Slurm's logs above all, it is a plain line for the first step, the last, and one in between every `every`
    seconds: a bar redrawn in a file is unreadable.

    Both go to stdout: progress is what the command is there to say, and stderr stays free for what went
    wrong, so that Slurm's `--error` file is empty after a good run.
    """

    def __init__(self, total_tokens: int, done_tokens: int = 0, stream: TextIO | None = None, every: float = 10.0):
        self.total_tokens, self.done_tokens, self.every = total_tokens, done_tokens, every
        self.stream = sys.stdout if stream is None else stream

    def __enter__(self) -> "ProgressDisplay":
        # The rate behind the ETA is taken from the clock, over the last hundred updates, so that pauses for
        # evaluation and checkpoints count and a change of the global batch is soon followed.
        self._past = deque([(time.monotonic(), self.done_tokens)], maxlen=100)
        console = _terminal(self.stream)
        self._display: _Bar | _Lines = (
            _Bar(console, self.total_tokens, self.done_tokens) if console else _Lines(self.stream, self.every)
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self._display.close()

    def update(self, record: Record) -> None:
        """Show one metrics object (see `megahp.log.metrics`)."""
        self.show(record["tokens"], _fields(record))

    def show(self, tokens: int, fields: list[tuple[str, str]]) -> None:
        """Show that so many tokens are done, and whatever else is known, as names and values."""
        self._past.append((time.monotonic(), tokens))
        (before, first), (now, last) = self._past[0], self._past[-1]
        left = (self.total_tokens - last) * (now - before)
        eta = human_duration(left / (last - first)) if last > first and now > before else "-"
        share = 100 * tokens / self.total_tokens if self.total_tokens else 100.0
        done = f"{human_count(tokens)}/{human_count(self.total_tokens)} tokens {share:3.0f}%"
        self._display.show(tokens, done, eta, fields)

    def message(self, text: str) -> None:
        """Print a line of its own, above the bar."""
        self._display.message(text)


def human_count(number: float | None) -> str:
    """Three significant digits and a unit: 850, 12.3k, 4.56M, 1.2B; "-" for None and NaN."""
    if number is None or not math.isfinite(number):
        return "-"
    for unit in ("", "k", "M", "B"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"


def human_duration(seconds: float) -> str:
    """The two largest units that matter: 45 s, 2 min 13 s, 5 h 04 min, 3 d 7 h; "-" for what is not finite."""
    if not math.isfinite(seconds):
        return "-"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def _fields(record: Record) -> list[tuple[str, str]]:
    def number(key: str, form: str) -> str:
        value = record.get(key)
        return "-" if value is None else format(value, form)

    return [
        ("step", number("step", ",")),
        ("loss", "skipped" if record.get("skipped") else number("loss", ".4f")),
        ("lr", number("lr", ".2e")),
        ("batch", number("global_batch", ",")),
        ("noise", human_count(record.get("noise_scale_total"))),
        ("tok/s", human_count(record.get("tokens_per_second"))),
    ]


def _terminal(stream: TextIO) -> Any:
    """A rich console where a line can be redrawn, else None."""
    if not stream.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    console = Console(file=stream)
    return None if console.is_dumb_terminal else console


class _Lines:
    def __init__(self, stream: TextIO, every: float):
        self.stream, self.every, self.next_time = stream, every, 0.0
        self.waiting: str | None = None  # the newest line, while it has not been printed

    def show(self, tokens: int, done: str, eta: str, fields: list[tuple[str, str]]) -> None:
        self.waiting = "  ".join([*(f"{name} {value}" for name, value in fields), done, f"ETA {eta}"])
        if time.monotonic() >= self.next_time:
            self.close()
            self.next_time = time.monotonic() + self.every

    def message(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def close(self) -> None:
        if self.waiting is not None:
            self.message(self.waiting)
            self.waiting = None


class _Bar:
    def __init__(self, console: Any, total_tokens: int, done_tokens: int):
        from rich.live import Live
        from rich.progress_bar import ProgressBar

        self.done, self.eta = "starting", "-"
        self.fields: list[tuple[str, str]] = []
        self.bar = ProgressBar(total=total_tokens, completed=done_tokens)
        # Live also puts whatever else is printed meanwhile, warnings for instance, above the bar.
        self.live = Live(console=console, get_renderable=self.render, refresh_per_second=4)
        self.live.start()

    def render(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        top = Table.grid(expand=True, padding=(0, 1))
        top.add_column(no_wrap=True)
        top.add_column(ratio=1)
        top.add_column(no_wrap=True)
        top.add_row(self.done, self.bar, Text.assemble(("ETA ", "dim"), self.eta))
        pairs = [part for name, value in self.fields for part in ((f"{name} ", "dim"), f"{value}  ")]
        return Group(top, Text.assemble(*pairs, no_wrap=True, overflow="ellipsis"))

    def show(self, tokens: int, done: str, eta: str, fields: list[tuple[str, str]]) -> None:
        self.done, self.eta, self.fields = done, eta, fields
        self.bar.update(completed=tokens)

    def message(self, text: str) -> None:
        self.live.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self.live.stop()
