"""Faults that last, and those the soak cannot hold: what is done about each, through the real command."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest
from corpus import write_corpus
from faults.test_soak import RUN
from logged import numbers

from megahp import checkpoint, launch
from megahp.exit_codes import USER_ERROR
from megahp.launch import processes
from megahp.log.metrics import read_events
from megahp.log.replay import replay

INJECT = Path(__file__).parent / "inject"
ALONE = ("parallel.dp_replicate=1", "resilience.spike_window=12")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    write_corpus(folder / "corpus", 0.02)
    (folder / "run.toml").write_text(RUN.replace("tokens = 9600", "tokens = 2560"))
    return folder


def start(
    folder: Path,
    name: str,
    *words: str,
    faults: tuple[dict[str, Any], ...] = (),
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """The command, on ranks for which there may be faults."""
    planned = folder / f"{name}.json"
    planned.write_text(json.dumps(faults))
    return subprocess.Popen(
        [sys.executable, "-m", "megahp", "train", "run.toml", f"log.name={name}", *words],
        cwd=folder,
        env={**os.environ, "FAULTS": str(planned), "PYTHONPATH": f"{INJECT}:{os.getcwd()}", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=heed,
    )


def heed() -> None:
    """Listen to what whoever started these tests may have wanted ignored, under nohup or in the background."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def train(folder: Path, name: str, *words: str, **options: Any) -> tuple[int, str]:
    """Exit code, and what was said."""
    started = start(folder, name, *words, **options)
    said, _ = started.communicate(timeout=240)
    return started.returncode, said


def events(folder: Path, name: str, *kinds: str) -> list[dict[str, Any]]:
    return [event for event in read_events(folder / "runs" / name) if event["event"] in kinds]


def test_what_is_not_finite_again_is_named_and_left_out(folder: Path) -> None:
    """A sample that gives no number, on whichever rank has it: once computed again, then the step is skipped."""
    lasting = ({"kind": "lasting", "rank": 1, "sample": 31, "times": float("nan")},)
    code, said = train(folder, "lasting", "--ranks", "2", faults=lasting)
    assert code == 0, said
    (skipped,) = events(folder, "lasting", "skipped")
    assert skipped["step"] == 7 and skipped["samples"] == [28, 31]
    assert "output of the stage's end is not finite on rank 1, microbatch 0" in skipped["reason"]
    records = numbers(folder / "runs/lasting")
    assert [record["step"] for record in records if record.get("skipped")] == [8] and len(records) == 40
    state = checkpoint.read_state(checkpoint.complete(folder / "runs/lasting/checkpoints")[-1])
    assert (state["skipped"], state["updates"]) == (1, 39)


def test_a_spike_is_told_or_left_out(folder: Path) -> None:
    spike = ({"kind": "lasting", "rank": 0, "sample": 81, "times": 9.0},)
    for policy, updates in (("tell", 40), ("skip", 39)):
        words = (*ALONE, "--ranks", "1", "--restarts", "0", f"resilience.spikes={policy}")
        code, said = train(folder, policy, *words, faults=spike)
        assert code == 0, said
        (told,) = events(folder, policy, "spike")
        assert told["step"] == 20 and told["reason"].startswith("loss ")
        skipped = events(folder, policy, "skipped")
        assert [event["samples"] for event in skipped] == ([[80, 83]] if policy == "skip" else [])
        told = [record["step"] for record in numbers(folder / "runs" / policy) if record.get("skipped")]
        assert told == ([21] if policy == "skip" else [])
        state = checkpoint.read_state(checkpoint.complete(folder / "runs" / policy / "checkpoints")[-1])
        assert state["updates"] == updates


def test_a_rewind_goes_back_and_past_the_samples(folder: Path) -> None:
    """And is itself gone on with exactly, after a kill."""
    spike = {"kind": "lasting", "rank": 0, "sample": 81, "times": 9.0}
    kill = {"kind": "kill", "rank": 0, "step": 29}
    words = (*ALONE, "--ranks", "1", "--restarts", "3", "resilience.spikes=rewind", "checkpoint.every=6")
    # so that the newest checkpoint is written when the spike, and the kill, come
    pauses = tuple({"kind": "pause", "rank": 0, "step": step} for step in (20, 28))
    for name, faults in (("rewound", (spike, *pauses)), ("rewound and killed", (spike, *pauses, kill))):
        code, said = train(folder, name, *words, faults=faults)
        assert code == 0, said
        (rewound,) = events(folder, name, "rewound")
        assert rewound["step"] == 18 and rewound["samples"] == 84
        assert replay(folder / "runs" / name).differences == []
        records = numbers(folder / "runs" / name)
        assert [record["step"] for record in records] == list(range(1, 41))
        assert records[-1]["samples"] == 160 + (84 - 4 * rewound["step"])
    assert numbers(folder / "runs/rewound") == numbers(folder / "runs/rewound and killed")
    assert len(events(folder, "rewound and killed", "resumed")) == 1


def test_rewinds_that_do_not_help_end_the_run(folder: Path) -> None:
    lasting = tuple({"kind": "lasting", "rank": 0, "sample": number, "times": 9.0} for number in range(81, 600, 4))
    words = (*ALONE, "--ranks", "1", "--restarts", "3", "resilience.spikes=rewind", "checkpoint.every=20")
    code, said = train(folder, "lost", *words, faults=lasting)
    assert code == 2 and "3 rewinds did not help; lower optimizer.lr" in said.splitlines()[-1]


def test_a_weight_that_nobody_else_holds_is_restored(folder: Path) -> None:
    weight = ({"kind": "weight", "rank": 0, "step": 9},)
    code, said = train(folder, "weight", *ALONE, "--ranks", "1", "--restarts", "2", faults=weight)
    assert code == 0, said
    (broken,) = events(folder, "weight", "broken")
    assert broken["reason"].startswith("weight unembedding.weight is not finite on rank 0")
    assert len(events(folder, "weight", "resumed")) == 1 and not events(folder, "weight", "skipped")
    assert len(numbers(folder / "runs/weight")) == 40


def test_a_last_step_that_is_left_out_is_saved_all_the_same(folder: Path) -> None:
    last = ({"kind": "lasting", "rank": 0, "sample": 159, "times": float("nan")},)
    words = (*ALONE, "--ranks", "1", "--restarts", "0", "checkpoint.every=0")
    code, said = train(folder, "last", *words, faults=last)
    assert code == 0, said
    (saved,) = checkpoint.complete(folder / "runs/last/checkpoints")
    assert saved.name == "step-00000040"


def test_rank0_may_explain_a_mistake_late(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A mistake that every rank finds for itself is told by rank 0, even where it gets there after the others."""
    monkeypatch.setattr(processes, "SECONDS_TO_EXPLAIN", 0.2)
    rank = "import os, sys, time; rank = int(os.environ['RANK']); rank or time.sleep(0.6) or print('told'); sys.exit(2)"
    assert launch.spawn([], 2, ("-c", rank)) == USER_ERROR
    assert capfd.readouterr().out == "told\n"


def test_a_signal_between_two_starts_ends_it(folder: Path) -> None:
    kill = ({"kind": "kill", "rank": 0, "step": 3},)
    started = start(folder, "between", *ALONE, "--ranks", "1", "--restarts", "2", faults=kill)
    while not (folder / "between.json.0").exists():
        assert started.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)  # the next start is importing
    started.send_signal(signal.SIGTERM)
    said, _ = started.communicate(timeout=60)
    assert started.returncode == 75, said
    assert not events(folder, "between", "resumed", "finished")


def test_a_second_signal_ends_ranks_that_hang(folder: Path) -> None:
    stop = ({"kind": "stop", "rank": 1, "step": 3},)
    started = start(folder, "twice", "--ranks", "2", "resilience.hang_after=60.0", faults=stop)
    while not (folder / "twice.json.0").exists():
        assert started.poll() is None
        time.sleep(0.01)
    started.send_signal(signal.SIGTERM)
    time.sleep(5.5)
    assert started.poll() is None
    started.send_signal(signal.SIGTERM)
    said, _ = started.communicate(timeout=10)
    assert started.returncode == 143, said


def test_a_slow_rank_is_named(folder: Path) -> None:
    slow = ({"kind": "slow", "rank": 1, "step": 1},)
    code, said = train(folder, "slow", "--ranks", "2", "resilience.check_every=10", faults=slow)
    assert code == 0, said
    (told,) = events(folder, "slow", "straggler")
    assert told["ranks"] == [1] and told["reason"].startswith("rank 1 works for")


def test_a_rank_that_hangs_with_the_store_is_left(folder: Path) -> None:
    """Under srun the first rank holds the store the others would ask."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    stop = ({"kind": "stop", "rank": 0, "step": 3},)
    words = ("resilience.hang_after=3.0", "checkpoint.every=0")
    first, second = (
        start(folder, "store", *words, faults=stop, environment={**place, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    )
    said, _ = second.communicate(timeout=60)
    first.kill()
    first.communicate()
    assert second.returncode == 76 and "no answer from the rank that holds the ranks' store; rank 1 in all_" in said
    marked = (folder / "store.json.0").stat().st_mtime
    crash = (folder / "runs/store/crashes/rank-00001.txt").stat().st_mtime
    assert crash - marked < 3 + 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_the_launcher_saves_and_stops(folder: Path, number: signal.Signals) -> None:
    name = number.name
    words = ("--ranks", "2", "checkpoint.every=0", "--resume", "auto")
    pause = ({"kind": "slow", "rank": 0, "step": 1},)  # or it might be over before it is told
    started = start(folder, name, *words, faults=pause)
    log = folder / "runs" / name / "metrics.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= 3):
        assert started.poll() is None
        time.sleep(0.02)
    told = time.monotonic()
    started.send_signal(number)
    said, _ = started.communicate(timeout=60)
    assert started.returncode == 75 and time.monotonic() - told < 20, said
    (stopped,) = events(folder, name, "stopped")
    (saved,) = checkpoint.complete(folder / "runs" / name / "checkpoints")
    assert saved.name == f"step-{stopped['step']:08d}" and name in stopped["reason"]
    code, said = train(folder, name, *words)
    assert code == 0, said
    assert [event["event"] for event in events(folder, name, "started", "resumed", "finished")] == [
        "started",
        "resumed",
        "finished",
    ]
    assert len(numbers(folder / "runs" / name)) == 40


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("ranks", [(), ("--ranks", "2")], ids=["alone", "two ranks"])
def test_a_signal_at_any_moment_before_training(folder: Path, ranks: tuple[str, ...], number: signal.Signals) -> None:
    """While it imports, joins, builds or has begun: never a fault, and nothing but the run's own end."""
    random = Random(f"{ranks} {number}")
    name = f"early {number.name} {len(ranks)}"
    started = start(folder, name, *ranks, *((*ALONE,) if not ranks else ()), "--resume", "auto", "train.tokens=2560000")
    time.sleep(random.uniform(0.5, 3))
    started.send_signal(number)
    said, _ = started.communicate(timeout=60)
    assert started.returncode == 75, said
    assert "Traceback" not in said and "restart" not in said, said
    assert not (folder / "runs" / name / "crashes").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_waits_for_others_says_so_and_leaves_too(folder: Path, rank: int) -> None:
    """In C++, where no handler of Python's is run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    started = start(folder, "waiting", environment={**place, "RANK": str(rank), "LOCAL_RANK": str(rank)})
    assert started.stdout
    line = next(line for line in started.stdout if line.startswith("megahp: ") and "warning" not in line)
    waits = [
        "waiting for 1 of 2 ranks: 1",
        f"rank 1 is waiting for rank 0 at 127.0.0.1:{port} (MASTER_ADDR:MASTER_PORT)",
    ]
    assert line == f"megahp: {waits[rank]}\n"
    started.send_signal(signal.SIGUSR1)
    said, _ = started.communicate(timeout=5)
    assert started.returncode == 75 and ("stopped by SIGUSR1" in said) == (rank == 0), said


def test_a_suspended_job_goes_on(folder: Path) -> None:
    """As `scontrol suspend` stops all its processes, for longer than a hang may last."""
    slow = ({"kind": "slow", "rank": 0, "step": 1},)
    started = start(folder, "suspended", "--ranks", "2", "resilience.hang_after=4.0", faults=slow)
    wait_for(folder / "runs/suspended/metrics.jsonl", lines=3)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in (started.pid, *map(int, children)):
            os.kill(process, number)
        time.sleep(6)
    said, _ = started.communicate(timeout=120)
    assert started.returncode == 0, said


@pytest.mark.parametrize(("ranks", "keys"), [((), 1), (("--ranks", "2"), 1), (("--ranks", "2"), 2)])
def test_ctrl_c_in_a_terminal(folder: Path, ranks: tuple[str, ...], keys: int) -> None:
    """Once: all save and leave. A second time: at once, also where a rank hangs."""
    name = f"key {len(ranks)} {keys}"
    fault = {"kind": "slow" if keys == 1 else "stop", "rank": len(ranks) // 2, "step": 3}
    words = (*ranks, *(() if ranks else ALONE), "resilience.hang_after=60.0")
    process, terminal = start_in_terminal(folder, name, fault, *words)
    wait_for(folder / f"{name}.json.0" if keys == 2 else folder / "runs" / name / "metrics.jsonl", lines=3)
    for _ in range(keys):
        os.write(terminal, b"\x03")
        time.sleep(1)
    said = b""
    with contextlib.suppress(OSError):  # that the terminal is gone
        while part := os.read(terminal, 65536):
            said += part
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if keys == 2:
        assert code in (130, 137, -signal.SIGINT), said
        return
    assert code == 75, said
    (stopped,) = events(folder, name, "stopped")
    (saved,) = checkpoint.complete(folder / "runs" / name / "checkpoints")
    assert saved.name == f"step-{stopped['step']:08d}" and "SIGINT" in stopped["reason"]


def test_a_closed_terminal_saves(folder: Path) -> None:
    slow = {"kind": "slow", "rank": 0, "step": 3}
    process, terminal = start_in_terminal(folder, "closed", slow, "--ranks", "2")
    wait_for(folder / "runs/closed/metrics.jsonl", lines=3)
    os.close(terminal)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code == 75
    (stopped,) = events(folder, "closed", "stopped")
    assert "SIGHUP" in stopped["reason"] and checkpoint.complete(folder / "runs/closed/checkpoints")


def start_in_terminal(folder: Path, name: str, fault: dict[str, Any], *words: str) -> tuple[int, int]:
    """The command in a terminal of its own, with no checkpoint but the last: its process, and the terminal's file."""
    (folder / f"{name}.json").write_text(json.dumps((fault,)))
    command = [sys.executable, "-m", "megahp", "train", "run.toml", f"log.name={name}", "checkpoint.every=0", *words]
    environment = {**os.environ, "FAULTS": str(folder / f"{name}.json"), "PYTHONPATH": f"{INJECT}:{os.getcwd()}"}
    process, terminal = pty.fork()
    if process == 0:
        heed()
        os.chdir(folder)
        os.execve(sys.executable, command, environment)
    return process, terminal


def wait_for(file: Path, lines: int) -> None:
    """Until a fault has been planted, or so many lines are in a log."""
    deadline = time.monotonic() + 60
    while not (file.exists() and (file.suffix != ".jsonl" or len(file.read_text().splitlines()) >= lines)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_save_at_the_end_is_tried_again(folder: Path, small_disk: Path) -> None:
    """A disk that is full for a moment costs nothing."""
    words = (*ALONE, f"log.root={small_disk}", "train.steps=8", "checkpoint.every=0", "resilience.save_again=60.0")
    fill = ({"kind": "fill", "rank": 0, "step": 6, "folder": str(small_disk)},)
    started = start(folder, "again", *words, faults=fill)
    said = ""
    assert started.stdout
    for line in started.stdout:
        said += line
        if "unsaved: " in line:
            (small_disk / "filler").unlink()
            break
    more, _ = started.communicate(timeout=60)
    assert started.returncode == 0, said + more
    (saved,) = checkpoint.complete(small_disk / "again/checkpoints")
    assert saved.name == "step-00000008" and not checkpoint.problems(saved)


def test_a_time_limit_of_its_own(folder: Path) -> None:
    slow = ({"kind": "slow", "rank": 0, "step": 1},)
    words = (*ALONE, "--ranks", "1", "--restarts", "0", "resilience.stop_after=0.02")
    code, said = train(folder, "limited", *words, faults=slow)
    assert code == 75, said
    (stopped,) = events(folder, "limited", "stopped")
    assert "resilience.stop_after" in stopped["reason"] and 0 < stopped["step"] < 40


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here, which takes root")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_ends_nothing_but_the_end(folder: Path, small_disk: Path) -> None:
    """Training goes on without the checkpoints that cannot be written, says so, and keeps the one that was."""
    words = (*ALONE, f"log.root={small_disk}", "train.steps=12", "checkpoint.every=4", "checkpoint.keep=9")
    code, said = train(folder, "small", *words, "train.steps=4")
    assert code == 0, said
    (good,) = checkpoint.complete(small_disk / "small/checkpoints")
    fill = ({"kind": "fill", "rank": 0, "step": 6, "folder": str(small_disk)},)
    words = (*words, "resilience.save_again=0.1")
    code, said = train(folder, "small", *words, "--ranks", "1", "--restarts", "0", "--resume", "auto", faults=fill)
    assert code == 75 and "unsaved: " in said and "make room" in said, said
    assert "the newest checkpoint is older" in said
    assert "cannot be written (No space left on device); lines are lost" in said and "Traceback" not in said
    assert "unsaved: checkpoint" in said
    assert checkpoint.complete(small_disk / "small/checkpoints") == [good] and not checkpoint.problems(good)
    (small_disk / "filler").unlink()
    code, said = train(folder, "small", *words, "--resume", "auto")
    assert code == 0, said


@pytest.mark.parametrize(
    "words", [(*ALONE, "--restarts", "3"), ("--ranks", "2", "--restarts", "-1"), ("--restarts", "x")], ids=" ".join
)
def test_restarts_that_make_no_sense(folder: Path, words: tuple[str, ...]) -> None:
    code, said = train(folder, "none", *words)
    assert code == 2 and "--restarts" in said.splitlines()[-1]
    assert not (folder / "runs/none").exists()
