"""Runs that are killed and gone on with, moved to another layout, with another batch: what concerns processes through
the real command, the rest on ranks that live on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import logged
import numpy as np
import pytest
import torch.distributed as dist
from corpus import write_corpus
from distributed import runs, world
from distributed.runs import train

from megahp.config import OptimizerConfig
from megahp.data.loader import Loader
from megahp.evaluate.sample import generate
from megahp.exit_codes import STOPPED, USER_ERROR
from megahp.log.metrics import read_events
from megahp.log.replay import replay

ROOT = Path(__file__).parents[2]
RUN = """
[model]
layers = 2
width = 32
heads = 4
[data]
train = ["corpus"]
sequence_length = 32
validation_fraction = 0.1
[batch]
global_batch = 8
micro_batch = 2
[train]
tokens = 10240
validate_every = 7
validation_samples = 12
[checkpoint]
every = 5
[log]
tensorboard = false
"""
# a batch that grows three times by the measured noise scale, and as many checkpoints as steps
GROWING = (
    "batch.policy=noise-scale",
    "batch.largest=32",
    "batch.target=10.0",
    "batch.look_every=1",
    "batch.growth=1.6",
    "train.noise_half_life=0.1",
    "checkpoint.every=1",
    "checkpoint.keep=100",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    write_corpus(folder / "corpus", 0.05)
    (folder / "run.toml").write_text(RUN)
    return folder


def command(name: str, *words: str) -> list[str]:
    return [sys.executable, "-m", "megahp", "train", "run.toml", f"log.name={name}", *words]


def metrics(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def numbers(folder: Path, name: str) -> list[dict[str, Any]]:
    return logged.numbers(folder / "runs" / name)


def losses(folder: Path, name: str) -> list[float]:
    return [record["loss"] for record in metrics(folder, name)]


def kill_a_rank(folder: Path, name: str, step: int) -> int:
    """Start two ranks, kill -9 the second once `step` is logged, and return the command's exit code."""
    started = subprocess.Popen(
        command(name, "--ranks", "2", *GROWING), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    log = folder / "runs" / name / "metrics.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= step):
        assert started.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    second = next(int(pid) for pid in children if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    os.kill(second, signal.SIGKILL)
    code = started.wait(timeout=30)
    assert not any(Path(f"/proc/{pid}").exists() for pid in children), "a rank outlived its peer"
    return code


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[dict[str, Any]]:
    train(folder, "whole", "--ranks", "2", *GROWING)
    return numbers(folder, "whole")


@pytest.fixture(scope="module")
def killed(folder: Path, whole: list[dict[str, Any]]) -> str:
    code = kill_a_rank(folder, "killed", step=8)
    assert code != 0
    assert 8 <= len(metrics(folder, "killed")) < len(whole)
    return "killed"


def copy_of(folder: Path, name: str, copy: str) -> str:
    subprocess.run(["cp", "-r", folder / "runs" / name, folder / "runs" / copy], check=True)
    return copy


def test_a_killed_run_goes_on_bit_for_bit(folder: Path, whole: list[dict[str, Any]], killed: str) -> None:
    again = copy_of(folder, killed, "again")
    words = command(again, "--ranks", "2", "--resume", "auto", *GROWING)
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert numbers(folder, again) == whole  # losses, norms, noise scale, validation: every digit
    told = [event["event"] for event in read_events(folder / "runs" / again) if event["event"] != "batch"]
    assert told == ["started", "resumed", "finished"]


def test_a_killed_run_goes_on_on_other_layouts(folder: Path, whole: list[dict[str, Any]], killed: str) -> None:
    """Begun sharded, it goes on with shared-out sequences for two steps, and to the end with split matrices."""
    moved = copy_of(folder, killed, "moved")
    words = ("--ranks", "2", "--resume", "auto", *GROWING, "batch.micro_batch=4")
    train(folder, moved, *words, "parallel.cp=2", f"train.steps={len(metrics(folder, killed)) + 2}")
    train(folder, moved, *words, "parallel.tp=2")
    assert losses(folder, moved) == pytest.approx([record["loss"] for record in whole], rel=1e-5)
    assert losses(folder, moved) != [record["loss"] for record in whole]  # it did compute differently


def changes(folder: Path, name: str) -> list[tuple[int, Any]]:
    return replay(folder / "runs" / name).changes


def test_the_batch_grew_for_a_reason(folder: Path, whole: list[dict[str, Any]]) -> None:
    replayed = replay(folder / "runs/whole")
    assert replayed.differences == []
    assert [change.now for _, change in replayed.changes] == [12, 16, 24, 32]
    assert all(change.noise_scale * 14 >= change.wanted >= change.now for _, change in replayed.changes)
    sizes = [record["global_batch"] for record in whole]
    assert sizes == sorted(sizes) and set(sizes) == {8, 12, 16, 24, 32}
    decays = {record["global_batch"]: record["weight_decay"] for record in whole}
    assert all(decay == pytest.approx(0.1 * size / 8) for size, decay in decays.items())


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_resumed_before_at_and_after_a_change(folder: Path, whole: list[dict[str, Any]], offset: int) -> None:
    """Bit for bit on the same layout, and the log of both lives together replays as one."""
    step = changes(folder, "whole")[1][0] + offset
    name = copy_of(folder, "whole", f"from{offset}")
    for later in sorted((folder / "runs" / name / "checkpoints").glob("step-*"))[step:]:
        shutil.rmtree(later)
    train(folder, name, "--ranks", "2", "--resume", "auto", *GROWING)
    assert numbers(folder, name) == whole
    assert replay(folder / "runs" / name).differences == []
    assert changes(folder, name) == changes(folder, "whole")


def test_a_run_is_handed_over_when_its_batch_has_grown(folder: Path, whole: list[dict[str, Any]]) -> None:
    """To ranks, and in microbatches, that the batch it began with would not be enough for."""
    words = ("--resume", "auto", *GROWING)
    handing = command("outgrown", "--ranks", "2", *words, "resilience.stop_at_batch=32")
    done = subprocess.run(handing, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == STOPPED, done.stderr
    step = changes(folder, "whole")[-1][0]
    assert numbers(folder, "outgrown") == whole[:step]
    (stopped,) = [event for event in read_events(folder / "runs/outgrown") if event["event"] == "stopped"]
    assert stopped["step"] == step and "resilience.stop_at_batch = 32" in stopped["reason"]
    done = subprocess.run(handing, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == USER_ERROR and "resilience.stop_at_batch = 32 is not above the batch of" in done.stderr
    train(folder, "outgrown", "--ranks", "4", *words, "batch.micro_batch=4")
    assert losses(folder, "outgrown") == pytest.approx([record["loss"] for record in whole], rel=1e-5)
    assert replay(folder / "runs/outgrown").differences == []


# a batch that takes over the decay of the rate: from step 20 on, where the rule `sde` may first change beta2 = 0.5
MEASURED = (
    "batch.policy=measured",
    "batch.noise_share=50",
    "batch.largest=32",
    "batch.look_every=1",
    "batch.calibrate_every=1",
    "optimizer.beta2=0.5",
    "train.noise_half_life=0.1",
    "checkpoint.every=1",
    "checkpoint.keep=100",
)


def test_a_measured_batch_resumes_exactly_and_grows_alike_on_other_layouts(folder: Path) -> None:
    train(folder, "measured", "--ranks", "2", *MEASURED)
    whole, grown = numbers(folder, "measured"), changes(folder, "measured")
    assert replay(folder / "runs/measured").differences == []
    assert grown[0][0] == 20 and len(grown) >= 3 and grown[-1][1].now == 32
    assert all("stability allows" in change.reason for _, change in grown)
    known = [record for record in whole[20:] if record["noise_scale_total_high"]]  # of others the end is infinite
    assert known and all(record["noise_scale_total_low"] < record["noise_scale_total_high"] for record in known)
    assert any(record["noise_to_total"] for record in whole[:-1])
    middle = grown[1][0]
    for name, words in (
        ("again", ("--ranks", "2")),
        ("moved", ("--ranks", "2", "parallel.tp=2", "batch.micro_batch=4")),
    ):
        name = copy_of(folder, "measured", f"measured-{name}")
        for later in sorted((folder / "runs" / name / "checkpoints").glob("step-*"))[middle - 1 :]:
            shutil.rmtree(later)
        train(folder, name, "--resume", "auto", *words, *MEASURED)
        assert replay(folder / "runs" / name).differences == []
    assert numbers(folder, "measured-again") == whole
    assert losses(folder, "measured-moved") == pytest.approx([record["loss"] for record in whole], rel=1e-5)
    moved = changes(folder, "measured-moved")
    assert [(step, change.now) for step, change in moved] == [(step, change.now) for step, change in grown]


def test_a_branch_of_a_measured_run_goes_on_and_keeps_the_drift(folder: Path) -> None:
    """Untouched, as the run itself does. With twice the horizon the batch it has is above the bound, so that the rate
    is held down until the new schedule has fallen as far, and only then grows on."""
    if not (folder / "runs/measured").exists():
        train(folder, "measured", "--ranks", "2", *MEASURED)
    whole, (second, *_) = numbers(folder, "measured"), changes(folder, "measured")[1:]
    start = f"train.start_from=runs/measured/checkpoints/step-{second[0]:08d}"
    train(folder, "measured-same", "--ranks", "2", start, *MEASURED)
    assert numbers(folder, "measured-same") == whole[second[0] :]
    train(folder, "measured-longer", "--ranks", "2", start, *MEASURED, "train.tokens=20480")
    assert replay(folder / "runs/measured-longer").differences == []
    records, batch = metrics(folder, "measured-longer"), second[1].now
    drifts, peak = [record["lr"] * (record["global_batch"] / 8) ** 0.5 for record in records], OptimizerConfig.lr
    assert max(drifts) <= peak * (1 + 1e-9) and records[0]["global_batch"] == batch
    assert records[0]["lr"] == pytest.approx(peak * (8 / batch) ** 0.5)  # the schedule alone would have it at more
    grown = [change for _, change in replay(folder / "runs/measured-longer").changes]
    assert grown and all(change.before >= batch for change in grown)


def test_experts_and_their_biases_go_on(folder: Path) -> None:
    """From expert parallelism, bit for bit on the same layout, and on one rank, where the model also speaks."""
    words = ("model.experts=4", "model.balance_rate=0.05", "model.balance_loss=0.01", "train.steps=6")
    words = (*words, "checkpoint.every=1", "checkpoint.keep=100")
    train(folder, "experts", "--ranks", "2", "parallel.ep=2", *words)
    whole = numbers(folder, "experts")
    for name, layout in (("again", ("--ranks", "2", "parallel.ep=2")), ("moved", ())):
        name = copy_of(folder, "experts", f"experts-{name}")
        for later in sorted((folder / "runs" / name / "checkpoints").glob("step-*"))[3:]:
            shutil.rmtree(later)
        train(folder, name, "--resume", "auto", *layout, *words)
    assert numbers(folder, "experts-again") == whole
    assert losses(folder, "experts-moved") == pytest.approx([record["loss"] for record in whole], rel=1e-5)
    for record, moved in zip(whole, numbers(folder, "experts-moved"), strict=True):
        assert (moved["expert_load_max"], moved["expert_load_cv"]) == (
            record["expert_load_max"],
            record["expert_load_cv"],
        )
        assert moved["balance_loss"] == pytest.approx(record["balance_loss"], rel=1e-5)
        assert all(1 <= value <= 2 for value in record["expert_load_max"].values())
    assert world.run(1, generate, folder / "runs/experts", "It", 3, 0.8, 50, 1)[0][0].startswith("It")


def test_a_replay_notices_a_changed_log(folder: Path, whole: list[dict[str, Any]]) -> None:
    name = copy_of(folder, "whole", "forged")
    log = folder / "runs" / name / "metrics.jsonl"
    records = metrics(folder, name)
    for record in records[1:8]:
        record["noise_scale"] = 0.01
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert replay(folder / "runs" / name).differences != []


def test_a_finished_run_is_not_done_again(folder: Path, whole: list[dict[str, Any]]) -> None:
    before = (folder / "runs/whole/metrics.jsonl").read_bytes()
    train(folder, "whole", "--ranks", "2", "--resume", "auto", *GROWING)
    assert (folder / "runs/whole/metrics.jsonl").read_bytes() == before


def test_a_resume_before_the_first_checkpoint_starts_anew(folder: Path) -> None:
    train(folder, "early", "train.steps=3")
    shutil.rmtree(folder / "runs/early/checkpoints")
    first = numbers(folder, "early")
    train(folder, "early", "train.steps=3", "--resume", "auto")
    assert numbers(folder, "early") == first  # each step once


READ = """
import sys
from megahp import cli, launch
from megahp.log import metrics

read, opened, leave = [], metrics._opened, launch.leave
metrics._opened = lambda path: read.append(path.name) or opened(path)
launch.leave = lambda code: (print("read", *read, flush=True), leave(code))
launch.leave(cli.main(sys.argv[1:]))
"""


def test_the_end_of_training_reads_its_log_once(folder: Path) -> None:
    words = ["train", "run.toml", "log.name=read", "train.steps=2", "train.validate_every=0"]
    done = subprocess.run([sys.executable, "-c", READ, *words], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "report: runs/read/report.html" in done.stdout, done.stderr
    assert "read metrics.jsonl events.jsonl" in done.stdout.splitlines()


def test_two_runs_do_not_share_a_directory_and_no_rank_outlives_its_launcher(folder: Path) -> None:
    words = command("shared", "--ranks", "2", "checkpoint.every=0", "--resume", "auto", "train.tokens=1e7")
    started = subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = folder / "runs/shared/metrics.jsonl"
    while not log.exists():
        time.sleep(0.01)
    second = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=60)
    assert second.returncode == 2
    advice, told = second.stderr.splitlines()
    assert "data.train: 'corpus' is read" in advice and "in use by process " in told, second.stderr
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    assert started.poll() is None and len(children) == 2
    started.kill()
    started.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < deadline, "a rank outlived its launcher"
        time.sleep(0.05)


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """Every rank writes down the sample ids that it takes."""
    take = Loader.take

    def tracing(self: Loader, ids: np.ndarray, then: np.ndarray | None = None) -> Any:
        with open(f"ids-{dist.get_rank()}.jsonl", "a") as file:
            file.write(json.dumps(ids.tolist()) + "\n")
        return take(self, ids, then)

    with mock.patch.object(Loader, "take", tracing):
        yield


def train_traced(folder: Path, *words: str) -> None:
    with traced():
        runs.as_rank(folder, ["log.name=traced", *words], resume=True)


def under_torchrun(folder: Path, *words: str) -> None:
    """`megahp train`, traced, on two ranks that torchrun starts."""
    script = f"""
import sys
sys.path[:0] = {[str(ROOT / "tests"), str(ROOT)]}
from train.test_run import traced
from megahp.cli import main
with traced():
    sys.exit(main())
"""
    (folder / "traced.py").write_text(script)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "traced.py"]
    words = ("train", "run.toml", "log.name=traced", "--resume", "auto", *words)
    done = subprocess.run([*launcher, *words], cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_sample_is_repeated_or_skipped_across_batches_and_layouts(folder: Path) -> None:
    """Steps 1-5 of 8 samples on 1 x 2 ranks, then 5 of 16 on one rank, then 8 on 2 x 1: every sample id once."""
    under_torchrun(folder, "train.steps=5")
    seen = taken(folder, 2)
    world.run(1, train_traced, folder, "train.steps=10", "batch.global_batch=16", "batch.micro_batch=4")
    seen += taken(folder, 1)
    world.run(2, train_traced, folder, "train.steps=15", "parallel.tp=2")
    one, other = (folder / f"ids-{rank}.jsonl" for rank in range(2))
    assert one.read_text() == other.read_text()  # tp ranks read the same samples
    other.unlink()
    seen += taken(folder, 1)
    assert sorted(seen) == list(range(5 * 8 + 5 * 16 + 5 * 8))


def taken(folder: Path, ranks: int) -> list[int]:
    """The ids that so many ranks have written down since this was asked last."""
    traces = sorted(folder.glob("ids-*.jsonl"))
    assert len(traces) == ranks
    ids = [i for trace in traces for line in trace.read_text().splitlines() for i in json.loads(line)]
    for trace in traces:
        trace.unlink()
    return ids
