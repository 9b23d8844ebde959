"""Progress of a run: a bar on a terminal, plain lines at intervals elsewhere."""

import math
import sys
import time
from collections import deque
from typing import Any, TextIO

from megahp.log.metrics import Record

Fields = list[tuple[str, str]]  # (name, value)


class ProgressDisplay:
    """Shows the steps of a run as they are logged.

        with ProgressDisplay(total_tokens, done_tokens) as progress:
            progress.update(record)
            progress.message("global batch 64 -> 128")

    On a terminal, with rich installed, that is a bar with the newest numbers beneath it. Everywhere else, in Slurm's
    logs above all, it is a plain line for the first step, the last, and one in between every `every` seconds: a bar
    redrawn in a file is unreadable.

    Both go to stdout: progress is the command's normal output, and stderr is for what went wrong, so that Slurm's
    `--error` file is empty after a good run.
    """

    def __init__(self, total_tokens: int, done_tokens: int = 0, stream: TextIO | None = None, every: float = 10.0):
        self.total_tokens, self.done_tokens, self.every = total_tokens, done_tokens, every
        self.stream = sys.stdout if stream is None else stream
        # The rate behind the ETA is measured by the clock over the last hundred updates, so that pauses for validation
        # and checkpoints count, and a change of the global batch soon shows.
        self._past: deque[tuple[float, int]] = deque(maxlen=100)
        self._bar: Any = None
        self._line, self._next_line = "", 0.0  # the newest line if not printed yet; when the next one is due

    def __enter__(self) -> "ProgressDisplay":
        self._past.append((time.monotonic(), self.done_tokens))
        self._bar = _make_bar(self.stream)
        if self._bar:
            fields = {"done": "starting", "eta": "-", "numbers": []}
            self._task = self._bar.add_task("", total=self.total_tokens, completed=self.done_tokens, **fields)
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()
        elif self._line:
            self.message(self._line)

    def update(self, record: Record) -> None:
        """Show one metrics object (see `megahp.log.metrics`)."""

        def number(key: str, form: str) -> str:
            value = record.get(key)
            return "-" if value is None else format(value, form)

        fields = [
            ("step", number("step", ",")),
            ("loss", "skipped" if record.get("skipped") else number("loss", ".4f")),
            ("lr", number("lr", ".2e")),
            ("batch", number("global_batch", ",")),
            ("noise", human_count(record.get("noise_scale_total"))),
            ("tok/s", human_count(record.get("tokens_per_second"))),
        ]
        self.show(record["tokens"], fields)

    def show(self, tokens: int, fields: Fields) -> None:
        """Show the number of tokens done, the ETA, and the fields."""
        self._past.append((time.monotonic(), tokens))
        (before, first), (now, last) = self._past[0], self._past[-1]
        left = (self.total_tokens - last) * (now - before)
        eta = human_duration(left / (last - first)) if last > first and now > before else "-"
        share = 100 * tokens / self.total_tokens if self.total_tokens else 100.0
        done = f"{human_count(tokens)}/{human_count(self.total_tokens)} tokens {share:3.0f}%"
        if self._bar:
            self._bar.update(self._task, completed=tokens, done=done, eta=eta, numbers=fields)
            return
        self._line = "  ".join([*(f"{name} {value}" for name, value in fields), done, f"ETA {eta}"])
        if now >= self._next_line:
            self.message(self._line)
            self._line, self._next_line = "", now + self.every

    def message(self, text: str) -> None:
        """Print a line of its own, above the bar."""
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self.stream, flush=True)


def human_count(number: float | None) -> str:
    """Return three significant digits and a unit: 850, 12.3k, 4.56M, 1.2B; "-" for None and NaN."""
    if number is None or not math.isfinite(number):
        return "-"
    for unit in ("", "k", "M", "B"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"


def human_duration(seconds: float) -> str:
    """Return the two largest units that matter: 45 s, 2 min 13 s, 5 h 04 min, 3 d 7 h; "-" if not finite."""
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


def _make_bar(stream: TextIO) -> Any:
    """Return a rich progress bar with a second line for numbers; None if the stream cannot redraw a line."""
    if not stream.isatty():
        return None
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.text import Text
    except ImportError:
        return None

    class Bar(Progress):
        def get_renderables(self) -> Any:
            yield from super().get_renderables()
            for task in self.tasks:
                pairs = [part for name, value in task.fields["numbers"] for part in ((f"{name} ", "dim"), f"{value}  ")]
                yield Text.assemble(*pairs, no_wrap=True, overflow="ellipsis")

    console = Console(file=stream)
    columns = TextColumn("{task.fields[done]}"), BarColumn(None), TextColumn("[dim]ETA[/] {task.fields[eta]}")
    # While it runs, rich also prints whatever else goes to stdout and stderr, such as warnings, above the bar.
    return None if console.is_dumb_terminal else Bar(*columns, console=console, refresh_per_second=4, expand=True)
