"""A batch that grows by equal increments."""

from __future__ import annotations

from scaling.batch.schedulers import SAVED, config, run

from megahp.scaling.batch import BatchScheduler, Progress


def test_ramp_is_megatrons() -> None:
    """(16, 16, 300000) -> 1024 as Megatron-LM 0.16's own calculator was seen to run it, to its counts at the end."""
    ramp = {"batch__policy": "ramp", "batch__largest": 1024, "batch__increment": 16, "batch__ramp_samples": 300_000}
    steps = run(BatchScheduler(config(16, 16, tokens=16 * 305_000, **ramp), 1))
    starts = {batch: before.samples for before, batch, _ in reversed(steps)}
    assert [starts[size] for size in (16, 32, 48, 64)] == [0, 4768, 9536, 14288]
    assert (starts[1008], starts[1024]) == (296048, 300080)
    assert next((b.step, b.samples) for b, size, _ in steps if b.samples > 300_080) == (1410, 301_104)


def test_a_ramp_begins_where_its_plan_does() -> None:
    ramp = {"batch__policy": "ramp", "batch__largest": 8, "batch__increment": 2, "batch__ramp_samples": 40}
    whole = [size for _, size, _ in run(BatchScheduler(config(4, 2, tokens=16 * 240, **ramp), 1))]
    late, progress, sizes = BatchScheduler(config(4, 2, tokens=16 * 1240, **ramp), 1), Progress(99, 1000, 16_000), []
    assert late.load_state({**SAVED, "batch": 4, "began": 16_000}, progress) == []
    while step := late.step(progress):
        progress = progress.after(step)
        sizes.append(step.global_batch)
        late.update(progress, None)
    assert sizes == whole and set(sizes) == {4, 6, 8}
