"""What is "auto": decided for all ranks alike, recorded, kept on resume; the division of a batch changes no number."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import logged
import pytest
from corpus import write_corpus
from distributed import world
from distributed.runs import train
from distributed.training import mesh_of, settings_of, write_model
from train.test_run import GROWING, RUN, copy_of

from megahp.config import resolve
from megahp.evaluate.sample import single_rank_model
from megahp.launch import World
from megahp.log.metrics import read_events
from megahp.log.replay import replay
from megahp.parallel.layout import Layout
from megahp.scaling.memory import training_bytes
from megahp.train import auto_settings as module
from megahp.train.auto_settings import resolve_auto

AUTO = "batch.micro_batch=auto"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("auto")
    write_corpus(folder / "corpus", 0.05)
    (folder / "run.toml").write_text(RUN.replace("micro_batch = 2\n", ""))
    return folder


def decided(free: dict[int, float], saved: int = 0, *words: str) -> tuple[int, list[str]]:
    """What a rank that has this many bytes free, by the number of ranks, decides on."""
    size = world_size()
    config = settings_of("llama", AUTO, *words)
    mesh = mesh_of(Layout(dp_shard=size))
    before = {"batch": {"largest_micro_batch": saved}}
    with (
        mock.patch.object(module, "free_memory", lambda _: free[mesh.data_rank]),
        mock.patch.object(module, "_saved", lambda _: before),
    ):
        config, lines = resolve_auto(config, mesh, World(mesh.data_rank, size), resume=saved > 0)
    return config.batch.largest_micro_batch, lines


def teacher_in(folder: Path) -> tuple[str, int]:
    model = single_rank_model(settings_of("gemma"))
    return write_model(folder / "teacher", "gemma"), sum(weight.numel() for weight in model.parameters())


def world_size() -> int:
    import torch.distributed as dist

    return dist.get_world_size()


def test_the_rank_with_least_memory_decides_for_all() -> None:
    config = settings_of("llama", AUTO)
    fixed, one = (training_bytes(config, 2, sequences) for sequences in (0, 1))
    free = {0: 2 * (fixed + 9 * (one - fixed)), 1: 2 * (fixed + 5 * (one - fixed))}  # a half, a power of 2
    found = world.run(2, decided, free)
    assert [largest for largest, _ in found] == [4, 4] and "half of the free memory" in found[1][1][0]
    tokens = world.run(1, decided, {0: 1e12})[0]
    assert tokens[0] == 4096 // 16 and "4096 tokens" in tokens[1][0]
    assert world.run(1, decided, {0: 1.0})[0][0] == 1
    assert world.run(1, decided, {0: 1.0}, 0, "batch.largest_micro_batch=7")[0] == (7, [])


def test_the_weights_of_teachers_are_memory_that_is_not_free(tmp_path: Path) -> None:
    teacher, weights = world.run(1, teacher_in, tmp_path)[0]
    words = f'distill.teachers=["{teacher}", "{teacher}"]', f"model.vocab_size={settings_of('gemma').model.vocab_size}"
    fixed, one = (training_bytes(settings_of("llama", AUTO, words[1]), 1, sequences) for sequences in (0, 1))
    free = [2 * (fixed + number * (one - fixed)) + 2 * 4 * weights for number in (8.5, 7.5)]
    assert 2 * 4 * weights > 2 * (one - fixed)  # or they would not matter
    assert [world.run(1, decided, {0: each}, 0, *words)[0][0] for each in free] == [8, 4]


def test_a_resume_divides_batches_as_before_where_memory_holds_that_at_all() -> None:
    held, lines = world.run(1, decided, {0: 1e12}, 9)[0]
    assert held == 9 and "as before" in lines[0]
    lowered, lines = world.run(1, decided, {0: 1.0}, 9)[0]
    assert lowered == 1 and "in place of 9, which this machine cannot hold" in lines[0]


def numbers(folder: Path, name: str) -> list[dict[str, Any]]:
    return logged.numbers(folder / "runs" / name)


def test_losses_and_growth_do_not_depend_on_how_batches_are_divided(folder: Path) -> None:
    """Grown in steps of a sequence a rank: to multiples of 2, not of two microbatches."""
    train(folder, "auto", "--ranks", "2", AUTO, *GROWING)
    train(folder, "small", "--ranks", "2", AUTO, "batch.largest_micro_batch=3", *GROWING)
    events = read_events(folder / "runs/auto")
    assert [event["event"] for event in events][:2] == ["started", "settled"]
    assert (largest := events[0]["config"]["batch"]["largest_micro_batch"]) == 4096 // 32
    written = resolve.load(folder / "runs/auto/config.toml").config.batch
    assert (written.micro_batch, written.largest_micro_batch) == ("auto", largest)
    auto, small = numbers(folder, "auto"), numbers(folder, "small")
    batches = [record["global_batch"] for record in auto]
    assert batches == [record["global_batch"] for record in small]
    assert any(batch % 4 for batch in batches) and batches[-1] > batches[0]
    assert [r["loss"] for r in small] == pytest.approx([r["loss"] for r in auto], rel=1e-5)
    assert [r["loss"] for r in small] != [r["loss"] for r in auto]  # it did compute differently
    for name in ("auto", "small"):
        assert replay(folder / "runs" / name).differences == []

    again = copy_of(folder, "small", "again")  # without the setting: as the checkpoint has it
    for later in sorted((folder / "runs/again/checkpoints").glob("step-*"))[7:]:
        shutil.rmtree(later)
    train(folder, again, "--ranks", "2", AUTO, "--resume", "auto", *GROWING)
    assert numbers(folder, "again") == small
    resumed = next(event for event in read_events(folder / "runs/again") if event["event"] == "resumed")
    assert resumed["changed"].keys() == {"log.name"} and replay(folder / "runs/again").differences == []
    assert resumed["config"]["batch"]["largest_micro_batch"] == 3


def dtypes(fast: dict[int, str], word: str) -> tuple[str, list[str]]:
    """What a rank computes in, where each rank's device has this fast dtype."""
    mesh = mesh_of(Layout(dp_shard=world_size()))
    with mock.patch.object(module, "fast_dtype", lambda _: fast[mesh.data_rank]):
        config, lines = resolve_auto(settings_of("llama", f"train.dtype={word}"), mesh, World(), resume=False)
    return config.train.dtype, lines


def test_all_ranks_compute_in_what_each_is_fast_in() -> None:
    for second in ("bfloat16", "float32"):
        for dtype, lines in world.run(2, dtypes, {0: "bfloat16", 1: second}, "auto"):
            assert dtype == second and f"train.dtype is {second}" in lines[0]
    assert world.run(1, dtypes, {0: "float32"}, "bfloat16")[0] == ("bfloat16", [])


def compiled(words: tuple[str, ...], saved: Any = None, compiler: bool = True) -> tuple[bool, str]:
    """Whether a run with these settings compiles blocks, and why."""
    config, mesh = settings_of("llama", "compute.compile=auto", *words), mesh_of(Layout())
    before = {} if saved is None else {"compute": {"compile": saved}}
    with (
        mock.patch.object(module, "_saved", lambda _: before),
        mock.patch.object(module, "has_compiler", lambda: compiler),
    ):
        config, (line,) = resolve_auto(config, mesh, World(), resume=saved is not None)
    assert isinstance(config.compute.compile, bool)
    return config.compute.compile, line


def test_blocks_are_compiled_in_long_runs_on_cpus_and_as_before_on_resume() -> None:
    long = ("train.tokens=1e15",)
    for arguments, expected, why in [
        ((long,), True, "takes about 60 s"),
        (((),), False, "too much of a run of about"),
        (((*long, "train.steps=3"),), False, "too much of a run"),
        ((long, None, False), False, "no C++ compiler"),
        (((*long, "model.experts=4"),), False, "dense blocks"),
        (((*long, "batch.micro_batch=auto", "batch.largest_micro_batch=2"),), False, "a growing batch"),
        (((), True), True, "as before"),
        ((long, False), False, "as before"),
        (((), True, False), False, "no C++ compiler"),
    ]:
        decision, line = world.run(1, compiled, *arguments)[0]
        assert decision is expected and why in line, (arguments, line)
