"""The log at Weights & Biases, through wandb itself: what arrives, and that no failure of it reaches training."""

import contextlib
import importlib.machinery
import json
import os
import pty
import struct
import subprocess
import sys
import threading
import time
import zlib

import pytest
from train.test_run import RUN

from megahp import checkpoint
from megahp.data.indexed import IndexedWriter
from megahp.errors import UserError
from megahp.log import wandb_log
from megahp.log.wandb_log import WandbLog, new_id

wandb = pytest.importorskip("wandb")

CONFIG = {"model": {"width": 64}, "data": {"train": ("a", "b")}}
# The kinds of record that may leave the machine: no output, files, code, hardware or use of it.
OURS = {"header", "run", "config", "metric", "summary", "history", "telemetry", "exit"}
UNREACHABLE = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40}

# A rank, in a process of its own: it leaves with os._exit and wandb has the terminal to itself.
RANK = """
import os, sys, time
from pathlib import Path
from megahp.log import wandb_log

mode, directory, wandb_log.START_SECONDS, wandb_log.CLOSE_SECONDS = *sys.argv[1:3], *map(float, sys.argv[3:])
began = time.monotonic()
log = wandb_log.WandbLog(mode, "mine", "name", Path(directory), "id", {}, lambda text: print("reports:", text))
for step in range(1, 4):
    log.metrics({"step": step, "tokens": 512 * step, "loss": 4 - step / 4})
print("waited:", time.monotonic() - began < 2)
log.close()
print("took:", time.monotonic() - began)
sys.stdout.flush()
os._exit(0)
"""


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """A user without settings, API key or netrc file; and a wandb that was never set up."""
    for name in [name for name in os.environ if name.startswith("WANDB_")] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield
    wandb.teardown()


@pytest.fixture
def log(tmp_path):
    """A function that starts an offline log in tmp_path, whose lines go to its `.lines`."""

    def start(run_id="id", config=CONFIG):
        lines = []
        log = WandbLog("offline", "mine", "name", tmp_path, run_id, config, lines.append)
        log.lines = lines
        return log

    return start


def record(step, **values):
    return {"step": step, "tokens": step * 512, "loss": 4.0 - step / 7, **values}


def sessions(directory):
    """What each session of a run wrote, in order: its records, read from the LevelDB log in its .wandb file."""
    return [list(records(path.read_bytes())) for path in sorted(directory.glob("wandb/*run-*/*.wandb"))]


def records(data):
    from wandb.proto.wandb_internal_pb2 import Record

    at, message = 7, b""  # behind the file's own header
    while at < len(data):
        if 32768 - at % 32768 < 7:  # no room for a header: padding to the next block
            at += 32768 - at % 32768
            continue
        checksum, size, kind = struct.unpack_from("<IHB", data, at)
        part = data[at + 7 : at + 7 + size]
        assert zlib.crc32(part, zlib.crc32(bytes([kind]))) == checksum
        at, message = at + 7 + size, message + part
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(message)
            message = b""


def kinds(session):
    return {record.WhichOneof("record_type") for record in session}


def run_of(session):
    return next(record.run for record in session if record.HasField("run"))


def history(session):
    """The logged rows, without wandb's own clocks."""
    rows = [record.history.item for record in session if record.HasField("history")]
    rows = [{".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row} for row in rows]
    return [{key: value for key, value in row.items() if key not in ("_timestamp", "_runtime")} for row in rows]


def rank(mode, directory, environment=None, start=30.0, close=10.0):
    """What a rank printed as {word: text}, all reported lines in a list, and its stderr."""
    (directory / "rank.py").write_text(RANK)  # a file, so that there is code to upload
    done = subprocess.run(
        [sys.executable, "rank.py", mode, str(directory), str(start), str(close)],
        cwd=directory,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        timeout=60,
    )
    return *printed(done.stdout), done.stderr


def printed(text):
    lines = [line.split(": ", 1) for line in text.splitlines()]
    return {line[0]: line[1] for line in lines}, [line[1] for line in lines if line[0] == "reports"]


def shown_on(terminal):
    """All that was written to a terminal nobody holds any more; its end is an error."""
    text = b""
    with contextlib.suppress(OSError):
        while part := os.read(terminal, 65536):
            text += part
    os.close(terminal)
    return text.decode()


def test_numbers_and_events_can_be_read_back(log, tmp_path):
    log = log()
    layers = {"layers.0.attention_norm": 3.5, "final_norm": None}
    log.metrics(record(10, noise_scale=None, noise_scale_layers=layers))
    log.metrics(record(20, noise_scale=1 / 3, noise_scale_layers={}, skipped=True))
    log.event("batch", "noise scale reached 128", 20)
    while log.rows.qsize():
        time.sleep(0.01)
    print("not for wandb")
    log.close()
    (session,) = sessions(tmp_path)
    assert log.lines == []
    assert history(session) == [
        {"_step": 10, "step": 10, "tokens": 5120, "loss": 4 - 10 / 7}
        | {"noise_scale_layers/layers.0.attention_norm": 3.5},
        {"_step": 20, "step": 20, "tokens": 10240, "loss": 4 - 20 / 7, "noise_scale": 1 / 3, "skipped": True}
        | {"event/batch": "noise scale reached 128"},
    ]
    metrics = [record.metric for record in session if record.HasField("metric")]
    assert [(m.name, m.glob_name, m.step_metric) for m in metrics] == [("tokens", "", ""), ("", "*", "tokens")]
    config = {item.key: json.loads(item.value_json) for item in run_of(session).config.update}
    assert {key: config[key] for key in CONFIG} == json.loads(json.dumps(CONFIG))
    assert kinds(session) <= OURS


def test_a_long_log_is_whole(log, tmp_path):
    log = log()
    for step in range(1, 2001):
        log.metrics(record(step))
    log.close()
    (session,) = sessions(tmp_path)
    assert [row["_step"] for row in history(session)] == list(range(1, 2001))
    assert log.lines == []


def test_a_resumed_run_continues_under_its_id(log, tmp_path):
    run_id = new_id()
    for steps in ((1, 2), (3, 4)):
        session = log(run_id)
        for step in steps:
            session.metrics(record(step))
        session.close()
    first, second = sessions(tmp_path)
    assert [(run_of(session).run_id, run_of(session).resume) for session in (first, second)] == [(run_id, True)] * 2
    assert [row["_step"] for row in history(first) + history(second)] == [1, 2, 3, 4]
    assert run_id != new_id() and 8 <= len(run_id) <= 16 and run_id.isalnum()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WANDB_MODE": "disabled", "WANDB_PROJECT": "other", "WANDB_NAME": "other", "WANDB_DIR": "/nowhere"}
        | {"WANDB_RUN_ID": "other", "WANDB_RESUME": "must", "WANDB_SILENT": "false", "WANDB_CONSOLE": "wrap"},
        {"WANDB_MODE": "online", "WANDB_DISABLED": "true", "WANDB_SAVE_CODE": "true"} | UNREACHABLE,
    ],
)
def test_a_rank_that_leaves_after_close_has_all_on_disk(tmp_path, environment):
    words, reports, errors = rank("offline", tmp_path, environment)
    assert (reports, errors) == ([], "")
    (session,) = sessions(tmp_path)
    assert [row["loss"] for row in history(session)] == [3.75, 3.5, 3.25]
    run = run_of(session)
    assert (run.run_id, run.project, run.display_name) == ("id", "mine", "name")
    assert kinds(session) <= OURS


@pytest.mark.parametrize(
    ("start", "close", "named"), [(2.0, 10.0, "connection refused"), (30.0, 1.0, "not done after 1 s")]
)
def test_an_unreachable_host_costs_one_line(tmp_path, start, close, named):
    words, reports, errors = rank("online", tmp_path, UNREACHABLE, start, close)
    assert len(reports) == 1 and named in reports[0] and "metrics.jsonl" in reports[0]
    assert errors == ""
    assert words["waited"] == "True"
    assert float(words["took"]) < 15


def test_a_missing_key_is_not_asked_for(tmp_path):
    master, terminal = pty.openpty()
    command = [sys.executable, "-c", RANK, "online", str(tmp_path), "30", "10"]
    done = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, env=os.environ | {"TERM": "xterm"}
    )
    os.close(terminal)
    try:
        assert done.wait(timeout=30) == 0
    finally:
        done.kill()
    words, reports = printed(shown_on(master))
    assert set(words) == {"reports", "waited", "took"}
    assert len(reports) == 1 and "No API key" in reports[0] and "metrics.jsonl" in reports[0]
    assert float(words["took"]) < 15


def test_a_log_that_raises_is_left_out(log, monkeypatch):
    def raises(self, values, step=None):
        calls.append(step)
        if step == 2:
            raise RuntimeError("two\nlines")

    calls = []
    monkeypatch.setattr(wandb.Run, "log", raises)
    log = log()
    for step in (1, 2):
        log.metrics(record(step))
    log.thread.join(20)
    for step in (3, 4):
        log.metrics(record(step))
        log.event("batch", "noise scale reached 128", step)
    log.close()
    assert calls == [1, 2]
    (line,) = log.lines
    assert "RuntimeError" in line and "metrics.jsonl" in line and "\n" not in line


def test_a_failed_end_is_reported(log, monkeypatch):
    monkeypatch.setattr(wandb.Run, "finish", lambda self: sys.exit(3))
    log = log()
    log.metrics(record(1))
    log.close()
    assert len(log.lines) == 1 and "SystemExit(3)" in log.lines[0]


def test_a_log_that_hangs_is_not_waited_for(log, monkeypatch):
    stuck, ends = threading.Event(), threading.Event()
    monkeypatch.setattr(wandb_log, "MAX_QUEUED", 3)
    monkeypatch.setattr(wandb.Run, "log", lambda self, values, step: (stuck.set(), ends.wait(60)))
    log = log()
    log.metrics(record(1))
    assert stuck.wait(20)
    began = time.monotonic()
    for step in range(2, 10):
        log.metrics(record(step))
    log.close()
    assert time.monotonic() - began < 5
    assert len(log.lines) == 1 and "3 rows" in log.lines[0]
    ends.set()


@pytest.mark.parametrize("folder", [False, True])
def test_a_missing_package_is_a_users_mistake(tmp_path, monkeypatch, folder):
    if folder:  # as wandb itself leaves behind where it has been used
        (tmp_path / "wandb").mkdir()
        monkeypatch.delitem(sys.modules, "wandb")
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        monkeypatch.setattr(sys, "meta_path", [importlib.machinery.PathFinder])
    else:
        monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        WandbLog("offline", "mine", "name", tmp_path, "id", {}, print)


def test_a_resumed_run_continues_its_curve(tmp_path):
    """Through the real command: the id is in the checkpoint, a branch has one of its own, steps go on."""
    with IndexedWriter(str(tmp_path / "corpus"), 257) as writer:
        for _ in range(40):
            writer.add_document(list(b"some text, again and again " * 8))
    (tmp_path / "run.toml").write_text(RUN)
    command = [sys.executable, "-m", "megahp", "train", "run.toml", "log.wandb=offline", "--resume", "auto"]
    for words in (["train.steps=2"], ["train.steps=4"], ["train.steps=5", "log.name=b", "train.start_from=runs/run"]):
        done = subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and "left out" not in done.stdout, done.stdout + done.stderr
    first, again = sessions(tmp_path / "runs/run")
    (other,) = sessions(tmp_path / "runs/b")
    ids = [run_of(session).run_id for session in (first, again, other)]
    assert ids[0] == ids[1] == checkpoint.read_state(checkpoint.latest(tmp_path / "runs/run/checkpoints"))["wandb_id"]
    assert ids[2] not in ids[:2]
    steps = [sorted({row["step"] for row in history(session) if "step" in row}) for session in (first, again, other)]
    assert steps == [[1, 2], [3, 4], [5]]
