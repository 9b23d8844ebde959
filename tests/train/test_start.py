"""Runs that go on from another's checkpoint, and runs whose data changes on the way."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import world
from distributed.runs import train
from train.test_run import copy_of, losses, metrics, numbers

from megahp.checkpoint.store import write_manifest
from megahp.config import resolve
from megahp.data.indexed import IndexedWriter
from megahp.data.loader import Loader
from megahp.data.tokenizer import load_tokenizer
from megahp.log.metrics import read_events
from megahp.log.replay import replay
from megahp.parallel.mesh import single_rank_mesh
from megahp.parallel.parameters import storage
from megahp.train.prepare import open_data, with_vocabulary
from megahp.train.run import Run

RUN = """
[model]
layers = 1
width = 32
heads = 4
[data]
train = ["one", "two"]
weights = [1, 0]
sequence_length = 16
validation_fraction = 0.1
[schedule]
name = "wsd"
[batch]
global_batch = 8
micro_batch = 4
[train]
tokens = 5120
validation_samples = 8
[checkpoint]
every = 1
keep = 100
[log]
tensorboard = false
"""
# 40 steps of 128 tokens: another mixture after 10, four times as long sequences after 20 (2 in a step), back after 30;
# the noise scale is measured and grows the batch meanwhile
STAGES = (
    'data.mixtures=["1280:0.5,0.5"]',
    'data.lengths=["2560:64","3840:16"]',
    "batch.policy=noise-scale",
    "batch.target=10.0",
    "batch.look_every=1",
    "batch.largest=16",
    "train.noise_half_life=0.05",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("continue")
    for seed, name in enumerate(("one", "two")):
        random = np.random.RandomState(seed)
        with IndexedWriter(str(folder / name), 257) as writer:
            for _ in range(80):
                writer.add_document(
                    (random.geometric(0.1, random.randint(50, 300)).clip(max=100) + 128 * seed).tolist()
                )
    (folder / "run.toml").write_text(RUN)
    return folder


@pytest.fixture(scope="module")
def stable(folder: Path) -> list[dict[str, Any]]:
    train(folder, "stable")
    return numbers(folder, "stable")


@pytest.fixture(scope="module")
def staged(folder: Path) -> list[dict[str, Any]]:
    train(folder, "staged", *STAGES)
    return numbers(folder, "staged")


def start(name: str, step: int) -> str:
    return f"train.start_from=runs/{name}/checkpoints/step-{step:08d}"


def test_a_branch_that_changes_nothing_trains_the_same(folder: Path, stable: list[dict[str, Any]]) -> None:
    train(folder, "same", start("stable", 15))
    assert numbers(folder, "same") == stable[15:]
    (event,) = [event for event in read_events(folder / "runs/same") if event["event"] == "branched"]
    assert (event["step"], event["tokens"], event["samples"]) == (15, 15 * 128, 15 * 8)
    assert set(event["changed"]) == {"log.name", "train.start_from"}


def test_a_decay_from_a_stable_checkpoint(folder: Path, stable: list[dict[str, Any]]) -> None:
    """WSD: the stable part is trained once, and a decay of its own ends a shorter run."""
    train(folder, "decayed", start("stable", 20), "train.tokens=3840", "schedule.decay=0.3")
    rates = [record["lr"] for record in metrics(folder, "decayed")]
    peak = stable[20]["lr"]
    assert rates[0] == peak == stable[10]["lr"]  # 3,840 tokens decay from 2,688 on
    assert rates[-1] < 0.1 * peak and rates == sorted(rates, reverse=True)
    assert metrics(folder, "decayed")[-1]["tokens"] == 3840
    assert losses(folder, "decayed")[0] == stable[20]["loss"]


def test_a_second_phase_has_data_rate_and_warmup_of_its_own(folder: Path, stable: list[dict[str, Any]]) -> None:
    """As Crystal's: another mixture, a lower peak, a short warm-up, and each source where it stood."""
    words = (
        "train.start_from=runs/stable",
        "train.tokens=10240",
        "schedule.start=5120",
        "schedule.warmup=0.2",
        "schedule.name=linear",
        "schedule.floor=0.1",
        "optimizer.lr=0.001",
        "data.weights=[1, 3]",
    )
    train(folder, "second", *words)
    records = metrics(folder, "second")
    assert (records[0]["step"], records[-1]["tokens"]) == (41, 10240)
    rates = [record["lr"] for record in records]
    assert rates[0] == pytest.approx(0.001 * 64 / 1024) and max(rates) == pytest.approx(0.001, rel=0.1)
    assert rates[-1] == pytest.approx(0.001 * (0.1 + 0.9 * 64 / 4096))
    state = read_state(folder, "second", 80)["data_order"]
    assert sorted(count for count, _ in state["begins"].values()) == [0, 320]
    assert sorted(count for count, _ in state["taken"].values()) == [240, 320 + 80]


def read_state(folder: Path, name: str, step: int) -> dict[str, Any]:
    from megahp import checkpoint

    return checkpoint.read_state(folder / "runs" / name / "checkpoints" / f"step-{step:08d}")


def test_a_branch_on_another_layout_and_its_resume(folder: Path, staged: list[dict[str, Any]]) -> None:
    words = (start("staged", 3), *STAGES, "parallel.tp=2", "--ranks", "2")
    train(folder, "moved", *words)
    assert losses(folder, "moved") == pytest.approx([record["loss"] for record in staged[3:]], rel=1e-5)
    whole = numbers(folder, "moved")
    for later in sorted((folder / "runs/moved/checkpoints").glob("step-*"))[5:]:
        shutil.rmtree(later)
    train(folder, "moved", "--resume", "auto", *words)
    assert numbers(folder, "moved") == whole
    shutil.rmtree(folder / "runs/moved/checkpoints")
    train(folder, "moved", "--resume", "auto", *words)  # nothing of its own: it starts from the other again
    assert numbers(folder, "moved") == whole
    replayed = replay(folder / "runs/moved")
    assert replayed.differences == [] and replayed.changes


def test_stages_are_events_at_equal_tokens_per_step(folder: Path, staged: list[dict[str, Any]]) -> None:
    events = [event for event in read_events(folder / "runs/staged") if event["event"] == "stage"]
    assert [event["length"] for event in events] == [16, 64, 16]
    assert [event["weights"] for event in events] == [[0.5, 0.5]] * 3
    assert all(event["tokens"] - at < 256 for event, at in zip(events, (1280, 2560, 3840), strict=True))
    tokens = np.diff([0] + [record["tokens"] for record in staged])
    lengths = np.where([2560 < record["tokens"] <= 3840 for record in staged], 64, 16)
    assert [record["global_batch"] for record in staged] == (tokens / lengths).tolist()
    assert set(tokens) == {128, 256} and staged[-1]["samples"] == int((tokens / lengths).sum())
    replayed = replay(folder / "runs/staged")
    assert replayed.differences == [] and len(replayed.changes) == 1


def test_noise_begins_anew_when_an_example_becomes_another_thing(staged: list[dict[str, Any]]) -> None:
    """The noise scale of the first step of 64 tokens is that step's alone."""
    first = next(record for record in staged if record["tokens"] > 2560 + 255)
    before = staged[staged.index(first) - 1]
    batch = first["global_batch"]
    true = (batch * first["grad_sq_batch"] - first["grad_sq_example"]) / (batch - 1)
    noise = (first["grad_sq_example"] - first["grad_sq_batch"]) / (1 - 1 / batch)
    alone = noise / true if true > 0 and noise > 0 else None
    assert first["samples"] - before["samples"] == batch
    assert first["noise_scale"] == (pytest.approx(alone) if alone else None)


def test_a_branch_at_a_change_of_length_begins_its_averages_anew(folder: Path, staged: list[dict[str, Any]]) -> None:
    """The checkpoint at the boundary holds averages over examples of 16 tokens; the branch's are 64 long at once."""
    at = next(record["step"] for record in staged if record["tokens"] >= 2560)
    mixture = 'data.mixtures=["1280:0.5,0.4"]'
    train(folder, "boundary", start("staged", at), *STAGES, mixture, f"train.steps={at + 1}")
    (record,) = metrics(folder, "boundary")
    batch, noise = record["global_batch"], record["grad_sq_example"] - record["grad_sq_batch"]
    true = batch * record["grad_sq_batch"] - record["grad_sq_example"]
    assert record["noise_scale"] == (pytest.approx(batch * noise / true) if true > 0 and noise > 0 else None)


def test_a_branch_outlives_the_checkpoint_it_came_from(folder: Path, stable: list[dict[str, Any]]) -> None:
    origin = copy_of(folder, "stable", "origin")
    words = (start(origin, 15), "checkpoint.every=5")
    train(folder, "orphan", *words, "train.steps=20")
    shutil.rmtree(folder / "runs" / origin)
    train(folder, "orphan", "--resume", "auto", *words, "train.steps=22")
    train(folder, "orphan", "--resume", "auto", "train.steps=25")  # nor need it be named again
    assert losses(folder, "orphan") == [record["loss"] for record in stable[15:25]]


def test_rows_of_a_run_without_checkpoint_do_not_stay_before_a_branch(
    folder: Path, stable: list[dict[str, Any]]
) -> None:
    words = ("batch.policy=table", 'batch.table=["512:16"]')
    train(folder, "again", *words, "train.steps=12")
    shutil.rmtree(folder / "runs/again/checkpoints")
    train(folder, "again", "--resume", "auto", start("stable", 8), *words, "train.steps=12")
    assert [record["step"] for record in metrics(folder, "again")] == [9, 10, 11, 12]
    replayed = replay(folder / "runs/again")  # the first life's growth at step 4 is undone, the branch's comes at once
    assert replayed.differences == [] and [(step, c.now) for step, c in replayed.changes] == [(8, 16)]


def moments_after_restoring(folder: Path) -> list[float]:
    """The largest moments of a run that has trained, and then returns to a checkpoint from before its first update."""
    with contextlib.chdir(folder):
        config = resolve.load(Path("run.toml"), ["log.name=rewinding"]).config
        config = with_vocabulary(config, load_tokenizer(config.data.tokenizer))
        data = open_data(config)
        run = Run(config, single_rank_mesh(config), data)
        run.save(None)
        run.store.wait()
        loader, found = Loader(data, run.mesh.device, False), []
        plan = run.next_step()
        assert plan
        step = run.compute(run.microbatches(loader, plan), plan)
        run.update(step, plan)
        run.advance(plan, step.measured)
        for _ in range(2):
            found.append(max(storage(moments).abs().max().item() for moments in run.optimizer.state().values()))
            run.restore(run.folder / "step-00000000")
        assert run.optimizer.updates == 0
        return found


def test_moments_are_zero_again_before_the_first_update(folder: Path) -> None:
    ((before, after),) = world.run(1, moments_after_restoring, folder)
    assert before > 0 and after == 0


def spoil_a_chunk(checkpoint: Path, shard: str) -> None:
    """Change a value's bit in a shard, as memory may before it is written, and seal what is there: no file differs from
    the manifest, one chunk from its own checksum."""
    content = bytearray((checkpoint / shard).read_bytes())
    content[-1] ^= 4
    (checkpoint / shard).write_bytes(content)
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_damaged_chunk_is_refused_and_an_older_checkpoint_serves(
    folder: Path, stable: list[dict[str, Any]], ranks: int
) -> None:
    """On all ranks, whichever has met it, and after some tensors were filled from the damaged one."""
    name = copy_of(folder, "stable", f"spoilt{ranks}")
    layout = ("--ranks", str(ranks))
    if ranks > 1:  # files of two ranks, of which one spoils its own
        shutil.rmtree(folder / "runs" / name)
        train(folder, name, *layout, "parallel.dp_shard=2")
    checkpoints = sorted((folder / "runs" / name / "checkpoints").glob("step-*"))
    whole = numbers(folder, name)
    for later in checkpoints[30:]:
        shutil.rmtree(later)
    for spoilt in checkpoints[28:30]:
        spoil_a_chunk(spoilt, f"shard-{ranks - 1:05d}.safetensors")
    train(folder, name, "--resume", "auto", *layout)
    refused = [event["reason"] for event in read_events(folder / "runs" / name) if event["event"] == "refused"]
    assert len(refused) == 2 and all("is damaged" in why and "is not what was written" in why for why in refused)
    assert "step-00000030" in refused[0] and "step-00000029" in refused[1]
    assert numbers(folder, name) == whole
    if ranks == 1:
        assert whole == stable


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_resumed_before_at_and_after_another_length(folder: Path, staged: list[dict[str, Any]], offset: int) -> None:
    step = next(record["step"] for record in staged if record["tokens"] >= 2560) + offset
    name = copy_of(folder, "staged", f"staged{offset}")
    for later in sorted((folder / "runs" / name / "checkpoints").glob("step-*"))[step:]:
        shutil.rmtree(later)
    train(folder, name, "--resume", "auto", *STAGES)
    assert numbers(folder, name) == staged
