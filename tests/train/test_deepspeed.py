"""DeepSpeed as the engine: runs that grow, that change engines on the way, that skip a step; and what is refused.

That its ZeRO stages compute what one rank does is tests/distributed/test_layouts.py's."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import logged
import pytest
import torch
from corpus import write_corpus
from distributed.runs import as_rank
from distributed.world import World
from train.test_run import RUN

from megahp.config import resolve
from megahp.errors import UserError
from megahp.log.metrics import read_events
from megahp.log.replay import replay
from megahp.parallel.layout import Layout, fit, shards_of
from megahp.parallel.parameters import FlatPart, boxes, storage
from megahp.train import loop, prepare
from megahp.train.trainer import Step

needs_deepspeed = pytest.mark.skipif(not prepare.find_spec("deepspeed"), reason="deepspeed is not installed")
# the batch grows by the measured noise scale, calibrated after every step
GROWING = (
    "batch.policy=measured",
    "batch.noise_share=50",
    "batch.largest=32",
    "batch.look_every=1",
    "batch.calibrate_every=1",
    "optimizer.beta2=0.5",
    "train.noise_half_life=0.1",
)
CLOSE, NOISE = 1e-4, 1e-2  # in fp32, of a run's numbers after some steps; of noise scales


def with_deepspeed(stage: int, *words: str) -> tuple[str, ...]:
    return ("parallel.engine=deepspeed", f"parallel.zero={stage}", *words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    write_corpus(folder / "corpus", 0.05)
    (folder / "run.toml").write_text(RUN)
    return folder


@pytest.fixture(scope="module")
def two() -> Iterator[World]:
    """Two ranks of their own: DeepSpeed keeps state in a process."""
    with contextlib.closing(World(2, daemon=False)) as two:
        yield two


def train(two: World, folder: Path, name: str, *words: str, resume: bool = False) -> list[dict[str, Any]]:
    two.run(as_rank, folder, [f"log.name={name}", *words], resume)
    return logged.numbers(folder / "runs" / name)


def assert_close(got: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """All that was logged of two runs; where one stopped on the way there is a validation more."""
    assert len(got) == len(wanted) > 0
    for one, other in zip(got, wanted, strict=True):
        found = dict(leaves(one))
        for key, expected in leaves(other):
            # a noise scale divides differences that nearly cancel
            error = NOISE if key.startswith(".noise") else CLOSE
            close = pytest.approx(expected, rel=error, abs=1e-7) if isinstance(expected, float) else expected
            assert found[key] == close, (other["step"], key)


def leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested dicts and lists, with their keys."""
    if not isinstance(tree, dict | list):
        yield key, tree
        return
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield from leaves(value, f"{key}.{name}")


@pytest.fixture(scope="module")
def ours(two: World, folder: Path) -> list[dict[str, Any]]:
    return train(two, folder, "ours", "train.steps=24")


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_changes_engines_on_the_way(two: World, folder: Path, ours: list[dict[str, Any]], stage: int) -> None:
    """Ours for eight steps, DeepSpeed for eight, ours to the end: as if it never had."""
    name, deepspeed = f"there-and-back-{stage}", with_deepspeed(stage)
    train(two, folder, name, "train.steps=8")
    train(two, folder, name, *deepspeed, "train.steps=16", resume=True)
    assert_close(train(two, folder, name, "train.steps=24", resume=True), ours)
    told = [event["event"] for event in read_events(folder / "runs" / name)]
    assert told.count("resumed") == 2 and "refused" not in told


@needs_deepspeed
def test_a_deepspeed_run_goes_on_as_another_stage_with_offload(two: World, folder: Path) -> None:
    """Other partitions, in other memory: the same run."""
    wanted = train(two, folder, "stage-2", *with_deepspeed(2, "train.steps=16"))
    train(two, folder, "stages", *with_deepspeed(3, "train.steps=8"))
    words = with_deepspeed(2, "parallel.offload=true", "train.steps=16")
    assert_close(train(two, folder, "stages", *words, resume=True), wanted)


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_a_batch_that_grows_by_the_measured_noise(two: World, folder: Path, stage: int) -> None:
    grown = train(two, folder, "ours-grown", *GROWING) if stage == 2 else logged.numbers(folder / "runs/ours-grown")
    assert {record["global_batch"] for record in grown} >= {8, 32}, "it must grow for this test to say anything"
    assert_close(train(two, folder, f"grown-{stage}", *with_deepspeed(stage, *GROWING)), grown)
    assert replay(folder / f"runs/grown-{stage}").differences == []


def overflowing(compute: Callable[..., Step], left: dict[int, int]) -> Callable[..., Step]:
    """`compute`, with gradients that are not finite at some steps, so many times each."""

    def wrapped(run: Any, loader: Any, plan: Any, stop_requested: bool) -> Step:
        scale, times = run.loss_scale.value, left.get(plan.step, 0)
        if times:
            left[plan.step] = times - 1
            run.loss_scale.value = float("inf")
        try:
            return compute(run, loader, plan, stop_requested)
        finally:
            run.loss_scale.value = scale

    return wrapped


def as_rank_that_overflows(folder: Path, words: list[str]) -> None:
    with mock.patch.object(loop, "compute", overflowing(loop.compute, {5: 2, 8: 1})):
        as_rank(folder, [*words, "train.steps=12"], False)


@needs_deepspeed
@pytest.mark.parametrize("words", [(1,), (2, "parallel.offload=true"), (3,)])
def test_steps_are_skipped_and_retried(two: World, folder: Path, words: tuple[Any, ...]) -> None:
    """What DeepSpeed had summed of a step that was given up is gone; and neither weights nor moments have moved."""
    if not (folder / "runs/ours-skipped").exists():
        two.run(as_rank_that_overflows, folder, ["log.name=ours-skipped"])
    name = f"skipped-{words[0]}"
    two.run(as_rank_that_overflows, folder, [f"log.name={name}", *with_deepspeed(*words)])
    wanted = logged.numbers(folder / "runs/ours-skipped")
    got = logged.numbers(folder / "runs" / name)
    assert_close(got[5:], wanted[5:])
    assert_close(got[:4], wanted[:4])
    events = [event["event"] for event in read_events(folder / "runs" / name)]
    assert events.count("skipped") == events.count("repeated") == 1


def traces(folder: Path, words: list[str]) -> list[str]:
    """What DeepSpeed leaves behind in a process and its folder."""
    environment, linear, out = dict(os.environ), torch.nn.functional.linear, io.StringIO()
    argv = mock.patch("sys.argv", ["train", "--deepspeed_config", "none.json", "--local_rank", "7"])
    with argv, contextlib.redirect_stdout(out):
        as_rank(folder, words, False)
    environment["LOCAL_RANK"] = "0"  # of the device, which ZeRO-3 reads in mid-run
    found = [name for name in os.environ.keys() | environment.keys() if os.environ.get(name) != environment.get(name)]
    found += ["linear"] if torch.nn.functional.linear is not linear else []
    return found + [line for line in out.getvalue().splitlines() if "deepspeed" in line.lower()]


@needs_deepspeed
def test_deepspeed_keeps_to_itself(two: World, folder: Path) -> None:
    files = {path.name for path in folder.iterdir()}
    words = ["log.name=traces", *with_deepspeed(3), "train.steps=2"]
    assert two.run(traces, folder, words) == [[], []]
    assert {path.name for path in folder.iterdir()} == files | {"runs"}


def test_without_deepspeed_nothing_starts(folder: Path) -> None:
    with contextlib.chdir(folder), mock.patch.object(prepare, "find_spec", lambda _: None):
        config = resolve.load(Path("run.toml"), [*with_deepspeed(3), "log.name=absent"]).config
        with pytest.raises(UserError, match=r"parallel.engine = 'deepspeed' .* pip install 'megahp\[deepspeed\]'"):
            prepare.prepare(config, Layout(dp_replicate=2), 2, False)
        assert not config.directory.exists()


def test_deepspeeds_ranks_are_replicas_for_the_mesh() -> None:
    parallel = resolve.resolve([("test", {"parallel": {"engine": "deepspeed"}})]).config.parallel
    assert fit(parallel, 4) == Layout(dp_replicate=4) and shards_of(parallel, fit(parallel, 4)) == 4


@pytest.mark.parametrize("shape", [(), (7,), (4, 5), (3, 2, 4), (2, 1, 3, 2)])
def test_boxes_cover_any_range_of_a_tensor_once(shape: tuple[int, ...]) -> None:
    whole = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)
    for begin in range(whole.numel() + 1):
        for end in range(begin, whole.numel() + 1):
            part = FlatPart(whole.shape, begin, whole.view(-1)[begin:end].clone())
            got = torch.zeros(shape)
            for offsets, box in boxes(part, storage(part)):
                window = tuple(slice(a, a + n) for a, n in zip(offsets, box.shape, strict=True))
                assert not got[window].any()
                got[window] = box
                box.neg_()  # a view: what is written to it is in the part
            index = torch.arange(whole.numel()).view(shape)
            assert got.equal(whole * ((index >= begin) & (index < end)))
            assert storage(part).equal(-whole.view(-1)[begin:end])
