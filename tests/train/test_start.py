"""Runs that go on from another's checkpoint, and runs whose data changes on the way."""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import world
from distributed.runs import as_rank, train
from train.test_run import copy_of, losses, metrics, numbers

from megahp import cli
from megahp.checkpoint.store import write_manifest
from megahp.config import resolve
from megahp.data.indexed import IndexedDataset, IndexedWriter
from megahp.data.loader import Loader
from megahp.data.split import Documents, split_documents
from megahp.data.tokenizer import fingerprint_of, load_tokenizer
from megahp.errors import UserError
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
    with IndexedWriter(str(folder / "two-held"), 257) as writer:
        for _ in range(10):
            writer.add_document((random.geometric(0.1, 60).clip(max=100) + 128).tolist())
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


def test_a_branch_onto_other_data_is_resumed(folder: Path, stable: list[dict[str, Any]]) -> None:
    """Its state also holds the position of the source that only the run before it had."""
    words = (start("stable", 20), 'data.train=["two"]', "data.weights=[]", "log.baselines=false")
    train(folder, "onto", *words, "train.steps=24")
    whole = numbers(folder, "onto")
    for later in sorted((folder / "runs/onto/checkpoints").glob("step-*"))[2:]:
        shutil.rmtree(later)
    train(folder, "onto", "--resume", "auto", *words, "train.steps=24")
    assert numbers(folder, "onto") == whole and len(whole) == 4


MIXED = ("data.weights=[3, 1]", 'data.mixtures=["1280:0.25,0.75"]', "train.steps=24", "train.validate_every=4")


def damage(folder: Path, name: str, copy: str, ids: dict[int, int]) -> None:
    """Copy a source, with the first token of some documents replaced."""
    shutil.copy(folder / f"{name}.idx", folder / f"{copy}.idx")
    content, starts = bytearray((folder / f"{name}.bin").read_bytes()), IndexedDataset(str(folder / name))
    for document, token in ids.items():
        place = int(starts.document_starts(np.array([document]))[0])
        content[2 * place : 2 * place + 2] = token.to_bytes(2, "little")
    (folder / f"{copy}.bin").write_bytes(content)


def refused(folder: Path, words: list[str], resume: bool) -> str:
    """Train on each rank, and return the error with which it ends."""
    try:
        as_rank(folder, words, resume)
        return ""
    except UserError as error:
        return str(error)
    finally:
        gc.collect()  # closes the files of the run


def events(folder: Path, name: str, event: str) -> list[dict[str, Any]]:
    return [each for each in read_events(folder / "runs" / name) if each["event"] == event]


def test_the_order_of_sources_is_no_matter_to_a_resume(folder: Path) -> None:
    """Here under other names too, as when the files have moved."""
    train(folder, "mixed", *MIXED)
    whole = losses(folder, "mixed")
    for name in ("one", "two"):
        for suffix in ("bin", "idx"):
            shutil.copy(folder / f"{name}.{suffix}", folder / f"moved-{name}.{suffix}")
    turned = ('data.train=["moved-two", "moved-one"]', "data.weights=[1, 3]", 'data.mixtures=["1280:0.75,0.25"]')
    for later in sorted((folder / "runs/mixed/checkpoints").glob("step-*"))[7:]:
        shutil.rmtree(later)
    train(folder, "mixed", "--resume", "auto", *MIXED, *turned)
    assert losses(folder, "mixed") == whole
    assert list(metrics(folder, "mixed")[-1]["epochs"]) == ["moved-one", "moved-two"]
    (resumed,) = events(folder, "mixed", "resumed")
    assert resumed["config"]["data"]["train"] == ["moved-one", "moved-two"] and set(resumed["changed"]) == {
        "data.train"
    }
    other = ("data.weights=[3, 1]", *turned[::2])  # the weights were not turned
    (error,) = world.run(1, refused, folder, ["log.name=mixed", *MIXED, *other], True)
    assert "data.weights = (1.0, 3.0) but" in error


def test_losses_and_epochs_of_each_source_are_logged(folder: Path) -> None:
    """The mixture's loss is the mean by the quotas, those of the last phase."""
    train(folder, "sources", *MIXED, "train.validate_first=true", 'data.validation=["held:two-held"]')
    records = metrics(folder, "sources")
    assert [record["step"] for record in records] == list(range(25)) and "loss" not in records[0]
    validated = [record for record in records if "validation_loss" in record]
    assert [record["step"] for record in validated] == list(range(0, 25, 4))
    for record in validated:
        losses = record["validation_losses"]
        assert list(losses) == ["one", "two", "held"]
        assert record["validation_loss"] == pytest.approx(0.25 * losses["one"] + 0.75 * losses["two"], rel=1e-9)
    assert validated[0]["validation_losses"]["held"] > validated[-1]["validation_losses"]["held"]
    (end,) = events(folder, "sources", "finished")
    assert end["epochs"] == records[-1]["epochs"]
    read = {name: count * IndexedDataset(str(folder / name)).total_tokens for name, count in end["epochs"].items()}
    assert read["one"] + read["two"] == pytest.approx(24 * 128 / 0.9, rel=0.03)
    assert read["one"] / read["two"] == pytest.approx((7.5 + 3.5) / (2.5 + 10.5), rel=0.1)
    assert cli.main(["report", str(folder / "runs/sources")]) == 0
    assert "one 0." in (folder / "runs/sources/report.html").read_text()


def training_document(folder: Path) -> int:
    """One whose first token is read first in step 14."""
    return int(Documents(None, split_documents(80, 0.1)).ids()[15])


def test_an_id_outside_the_vocabulary_is_found_before_training(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """F7: on opening, by a scan whose outcome is kept; left out by name it is no obstacle."""
    bad = training_document(folder)
    damage(folder, "one", "outside", {bad: 300})
    words = ["train", "run.toml", "log.name=outside", 'data.train=["outside", "two"]', "train.steps=1"]
    with contextlib.chdir(folder):
        assert cli.main(words) == 2
        assert f"data 'outside' holds token 300 in document {bad}, at its place 0, but" in capsys.readouterr().err
        assert not (folder / "runs/outside").exists()
        (kept,) = [path for path in (folder / "cache").glob("outside-*.npy") if len(np.load(path)) > 1]
        np.save(kept, np.load(kept)[::-1])  # damaged: the scan is made again
        assert cli.main(words) == 2
    train(folder, "outside", *words[3:], f"data.skip=['outside:{bad}']")


@pytest.mark.parametrize("layout", ["tp=1", "dp_shard=2", "tp=2", "pp=2", "cp=2"])
def test_a_wrong_sample_met_in_training(folder: Path, stable: list[dict[str, Any]], layout: str) -> None:
    """F7: it is one event, and ends the run, of which the corrected file makes what it would have been; or is replaced,
    in the same way on every layout. A description that is wrong lets it pass on opening."""
    bad, name, ranks = training_document(folder), f"wrong-{layout}", int(layout[-1])
    damage(folder, "one", name, {bad: 300})
    description = {"tokenizer_fingerprint": fingerprint_of("bytes"), "largest_id": 256}
    description["fingerprint"] = IndexedDataset(str(folder / name)).fingerprint
    (folder / f"{name}.json").write_text(json.dumps(description))
    words = [f"log.name={name}", f'data.train=["{name}", "two"]', "log.baselines=false", "checkpoint.every=5"]
    words += [f"parallel.{layout}", "model.layers=2"] if layout == "pp=2" else [f"parallel.{layout}"]
    errors = world.run(ranks, refused, folder, words, False)
    assert len(set(errors)) == 1 and f"holds token 300 in document {bad}" in errors[0] and "data.skip" in errors[0]
    (event,) = events(folder, name, "wrong sample")
    met = event["step"] + 1
    assert met == 14 and event["sample"] // 8 == event["step"]
    assert (folder / "runs" / name / "checkpoints/step-00000013").exists()  # nothing is trained twice

    shutil.copytree(folder / "runs" / name, folder / "runs" / f"{name}-skip")
    skip = (*words[1:], "data.wrong_samples=skip", "--ranks", str(ranks))
    train(folder, f"{name}-skip", "--resume", "auto", *skip)
    found = [(each["step"], each["sample"]) for each in events(folder, f"{name}-skip", "wrong sample")]
    assert found[0] == found[1] == (met - 1, event["sample"]) and len({step for step, _ in found}) == len(found) - 1
    if layout == "pp=2":  # of another model
        return
    skipped, plain = losses(folder, f"{name}-skip"), [record["loss"] for record in stable]
    assert skipped[: met - 1] == pytest.approx(plain[: met - 1], rel=1e-4)
    assert skipped[met - 1] != pytest.approx(plain[met - 1], rel=1e-4)
    # the same samples: in float64 it is the same to 1e-10, while in float32 rounding grows to 2e-3 in 40 steps, by CPU
    alone = losses(folder, "wrong-tp=1-skip")
    assert skipped[: met + 4] == pytest.approx(alone[: met + 4], rel=1e-4) and skipped == pytest.approx(alone, rel=5e-3)

    (folder / f"{name}.json").unlink()
    damage(folder, "one", name, {})
    train(folder, name, "--resume", "auto", *words[1:], "--ranks", str(ranks))
    assert losses(folder, name) == pytest.approx(plain, rel=5e-3)
    (mended,) = events(folder, name, "mended")
    assert f"data '{name}' has other tokens" in mended["reason"]


def test_a_run_that_is_elsewhere_is_not_begun_again(
    folder: Path, stable: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "files").mkdir()
    shutil.copy(folder / "run.toml", folder / "files/run.toml")
    absolute = f'data.train=["{folder}/one", "{folder}/two"]'
    with contextlib.chdir(tmp_path):
        for file in ("run.toml", "files/run.toml", "runs/stable/config.toml"):
            assert cli.main(["train", str(folder / file), "log.name=stable", absolute, "--resume", "auto"]) == 2
            error = capsys.readouterr().err
            assert f"runs/stable is not in the working folder {tmp_path}, but in {folder}; resume from there" in error
        assert cli.main(["train", str(folder / "run.toml"), "log.name=new", "--resume", "auto"]) == 2
        assert f"data file 'one.idx' does not exist in the working folder {tmp_path}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_best_of_nothing_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """F12: checkpoints and validations that never meet, as the overrides leave it."""
    words = ["train", "run.toml", "log.name=best", "checkpoint.keep_best=true", "checkpoint.every=15"]
    with contextlib.chdir(folder):
        assert cli.main([*words, "train.validate_every=20"]) == 2
        assert "of at most 40 steps none has both" in capsys.readouterr().err
        assert cli.main([*words, "train.validate_every=0"]) == 2
        assert "checkpoint.keep_best" in capsys.readouterr().err
        assert cli.main([*words, "train.validate_every=10", "train.steps=20"]) == 2
        assert "of at most 20 steps" in capsys.readouterr().err
