"""Progress: a bar on a terminal, spaced plain lines in a pipe."""

import io
import os
import pty
import sys
import threading

import pytest

from megahp.log import progress as progress_module
from megahp.log.progress import ProgressDisplay, human_count, human_duration


def record(step, **values):
    return {"step": step, "tokens": 1000 * step, "loss": 3.25, "lr": 1e-3, "global_batch": 64,
            "noise_scale_total": 210.4, "tokens_per_second": 5123.0, **values}  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test turns."""
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


class Terminal:
    """A pseudo-terminal, and all that was written to it."""

    def __enter__(self):
        self.reader, writer = pty.openpty()
        self.stream = open(writer, "w", encoding="utf-8")  # noqa: SIM115
        self.chunks = []
        self.thread = threading.Thread(target=self._drain)
        self.thread.start()
        return self

    def _drain(self):
        try:
            while chunk := os.read(self.reader, 65536):
                self.chunks.append(chunk)
        except OSError:
            pass  # Linux's way to say that the other end is closed

    def __exit__(self, *exception):
        self.stream.close()
        self.thread.join()
        os.close(self.reader)

    @property
    def text(self):
        return b"".join(self.chunks).decode()


def test_a_pipe_gets_the_first_line_the_last_and_some_between(clock):
    stream = io.StringIO()
    with ProgressDisplay(1_000_000, stream=stream, every=10.0) as progress:
        for step in range(1, 1001):
            clock[0] += 0.1  # a run of 100 seconds
            progress.update(record(step))
    lines = stream.getvalue().splitlines()
    assert 10 <= len(lines) <= 12
    assert lines[0].startswith("step 1  loss 3.2500  lr 1.00e-03  batch 64  noise 210  tok/s 5.12k")
    assert "  1k/1M tokens   0%  ETA " in lines[0]
    assert lines[-1].startswith("step 1,000 ") and lines[-1].endswith("1M/1M tokens 100%  ETA 0 s")
    assert stream.getvalue().isascii() and "\x1b" not in stream.getvalue()


def test_slow_steps_each_get_a_line_and_none_twice(clock):
    stream = io.StringIO()
    with ProgressDisplay(3000, stream=stream) as progress:
        for step in (1, 2, 3):
            clock[0] += 60
            progress.update(record(step))
            progress.message(f"saved {step}")
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1", "1", "2", "2", "3", "3"]
    assert lines[1] == "saved 1"
    assert lines[0].endswith("ETA 2 min 00 s")


def test_eta_of_a_resumed_run_counts_only_what_it_did_itself(clock):
    stream = io.StringIO()
    with ProgressDisplay(10_000, done_tokens=8000, stream=stream) as progress:
        clock[0] += 30
        progress.update(record(9))  # 1000 tokens in 30 s, 1000 to go
    assert stream.getvalue().rstrip().endswith("ETA 30 s")


def test_nothing_known_yet_is_shown_as_such(clock):
    stream = io.StringIO()
    with ProgressDisplay(0, stream=stream) as progress:
        progress.update({"step": 1, "tokens": 0, "loss": None, "skipped": True, "noise_scale_total": None})
    assert stream.getvalue() == ("step 1  loss skipped  lr -  batch -  noise -  tok/s -  0/0 tokens 100%  ETA -\n")
    with ProgressDisplay(10, stream=stream):
        pass  # a run without a step prints nothing


def test_a_terminal_gets_a_bar(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm-256color")
    with Terminal() as terminal, ProgressDisplay(20_000, stream=terminal.stream) as progress:
        for step in range(1, 21):
            progress.update(record(step))
        progress.message("[batch] 64 -> 128")
    assert "\x1b[" in terminal.text and "━" in terminal.text
    assert "20k/20k tokens 100%" in terminal.text and "3.2500" in terminal.text
    assert "[batch] 64 -> 128" in terminal.text  # brackets are no markup
    assert terminal.text.index("[batch]") < terminal.text.rindex("20k/20k")  # the message is above the bar
    assert terminal.text.endswith("\r\n\x1b[?25h")  # a new line, and the cursor visible again


def test_a_bar_is_left_clean_by_an_error(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm-256color")
    with Terminal() as terminal, pytest.raises(ZeroDivisionError), ProgressDisplay(10, stream=terminal.stream):
        raise ZeroDivisionError
    assert terminal.text.rstrip().endswith("\x1b[?25h")  # the cursor is visible again


@pytest.mark.parametrize("why", ["dumb terminal", "no rich"])
def test_a_terminal_without_a_bar_gets_lines(monkeypatch, why):
    monkeypatch.setenv("TERM", "dumb" if why == "dumb terminal" else "xterm")
    if why == "no rich":
        monkeypatch.setitem(sys.modules, "rich.console", None)
    with Terminal() as terminal, ProgressDisplay(20_000, stream=terminal.stream) as progress:
        progress.update(record(1))
    assert terminal.text.startswith("step 1  loss 3.2500") and "\x1b" not in terminal.text


@pytest.mark.parametrize(
    ("number", "text"),
    [(None, "-"), (float("nan"), "-"), (0, "0"), (850, "850"), (999.4, "999"), (999.6, "1k"),
     (12_345, "12.3k"), (999_999, "1M"), (4_560_000, "4.56M"), (1.2e9, "1.2B"), (3e12, "3T")],
)  # fmt: skip
def test_human_count(number, text):
    assert human_count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (45.4, "45 s"), (59.6, "1 min 00 s"), (133, "2 min 13 s"), (18_240, "5 h 04 min"),
     (3 * 86400 + 7 * 3600, "3 d 7 h")],
)  # fmt: skip
def test_human_duration(seconds, text):
    assert human_duration(seconds) == text
